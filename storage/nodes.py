"""The nodes that share one database: who they are, and when each was seen last.

A node is a data folder: its identity is made once and kept there. A copied folder would be a second node of the same identity, and
two nodes would believe that the same landed objects lie on their disk; the register refuses the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, Row, Table, Text, bindparam, insert, inspect, select, update

from storage.database import METADATA, from_micros, to_micros
from storage.errors import Unavailable
from storage.reindex import HEARD

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.database import Database

NODES = Table(
    "nodes",
    METADATA,
    Column("node_id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("data_dir", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
)
_FIND = select(NODES).where(NODES.c.node_id == bindparam("node")).with_for_update()

SEEN_EVERY_S = 15.0
"""How often a node says that it lives."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the register knows it."""

    node_id: str
    host: str
    data_dir: str
    version: str
    started_at: datetime
    seen_at: datetime


class Nodes:
    """The register."""

    def __init__(self, *, database: Database) -> None:
        self._database = database

    def enter(self, *, node_id: str, host: str, data_dir: str, version: str) -> None:
        """Register a node that starts.

        Raises
        ------
        Unavailable
            A node of this identity lives elsewhere: its data folder was copied, or is mounted twice. Or a reindex is under way: a
            sweep beside it would take reports that are not linked yet for work undone.
        """

        def work(connection: Connection) -> None:
            if inspect(connection).has_table(HEARD.name):
                raise Unavailable("the database is being filled by `dicom-node reindex`: let it end, or run it again if it was killed")
            now = self._database.clock()
            values = {"host": host, "data_dir": data_dir, "version": version, "started_at": to_micros(now), "seen_at": to_micros(now)}
            row = connection.execute(_FIND, {"node": node_id}).first()
            if row is None:
                connection.execute(insert(NODES).inline(), {"node_id": node_id, **values})
                return
            living = from_micros(row.seen_at) > now - timedelta(seconds=4 * SEEN_EVERY_S)
            if living and (row.host, row.data_dir) != (host, data_dir):
                raise Unavailable(
                    f"node {node_id} lives on {row.host} in {row.data_dir}: this data folder is a copy of that one, or the same folder "
                    "mounted twice; stop one of them, or give this node an empty folder (after a move: start again in a minute)"
                )
            connection.execute(update(NODES).where(NODES.c.node_id == node_id).values(values))

        self._database.write(work)

    def seen(self, *, node_id: str, host: str, data_dir: str, version: str) -> None:
        """Note that the node lives; in a database that was restored meanwhile it is registered again."""

        def work(connection: Connection) -> None:
            moment = to_micros(self._database.clock())
            if not connection.execute(update(NODES).where(NODES.c.node_id == node_id).values(seen_at=moment)).rowcount:
                values = {"host": host, "data_dir": data_dir, "version": version, "started_at": moment, "seen_at": moment}
                connection.execute(insert(NODES).inline(), {"node_id": node_id, **values})

        self._database.write(work)

    def leave(self, node_id: str) -> None:
        """Note that the node stopped in order: another may take its folder at once."""
        self._database.write(lambda connection: connection.execute(update(NODES).where(NODES.c.node_id == node_id).values(seen_at=0)))

    def all(self) -> list[Node]:
        """Return every node, the one seen last first."""
        with self._database.read() as connection:
            return [_node(row) for row in connection.execute(select(NODES).order_by(NODES.c.seen_at.desc(), NODES.c.node_id))]


def _node(row: Row[Any]) -> Node:
    return Node(row.node_id, row.host, row.data_dir, row.version, from_micros(row.started_at), from_micros(row.seen_at))
