"""The change feed: what happened to instances, in one order, with a cursor. The audit trail seen through a filter.

Records of the audit trail are numbered without gaps in the order of their commits, in the transaction of what they record. So the number
of a record is a cursor that misses nothing and repeats nothing: who has read up to n knows everything up to n, whatever number of writers
there is. Nothing is kept beside the trail, and a reader that was away for a month costs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Column, Integer, Row, Select, Table, Text, bindparam, insert, select, update

from storage.audit import AUDIT, AUDIT_HEAD
from storage.database import METADATA, from_micros, to_micros
from storage.errors import InvalidQuery, LeaseLost
from storage.records import AuditEvent
from storage.tables import INSTANCES, SERIES, STUDIES

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database

SUBSCRIBERS = Table(
    "subscribers",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("cursor", BigInteger, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
)

# action of the audit trail: (kind of change, members of its detail that are shown). Only these are shown: they name things, and hold
# neither patient data nor words of a peer.
_SHOWN: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = MappingProxyType(
    {
        "instance.received": ("instance.stored", ("door", "sha256", "byte_count")),
        "instance.adopted": ("instance.stored", ("door", "sha256", "byte_count")),
        "quarantine.accepted": ("instance.stored", ("sha256",)),
        "report.concluded": ("report.stored", ("sha256", "byte_count", "source_sop_instance_uid", "kind", "models")),
        "analysis.concluded": ("analysis.concluded", ("job", "reports")),
        "analysis.refused": ("analysis.refused", ("job", "attempts")),
        "report.delivered": ("report.delivered", ("job", "peer", "status")),
        "delivery.given_up": ("delivery.given_up", ("job", "attempts", "lane")),
        "instance.quarantined": ("instance.quarantined", ("door", "sha256", "byte_count")),
        "instance.archived": ("instance.archived", ()),
        "instance.lost": ("instance.lost", ("landed_on",)),
        "report.lost": ("report.lost", ("landed_on",)),
        "instance.erased": ("instance.erased", ()),
        "study.erased": ("study.erased", ("instances",)),
    }
)
KINDS: Final = frozenset(kind for kind, _ in _SHOWN.values())
"""What a change can be."""

# The index knows the archived instance of a UID, which is not the one that was set aside under it.
_NOT_OF_INDEX = frozenset({"instance.quarantined", "study.erased"})
_OF_STUDY = frozenset({"study.erased"})

LIMIT: Final = 1000
"""Most changes of one page."""
_SCAN: Final = 10_000
"""Records of the trail that one step looks through: milliseconds, however many of them are of no interest."""

_HEAD = select(AUDIT_HEAD.c.seq).where(AUDIT_HEAD.c.id == 1)
_CHANGES: Final[Select[Any]] = (
    select(AUDIT.c.seq, AUDIT.c.at, AUDIT.c.action, AUDIT.c.actor, AUDIT.c.subject, AUDIT.c.detail)
    .where(AUDIT.c.seq > bindparam("after"), AUDIT.c.seq <= bindparam("last"), AUDIT.c.action.in_(bindparam("actions", expanding=True)))
    .order_by(AUDIT.c.seq)
    .limit(bindparam("most"))
)
_PLACES = (
    select(INSTANCES.c.sop_instance_uid, STUDIES.c.study_instance_uid, SERIES.c.series_instance_uid)
    .join(SERIES, SERIES.c.id == INSTANCES.c.series_ref)
    .join(STUDIES, STUDIES.c.id == SERIES.c.study_ref)
    .where(INSTANCES.c.sop_instance_uid.in_(bindparam("uids", expanding=True)))
)
_FIND = select(SUBSCRIBERS).where(SUBSCRIBERS.c.name == bindparam("subscriber")).with_for_update()
_ALL = select(SUBSCRIBERS).order_by(SUBSCRIBERS.c.name)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that happened."""

    cursor: int
    """Its number: grows from change to change, with gaps where something of no interest happened."""
    at: datetime
    kind: str
    """One of `KINDS`."""
    study_instance_uid: str
    series_instance_uid: str
    """Study and series: empty when the instance is in the index no more (or, for one in quarantine, the series never was)."""
    sop_instance_uid: str
    """Empty for a change of a whole study."""
    detail: Mapping[str, Any]
    """No patient data."""

    def document(self) -> dict[str, Any]:
        """Return the change as it is written in JSON."""
        return {
            "cursor": self.cursor,
            "at": self.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "kind": self.kind,
            "study_instance_uid": self.study_instance_uid,
            "series_instance_uid": self.series_instance_uid,
            "sop_instance_uid": self.sop_instance_uid,
            "detail": dict(self.detail),
        }


