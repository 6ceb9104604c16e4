"""The audit trail on its way to a repository elsewhere: what was not taken there yet, and when there is too much of that.

The trail is the queue. Its records are numbered without gaps in the order of their commits, so one number says how far the repository
is, and a repository that was away for a day costs nothing but the reading. Nothing is ever removed from the trail.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BindParameter, bindparam, select

from storage.audit import AUDIT, AUDIT_HEAD, AuditEntry, canonical, entry_of
from storage.changes import SUBSCRIBERS
from storage.database import from_micros
from storage.errors import StorageError, Unavailable
from storage.tables import INSTANCES, SERIES, STUDIES

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

SINK: Final = "audit sink"
"""Under this name the cursor is kept; no webhook can be called so."""

_HEAD = select(AUDIT_HEAD.c.seq).where(AUDIT_HEAD.c.id == 1)
_CURSOR = select(SUBSCRIBERS.c.cursor, SUBSCRIBERS.c.reason).where(SUBSCRIBERS.c.name == SINK)
_AT = select(AUDIT.c.at).where(AUDIT.c.seq == bindparam("record"))
_AFTER = select(AUDIT).where(AUDIT.c.seq > bindparam("after")).order_by(AUDIT.c.seq).limit(bindparam("most"))
_PATIENT = (STUDIES.c.study_instance_uid, STUDIES.c.patient_id, STUDIES.c.issuer_of_patient_id)
_UIDS: Final[BindParameter[Any]] = bindparam("uids", expanding=True)
_OF_STUDY = select(STUDIES.c.study_instance_uid, *_PATIENT).where(STUDIES.c.study_instance_uid.in_(_UIDS))
_OF_SERIES = (
    select(SERIES.c.series_instance_uid, *_PATIENT)
    .join(STUDIES, STUDIES.c.id == SERIES.c.study_ref)
    .where(SERIES.c.series_instance_uid.in_(_UIDS))
)
_OF_INSTANCE = (
    select(INSTANCES.c.sop_instance_uid, *_PATIENT, INSTANCES.c.sop_class_uid)
    .join(SERIES, SERIES.c.id == INSTANCES.c.series_ref)
    .join(STUDIES, STUDIES.c.id == SERIES.c.study_ref)
    .where(INSTANCES.c.sop_instance_uid.in_(_UIDS))
)


@dataclass(frozen=True, slots=True)
class Known:
    """What the index knows now of whom and what a record is about."""

    study_instance_uid: str
    patient_id: str
    issuer_of_patient_id: str
    sop_class_uid: str = ""
    """Empty unless the record is about an instance."""


@dataclass(frozen=True, slots=True)
class OutgoingRecord:
    """A record of the trail, with what the repository needs to know besides."""

    entry: AuditEntry
    canonical: str
    """What the chain's hash is made of, besides the hash of the record before."""
    known: Known | None
    """None: the index has no such study, series or instance (any more)."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What the repository has not taken yet."""

    records: int
    oldest_at: datetime | None
    """When the oldest of them was recorded; None when there are none."""
    reason: str
    """Why the last attempt failed; empty when it did not."""


class AuditOutbox:
    """What of the trail was not taken elsewhere yet. May be called from many threads at once.

    Parameters
    ----------
    database
        Where trail and cursor are.
    from_beginning
        Whether a repository that was never sent anything is owed all that was ever recorded, or what is recorded from now on.
    refuse_after
        Records that were not taken after which `require_room` refuses; 0: never.
    look_s
        Seconds for which `require_room` believes what it saw.
    """

    def __init__(self, *, database: Database, from_beginning: bool = True, refuse_after: int = 0, look_s: float = 1.0) -> None:
        self._database = database
        self._from_beginning = from_beginning
        self._refuse_after = refuse_after
        self._look_s = look_s
        self._lock = threading.Lock()
        self._looked_at = -math.inf
        self._seen = ""

    def after(self, cursor: int, *, limit: int) -> list[OutgoingRecord]:
        """Return the records that follow `cursor`, oldest first, at most so many."""
        with self._database.read() as connection:
            rows = connection.execute(_AFTER, {"after": cursor, "most": limit}).all()
            entries = [entry_of(row) for row in rows]
            known = _known(connection, entries) if entries else {}
        return [
            OutgoingRecord(entry, canonical(row._mapping), _first(known, entry))  # noqa: SLF001 - SQLAlchemy's public accessor
            for row, entry in zip(rows, entries, strict=True)
        ]

    def backlog(self) -> Backlog:
        """Return what was not taken yet."""
        with self._database.read() as connection:
            head = int(connection.execute(_HEAD).scalar_one())
            row = connection.execute(_CURSOR).first()
            cursor, reason = (row.cursor, row.reason) if row is not None else (0 if self._from_beginning else head, "")
            at = connection.execute(_AT, {"record": cursor + 1}).scalar_one_or_none() if cursor < head else None
        return Backlog(max(head - cursor, 0), None if at is None else from_micros(at), reason)

    def require_room(self) -> None:
        """Raise when so many records wait that no more instances may come.

        Raises
        ------
        Unavailable
            Too many wait; it ends by itself when the repository takes them.
        """
        if not self._refuse_after:
            return
        now = time.monotonic()
        with self._lock:
            look = now - self._looked_at >= self._look_s
            if look:
                self._looked_at = now
        if look:  # one looks, and whoever comes meanwhile goes by what was seen before
            self._seen = self._refusal()
        refusal = self._seen
        if refusal:
            raise Unavailable(refusal)

    def _refusal(self) -> str:
        try:
            waiting = self.backlog()
        except StorageError:
            return ""  # without its database nothing is taken in anyway, and for that reason
        if waiting.records <= self._refuse_after:
            return ""
        # Without their number: the refusal diary has one row for what repeats
        return (
            f"more than {self._refuse_after} audit records were not taken by the audit record repository yet (audit.refuse_after): nothing "
            "more is taken in until it has them; see why it does not take them, then send again"
        )


def degraded(waiting: Backlog, *, records: int, age_s: float, now: datetime) -> str:
    """Say that too much waits, or too long; empty when it does not. 0 `records` or 0 `age_s`: as much, as long as it likes."""
    age = (now - waiting.oldest_at).total_seconds() if waiting.oldest_at is not None else 0.0
    if not (records and waiting.records > records) and not (age_s and age > age_s):
        return ""
    why = f": {waiting.reason}" if waiting.reason else ""
    return f"{waiting.records} audit records, the oldest {age:.0f} s old, were not taken by the audit record repository yet{why}"


def _known(connection: Connection, entries: Sequence[AuditEntry]) -> dict[str, Known]:
    uids = sorted({uid for entry in entries for uid in _uids(entry)})
    if not uids:
        return {}
    found: dict[str, Known] = {}
    for statement in (_OF_STUDY, _OF_SERIES, _OF_INSTANCE):
        found |= {row[0]: Known(*row[1:]) for row in connection.execute(statement, {"uids": uids})}
    return found


def _uids(entry: AuditEntry) -> Iterable[str]:
    return filter(None, (entry.event.subject, _text(entry.event.detail, "study_instance_uid")))


def _first(known: Mapping[str, Known], entry: AuditEntry) -> Known | None:
    return next((known[uid] for uid in _uids(entry) if uid in known), None)


def _text(detail: Mapping[str, Any], name: str) -> str:
    value = detail.get(name)
    return value if isinstance(value, str) else ""
