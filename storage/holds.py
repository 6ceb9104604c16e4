"""Legal holds: studies that neither retention nor an operator may erase."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, Table, Text, bindparam, delete, insert, select

from storage.database import METADATA, from_micros, to_micros
from storage.records import AuditEvent

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database

HOLDS = Table(
    "holds",
    METADATA,
    Column("study_instance_uid", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("placed_by", Text, nullable=False),
    Column("placed_at", BigInteger, nullable=False),
)
_FIND = select(HOLDS).where(HOLDS.c.study_instance_uid == bindparam("uid"))


@dataclass(frozen=True, slots=True)
class Hold:
    """One study under hold."""

    study_instance_uid: str
    reason: str
    placed_by: str
    placed_at: datetime


class Holds:
    """Places and lifts holds; both are recorded in the audit trail, in the same transaction."""

    def __init__(self, *, database: Database, audit: AuditTrail) -> None:
        self._database = database
        self._audit = audit

    def place(self, study_instance_uid: str, *, reason: str, actor: str) -> bool:
        """Put a study under hold, whether or not it is here yet; False when it was already."""

        def work(connection: Connection) -> bool:
            if self.find_in(connection, study_instance_uid) is not None:
                return False
            values = {"study_instance_uid": study_instance_uid, "reason": reason, "placed_by": actor}
            connection.execute(insert(HOLDS).inline(), {**values, "placed_at": to_micros(self._database.clock())})
            self._record(connection, "hold.placed", study_instance_uid, reason, actor)
            return True

        return self._database.write(work)

    def lift(self, study_instance_uid: str, *, reason: str, actor: str) -> bool:
        """End the hold of a study; False when there was none."""

        def work(connection: Connection) -> bool:
            gone = connection.execute(delete(HOLDS).where(HOLDS.c.study_instance_uid == study_instance_uid)).rowcount
            if gone:
                self._record(connection, "hold.lifted", study_instance_uid, reason, actor)
            return bool(gone)

        return self._database.write(work)

    def find_in(self, connection: Connection, study_instance_uid: str) -> Hold | None:
        """Return the hold of a study, in the caller's transaction."""
        row = connection.execute(_FIND, {"uid": study_instance_uid}).first()
        return None if row is None else Hold(row.study_instance_uid, row.reason, row.placed_by, from_micros(row.placed_at))

    def all(self) -> list[Hold]:
        """Return every hold, oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(HOLDS).order_by(HOLDS.c.placed_at, HOLDS.c.study_instance_uid)).all()
        return [Hold(row.study_instance_uid, row.reason, row.placed_by, from_micros(row.placed_at)) for row in rows]

    def _record(self, connection: Connection, action: str, study_instance_uid: str, reason: str, actor: str) -> None:
        event = AuditEvent(action=action, outcome="success", actor=actor, subject=study_instance_uid, detail={"reason": reason})
        self._audit.append(connection, event)