@dataclass(frozen=True, slots=True)
class Page:
    """What follows a cursor."""

    changes: tuple[Change, ...]
    """In order; may be empty although `more` is true."""
    cursor: int
    """Where to go on from; beyond the last change when what follows it is of no interest."""
    more: bool
    """Whether there were records behind `cursor` when this was read."""


class ChangeFeed:
    """Reads the feed. May be called from many threads at once.

    Parameters
    ----------
    database
        Where the audit trail is.
    scan
        Records of the trail that one step looks through.
    """

    def __init__(self, *, database: Database, scan: int = _SCAN) -> None:
        self._database = database
        self._scan = scan

    def latest(self) -> int:
        """Return the cursor behind everything that has happened so far."""
        with self._database.read() as connection:
            return _head(connection)

    def since(self, cursor: int, *, limit: int = 100, wait_s: float = 0.0, kinds: Collection[str] = KINDS) -> Page:
        """Return the changes that follow `cursor`, oldest first.

        Parameters
        ----------
        cursor
            Of the page before; 0 for the beginning.
        limit
            Most changes of the page, 1 to `LIMIT`.
        wait_s
            Seconds to wait for a change when there is none. Without waiting the call is one step of bounded length, which may end
            without a change and yet with a cursor farther on.
        kinds
            Which changes are wanted.

        Raises
        ------
        InvalidQuery
            `cursor` lies beyond the end (the database is not the one it came from), or an argument is out of range.
        Unavailable
            The database cannot be read now.
        """
        if not 1 <= limit <= LIMIT:
            raise InvalidQuery(f"limit is not between 1 and {LIMIT}")
        if not KINDS.issuperset(kinds):
            raise InvalidQuery(f"kinds: there are {', '.join(sorted(KINDS))}")
        deadline = time.monotonic() + wait_s
        page = self._step(cursor, limit, kinds)
        while not page.changes and (left := deadline - time.monotonic()) > 0:
            if page.more or self._database.changed(left):
                page = self._step(page.cursor, limit, kinds)
        return page

    def changed(self, timeout_s: float) -> bool:
        """Wait until something may have changed since this thread last asked; see `Database.changed`."""
        return self._database.changed(timeout_s)

    def _step(self, cursor: int, limit: int, kinds: Collection[str]) -> Page:
        with self._database.read() as connection:
            head = _head(connection)
            if not 0 <= cursor <= head:
                raise InvalidQuery(
                    f"the cursor is not between 0 and {head}, where this feed ends: it came from elsewhere, or the database was restored "
                    f"from an older copy; read the feed again from 0"
                )
            last = min(head, cursor + self._scan)
            actions = [action for action, (kind, _) in _SHOWN.items() if kind in kinds]
            rows = connection.execute(_CHANGES, {"after": cursor, "last": last, "actions": actions, "most": limit}).all()
            uids = sorted({row.subject for row in rows if _SHOWN[row.action][0] not in _NOT_OF_INDEX})
            places = {uid: (study, series) for uid, study, series in connection.execute(_PLACES, {"uids": uids})} if uids else {}
        reached = rows[-1].seq if len(rows) == limit else last
        return Page(tuple(_change(row, places) for row in rows), reached, reached < head)


def _head(connection: Connection) -> int:
    return int(connection.execute(_HEAD).scalar_one())


