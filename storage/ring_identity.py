"""Which ring a database belongs to: said in the audit trail when a node first starts on it, and compared at every start.

The embedded database opens with its own ring alone. On PostgreSQL two rings would work side by side until each met what the other wrapped,
and the instances of one would be unreadable to whoever keeps a copy of the other.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, select

from storage.audit import AUDIT, entry_of
from storage.errors import Unavailable
from storage.records import AuditEvent

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.keys import Ring

SUBJECT: Final = "key ring"
"""Of the audit records about the ring."""
BOUND: Final = "keys.bound"
_OF_RING = select(AUDIT).where(AUDIT.c.subject == bindparam("subject"), AUDIT.c.action == bindparam("action")).order_by(AUDIT.c.seq)


def fingerprint(ring: Ring) -> str:
    """Return what tells a ring from every other: the same for all its copies, whatever keys are added, and nothing that opens anything."""
    return hashlib.sha256(ring.derive("ring identity")).hexdigest()[:32]


class RingIdentity:
    """Compares ring and database.

    Parameters
    ----------
    database, audit, ring
        Of this node.
    """

    def __init__(self, *, database: Database, audit: AuditTrail, ring: Ring) -> None:
        self._database = database
        self._audit = audit
        self._ring = ring

    def fault(self) -> str:
        """Return what is wrong when the database belongs to another ring; empty when all is right, or it belongs to none yet.

        Raises
        ------
        Unavailable, IntegrityError
            As `Database.read`.
        """
        with self._database.read() as connection:
            return self._fault_in(connection)

    def bind(self) -> None:
        """Say that the database belongs to this ring, unless that was said before. Of two that start at once one is second.

        Raises
        ------
        Unavailable
            It belongs to another ring; or the database cannot be written now.
        """

        def work(connection: Connection) -> None:
            if fault := self._fault_in(connection):
                raise Unavailable(fault)
            if self._bound_in(connection) is None:
                detail = {"ring": fingerprint(self._ring), "keys": [key.key_id for key in self._ring.keys()]}  # noqa: SIM118 - no mapping
                self._audit.append(connection, AuditEvent(BOUND, "success", "node", SUBJECT, detail))

        self._database.write(work)

    def _fault_in(self, connection: Connection) -> str:
        bound = self._bound_in(connection)
        if bound is None or bound == fingerprint(self._ring):
            return ""
        return (
            f"{self._ring.path}: the database belongs to another ring (its fingerprint is {bound}, that of this one "
            f"{fingerprint(self._ring)}); copy the ring of the nodes that share it here, then start again"
        )

    def _bound_in(self, connection: Connection) -> str | None:
        row = connection.execute(_OF_RING, {"subject": SUBJECT, "action": BOUND}).first()
        return None if row is None else str(entry_of(row).event.detail.get("ring", ""))
