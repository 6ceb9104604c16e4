"""The audit trail: append-only, hash-chained, in the transaction of what it records.

Record n holds SHA-256 over (hash of record n - 1, canonical JSON of record n); the head row holds number and hash of the newest record.
:meth:`AuditTrail.verify` walks the chain and names the first record that was edited, deleted, inserted or moved, and a tail that was
cut off unless the head row was rewritten to match. (Who holds the database key can rewrite chain and head together; against that, write
the head's hash to a place of another owner from time to time: :meth:`AuditTrail.head`.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, Index, Integer, Row, Table, Text, bindparam, insert, select, update

from storage.database import METADATA, from_micros, storable, to_micros
from storage.errors import IntegrityError
from storage.prepared import Prepared
from storage.records import AuditEvent

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

AUDIT = Table(
    "audit",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("action", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("hash", Text, nullable=False),
)
Index("ix_audit_subject", AUDIT.c.subject)
AUDIT_HEAD = Table(
    "audit_head",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
)

GENESIS = "0" * 64
"""The hash before the first record."""

_PAGE = 1000
_detail = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_canonical = json.JSONEncoder(separators=(",", ":")).encode
_HEAD = select(AUDIT_HEAD.c.seq, AUDIT_HEAD.c.hash).where(AUDIT_HEAD.c.id == 1)
_LOCK_HEAD = Prepared(_HEAD.with_for_update())
_APPEND = Prepared(insert(AUDIT).inline())
_MOVE_HEAD = Prepared(update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(seq=bindparam("new_seq"), hash=bindparam("new_hash")))
_AFTER = select(AUDIT).where(AUDIT.c.seq > bindparam("after")).order_by(AUDIT.c.seq).limit(_PAGE)
_OF_SUBJECT = select(AUDIT).where(AUDIT.c.subject == bindparam("subject")).order_by(AUDIT.c.seq)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A recorded event: what, when, and its place in the chain."""

    seq: int
    at: datetime
    event: AuditEvent
    hash: str
    """Hexadecimal."""


@dataclass(frozen=True, slots=True)
class AuditFault:
    """The first place where the chain is broken."""

    seq: int
    """Number of the record that is wrong or missing."""
    reason: str


class AuditTrail:
    """Writes and proves the audit trail.

    Parameters
    ----------
    database
        Where the trail is kept; its clock gives the times.
    """

    def __init__(self, *, database: Database) -> None:
        self._database = database

    def append(self, connection: Connection, event: AuditEvent) -> int:
        """Record `event` in the caller's transaction and return its number.

        Raises
        ------
        TypeError
            ``detail`` cannot be written as JSON.
        IntegrityError
            The trail has lost its head.
        """
        detail = _detail(dict(event.detail))
        head = _LOCK_HEAD.first(connection, {})
        if head is None:
            raise IntegrityError("the head of the audit trail is missing: restore the database from its copy")
        before, previous = head
        values = {
            "seq": before + 1,
            "at": to_micros(self._database.clock()),
            # As they are stored: the hash is over what will be read again.
            "action": storable(event.action),
            "outcome": storable(event.outcome),
            "actor": storable(event.actor),
            "subject": storable(event.subject),
            "detail": detail,
        }
        values["hash"] = _chain(previous, values)
        _APPEND.run(connection, values)
        _MOVE_HEAD.run(connection, {"new_seq": values["seq"], "new_hash": values["hash"]})
        return int(values["seq"])

    def record(self, event: AuditEvent) -> int:
        """Record `event` in a transaction of its own; durable on return.

        Raises
        ------
        Unavailable
            The event is not recorded: what it is about must not happen.
        """
        return self._database.write(lambda connection: self.append(connection, event))

    def events_of(self, subject: str) -> list[AuditEntry]:
        """Return what was recorded about `subject` (a SOP or Study Instance UID), oldest first."""
        with self._database.read() as connection:
            return [entry_of(row) for row in connection.execute(_OF_SUBJECT, {"subject": subject})]

    def entries(self) -> Iterator[AuditEntry]:
        """Give every record, oldest first, page by page."""
        after = 0
        while True:
            with self._database.read() as connection:
                rows = connection.execute(_AFTER, {"after": after}).all()
            if not rows:
                return
            yield from map(entry_of, rows)
            after = rows[-1].seq

    def head(self) -> tuple[int, str]:
        """Return number and hash of the newest record; (0, GENESIS) for an empty trail."""
        with self._database.read() as connection:
            row = connection.execute(_HEAD).one()
        return row.seq, row.hash

    def verify(self) -> AuditFault | None:
        """Walk the whole chain on one snapshot and return the first fault, None when there is none."""
        seq, previous = 0, GENESIS
        with self._database.read() as connection:
            head = connection.execute(_HEAD).first()
            while True:
                rows = connection.execute(_AFTER, {"after": seq}).all()
                if not rows:
                    break
                for row in rows:
                    if row.seq != seq + 1:
                        return AuditFault(seq + 1, f"record {seq + 1} is missing: the next one is {row.seq}")
                    if _chain(previous, row._mapping) != row.hash:  # noqa: SLF001 - SQLAlchemy's public accessor
                        return AuditFault(row.seq, f"record {row.seq} is not what was recorded, or what stood before it was changed")
                    seq, previous = row.seq, row.hash
        if head is None:
            return AuditFault(seq, "the head of the chain is missing")
        if head.seq > seq:
            return AuditFault(seq + 1, f"records {seq + 1} to {head.seq} are missing at the end")
        if head.seq < seq or head.hash != previous:
            return AuditFault(seq, f"the head of the chain does not name record {seq}: records were added past it, or it was changed")
        return None


def canonical(values: Mapping[Any, Any]) -> str:
    """Return the text of a record that its hash is made of; ASCII. ``detail`` enters as the text that is stored."""
    return _canonical([values[name] for name in ("seq", "at", "action", "outcome", "actor", "subject", "detail")])


def _chain(previous: str, values: Mapping[Any, Any]) -> str:
    return hashlib.sha256(bytes.fromhex(previous) + canonical(values).encode("ascii")).hexdigest()


def entry_of(row: Row[Any]) -> AuditEntry:
    """Return the record that a row of `AUDIT` keeps."""
    return AuditEntry(
        row.seq,
        from_micros(row.at),
        AuditEvent(row.action, row.outcome, row.actor, row.subject, json.loads(row.detail)),
        row.hash,
    )