def _change(row: Row[Any], places: Mapping[str, tuple[str, str]]) -> Change:
    kind, names = _SHOWN[row.action]
    detail = json.loads(row.detail)
    shown = {name: detail[name] for name in names if name in detail}
    if kind == "delivery.given_up":
        shown["peer"] = shown.pop("lane", row.actor)
    study, series = ("", "") if kind in _NOT_OF_INDEX else places.get(row.subject, ("", ""))
    if kind in _OF_STUDY:
        study = row.subject
    return Change(
        cursor=row.seq,
        at=from_micros(row.at),
        kind=kind,
        study_instance_uid=study or detail.get("study_instance_uid", ""),
        series_instance_uid=series,
        sop_instance_uid="" if kind in _OF_STUDY else row.subject,
        detail=shown,
    )


@dataclass(frozen=True, slots=True)
class Subscriber:
    """How far a subscriber of webhooks is."""

    name: str
    cursor: int
    """Everything up to here was taken by it."""
    failures: int
    """Attempts in a row that failed."""
    due_at: datetime
    """When to try again, after a failure."""
    reason: str
    """Of the last failure; empty when all is well."""


class Subscribers:
    """Keeps how far each subscriber of webhooks is.

    Parameters
    ----------
    database
        Its clock decides what is due.
    audit
        Records what was sent.
    """

    def __init__(self, *, database: Database, audit: AuditTrail) -> None:
        self._database = database
        self._audit = audit

    def find(self, name: str, *, from_beginning: bool = False) -> Subscriber:
        """Return the subscriber; a new one begins with what happens from now on, or `from_beginning` with all there is."""

        def work(connection: Connection) -> Subscriber:
            row = connection.execute(_FIND, {"subscriber": name}).first()
            if row is None:
                cursor = 0 if from_beginning else _head(connection)
                values = {"name": name, "cursor": cursor, "failures": 0, "due_at": 0, "reason": ""}
                connection.execute(insert(SUBSCRIBERS).inline(), values)
                row = connection.execute(_FIND, {"subscriber": name}).one()
            return _subscriber(row)

        known = next((subscriber for subscriber in self.all() if subscriber.name == name), None)
        return known or self._database.write(work)

    def all(self) -> list[Subscriber]:
        """Return every subscriber, by name."""
        with self._database.read() as connection:
            return [_subscriber(row) for row in connection.execute(_ALL)]

    def advance(self, subscriber: Subscriber, cursor: int, *, changes: int = 0) -> None:
        """Note that everything up to `cursor` was taken; with `changes` (how many) the audit trail keeps that they left the house.

        Raises
        ------
        LeaseLost
            Another sender has moved the cursor meanwhile: what it noted stays.
        """

        def work(connection: Connection) -> None:
            self._move(connection, subscriber, {"cursor": cursor, "failures": 0, "due_at": 0, "reason": ""})
            if changes:
                detail = {"after": subscriber.cursor, "up_to": cursor, "changes": changes}
                event = AuditEvent(action="webhook.delivered", outcome="success", actor=subscriber.name, subject="", detail=detail)
                self._audit.append(connection, event)

        self._database.write(work)

    def fail(self, subscriber: Subscriber, reason: str, *, after_s: float) -> None:
        """Note a failed attempt; the next one is due in `after_s` seconds.

        Raises
        ------
        LeaseLost
            As :meth:`advance`.
        """

        def work(connection: Connection) -> None:
            due = to_micros(self._database.clock() + timedelta(seconds=after_s))
            self._move(connection, subscriber, {"failures": subscriber.failures + 1, "due_at": due, "reason": reason})

        self._database.write(work)

    @staticmethod
    def _move(connection: Connection, subscriber: Subscriber, values: Mapping[str, Any]) -> None:
        held = (SUBSCRIBERS.c.name == subscriber.name) & (SUBSCRIBERS.c.cursor == subscriber.cursor)
        if connection.execute(update(SUBSCRIBERS).where(held).values(dict(values))).rowcount != 1:
            raise LeaseLost(f"another process sends to the subscriber {subscriber.name}")


def _subscriber(row: Row[Any]) -> Subscriber:
    return Subscriber(row.name, row.cursor, row.failures, from_micros(row.due_at), row.reason)
