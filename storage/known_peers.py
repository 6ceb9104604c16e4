"""Peers that were added while the node runs, beside those of the configuration.

What the settings of a peer mean is the node's business (`dicom_node.peers`); here they are a JSON object under a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, Row, Table, Text, bindparam, delete, func, insert, select, update

from storage.database import METADATA, from_micros, to_micros
from storage.records import AuditEvent, JobKind, JobState
from storage.work import JOBS

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database

KNOWN_PEERS = Table(
    "peers",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("settings", Text, nullable=False),
    Column("added_at", BigInteger, nullable=False),
    Column("added_by", Text, nullable=False),
)
_ALL = select(KNOWN_PEERS).order_by(KNOWN_PEERS.c.added_at, KNOWN_PEERS.c.name)
_HURRY = (
    update(JOBS)
    .where(JOBS.c.kind == JobKind.DELIVER.value, JOBS.c.lane == bindparam("peer"), JOBS.c.state == JobState.READY.value)
    .values(due_at=bindparam("now"))
)
"""What waits for a peer that was not there is tried at once."""
_WAITING = select(func.count()).where(
    JOBS.c.kind == JobKind.DELIVER.value,
    JOBS.c.lane == bindparam("lane"),
    JOBS.c.state.in_((JobState.READY.value, JobState.CLAIMED.value)),
)


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """A peer as it was added."""

    name: str
    settings: Mapping[str, Any]
    added_at: datetime
    added_by: str


class KnownPeers:
    """The table of added peers; each change is recorded in the audit trail, in the same transaction.

    Parameters
    ----------
    database, audit
        Where they are kept.
    """

    def __init__(self, *, database: Database, audit: AuditTrail) -> None:
        self._database = database
        self._audit = audit

    def all(self) -> list[KnownPeer]:
        """Return every added peer, in the order in which they came.

        Raises
        ------
        Unavailable, IntegrityError
            As ``Database.read``.
        """
        with self._database.read() as connection:
            return _all(connection)

    def add(self, name: str, settings: Mapping[str, Any], *, actor: str, check: Callable[[Sequence[KnownPeer]], None]) -> None:
        """Add a peer.

        Parameters
        ----------
        settings
            Written as JSON, and into the audit trail: no secrets.
        check
            Called in the transaction with those that are there; what it raises keeps the peer out.

        Raises
        ------
        Unavailable, IntegrityError
            As ``Database.write``.
        """

        def work(connection: Connection) -> None:
            moment = to_micros(self._database.clock())
            self._audit.append(connection, AuditEvent("peer.added", "success", actor, detail={"peer": name, **settings}))
            check(_all(connection))  # behind the audit trail's lock, which orders those who add at the same time
            text = json.dumps(dict(settings), sort_keys=True)
            connection.execute(insert(KNOWN_PEERS).inline(), {"name": name, "settings": text, "added_at": moment, "added_by": actor})
            connection.execute(_HURRY, {"peer": name, "now": moment})

        self._database.write(work)

    def remove(self, name: str, *, actor: str) -> bool:
        """Remove a peer; False when none of that name was added."""

        def work(connection: Connection) -> bool:
            if not connection.execute(delete(KNOWN_PEERS).where(KNOWN_PEERS.c.name == name)).rowcount:
                return False
            self._audit.append(connection, AuditEvent("peer.removed", "success", actor, detail={"peer": name}))
            return True

        return self._database.write(work)

    def waiting(self, name: str) -> int:
        """Return how many reports wait to be delivered to a peer."""
        with self._database.read() as connection:
            return int(connection.execute(_WAITING, {"lane": name}).scalar_one())


def _all(connection: Connection) -> list[KnownPeer]:
    return [_known(row) for row in connection.execute(_ALL)]


def _known(row: Row[Any]) -> KnownPeer:
    return KnownPeer(row.name, json.loads(row.settings), from_micros(row.added_at), row.added_by)
