"""The nodes that share one database: who they are, and when each was seen last.

A node is a data folder: its identity is made once and kept there. A copied folder would be a second node of the same identity, and
two nodes would believe that the same landed objects lie on their disk; the register refuses the second. Whether the first still lives is
not asked of clocks, of which one may be wrong: it is watched for a while whether it goes on saying so.

A node that never comes back is declared lost (`storage.loss`). If it comes back all the same, what waited for it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import BigInteger, Column, Row, Table, Text, bindparam, func, insert, inspect, select, update

from storage.audit import AuditTrail
from storage.database import METADATA, from_micros, to_micros
from storage.errors import StorageError, Unavailable
from storage.records import AuditEvent, JobKind
from storage.reindex import HEARD
from storage.tables import INSTANCES
from storage.work import JOBS, LOST, found_in, was_lost_in

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
_STOPPED: Final = 0
"""In the place of the time when a node was seen last: it stopped in order."""
_LOST: Final = -1
"""The same: it was declared lost."""
_FIND = select(NODES).where(NODES.c.node_id == bindparam("node")).with_for_update()
_BRINGING = JOBS.c.kind == JobKind.ARCHIVE.value
_LYING = select(JOBS.c.home, func.count()).where(_BRINGING, JOBS.c.home != "", JOBS.c.due_at.is_not(None)).group_by(JOBS.c.home)
# of those that ended so, what was sent again since lies elsewhere
_GONE = (
    select(JOBS.c.home, func.count(JOBS.c.sop_instance_uid.distinct()))
    .select_from(JOBS.join(INSTANCES, INSTANCES.c.sop_instance_uid == JOBS.c.sop_instance_uid))
    .where(_BRINGING, LOST, JOBS.c.due_at.is_(None), INSTANCES.c.landed_on == JOBS.c.home)
    .group_by(JOBS.c.home)
)

SEEN_EVERY_S = 15.0
"""How often a node says that it lives."""
_WATCH_S: Final = 45.0
"""A node that says nothing for so long is not there."""
_LOOK_EVERY_S: Final = 5.0
_MINUTE: Final = timedelta(minutes=1)
QUIET: Final = timedelta(minutes=5)
"""A node that was seen so lately is not declared lost: it may be starting again."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the register knows it."""

    node_id: str
    host: str
    data_dir: str
    version: str
    started_at: datetime
    seen_at: datetime
    """When it said last that it lives; meaningless unless `state` is seen."""
    state: Literal["seen", "stopped", "lost"] = "seen"


@dataclass(frozen=True, slots=True)
class Lying:
    """What lies on the disk of one node alone."""

    waiting: int = 0
    """Objects that it has to bring into the store yet."""
    lost: int = 0
    """Instances that were lost with it, and were not sent again."""


class Nodes:
    """The register.

    Parameters
    ----------
    database
        Where it is kept; its clock says when a node was seen.
    wait
        Waits so many seconds.
    """

    def __init__(self, *, database: Database, wait: Callable[[float], object] = time.sleep) -> None:
        self._database = database
        self._audit = AuditTrail(database=database)
        self._wait = wait

    def enter(self, *, node_id: str, host: str, data_dir: str, version: str) -> None:
        """Register a node that starts. One that was elsewhere, and did not stop in order, is watched for 45 seconds before.

        Raises
        ------
        Unavailable
            A node of this identity lives elsewhere: its data folder was copied, or is mounted twice. Or a reindex is under way: a
            sweep beside it would take reports that are not linked yet for work undone.
        """
        values = {"host": host, "data_dir": data_dir, "version": version}
        elsewhere = self._database.write(partial(self._enter_in, node_id=node_id, values=values, silent_since=None))
        if elsewhere is None:
            return
        if not self._lives(elsewhere):
            elsewhere = self._database.write(partial(self._enter_in, node_id=node_id, values=values, silent_since=elsewhere))
        if elsewhere is not None:
            raise Unavailable(
                f"node {node_id} lives on {elsewhere.host} in {elsewhere.data_dir}: this data folder is a copy of that one, or the same "
                "folder mounted twice; stop one of them, or give this node an empty folder"
            )

    def _enter_in(self, connection: Connection, *, node_id: str, values: dict[str, Any], silent_since: Row[Any] | None) -> Row[Any] | None:
        """Register it, unless the one that the row tells of may live elsewhere: that row is returned."""
        if inspect(connection).has_table(HEARD.name):
            raise Unavailable("the database is being filled by `dicom-node reindex`: let it end, or run it again if it was killed")
        row = connection.execute(_FIND, {"node": node_id}).first()
        here = row is None or row.seen_at in (_STOPPED, _LOST) or (row.host, row.data_dir) == (values["host"], values["data_dir"])
        if not here and row != silent_since:
            return row
        self._present_in(connection, node_id, row, {**values, "started_at": to_micros(self._database.clock())})
        return None

    def _lives(self, row: Row[Any]) -> bool:
        """Watch whether a node goes on saying that it lives."""
        for _ in range(int(_WATCH_S / _LOOK_EVERY_S)):
            self._wait(_LOOK_EVERY_S)
            with self._database.read() as connection:
                if connection.execute(select(NODES).where(NODES.c.node_id == row.node_id)).first() != row:
                    return True
        return False

    def living(self) -> list[Node]:
        """Return the nodes that live: seen in the last minute, or, where the time is ahead of ours, seen to go on saying so."""
        now = self._database.clock()
        with self._database.read() as connection:
            rows = connection.execute(select(NODES).where(NODES.c.seen_at > to_micros(now - _MINUTE)).order_by(NODES.c.node_id)).all()
        return [_node(row) for row in rows if from_micros(row.seen_at) <= now + _MINUTE or self._lives(row)]

    def seen(self, *, node_id: str, host: str, data_dir: str, version: str) -> None:
        """Note that the node lives; in a database that was restored meanwhile it is registered again."""

        def work(connection: Connection) -> None:
            row = connection.execute(_FIND, {"node": node_id}).first()
            values = {"host": host, "data_dir": data_dir, "version": version, "started_at": to_micros(self._database.clock())}
            self._present_in(connection, node_id, row, values if row is None else {})

        self._database.write(work)

    def _present_in(self, connection: Connection, node_id: str, row: Row[Any] | None, values: dict[str, Any]) -> None:
        """Note that the node is here now; if it had been declared lost, what waited for it goes on."""
        now = self._database.clock()
        values = {**values, "seen_at": to_micros(now)}
        if row is None:
            connection.execute(insert(NODES).inline(), {"node_id": node_id, **values})
            return
        connection.execute(update(NODES).where(NODES.c.node_id == node_id).values(values))
        if row.seen_at == _LOST:
            jobs = found_in(connection, node_id, at=now)
            event = AuditEvent(action="node.returned", outcome="success", actor="node", detail={"node": node_id, "jobs": jobs})
            self._audit.append(connection, event)

    def leave(self, node_id: str) -> None:
        """Note that the node stopped in order: another may take its folder at once."""
        stopped = update(NODES).where(NODES.c.node_id == node_id, NODES.c.seen_at != _LOST).values(seen_at=_STOPPED)
        self._database.write(lambda connection: connection.execute(stopped))

    def give_up(self, node_id: str, *, actor: str) -> None:
        """Declare that a node, and what lay on its disk alone, is lost; again changes nothing. `storage.loss` draws the consequences.

        Raises
        ------
        StorageError
            No node of this identity was ever registered.
        Unavailable
            It lives, or was seen in the last minutes.
        """
        with self._database.read() as connection:
            row = connection.execute(select(NODES).where(NODES.c.node_id == node_id)).first()
        if row is None:
            raise StorageError(f"no node {node_id} is registered; `dicom-node nodes` shows those that are")
        if row.seen_at not in (_STOPPED, _LOST):
            silent = self._database.clock() - from_micros(row.seen_at)
            if timedelta() <= silent < QUIET:
                raise Unavailable(f"node {node_id} was seen {silent.seconds} seconds ago: stop it, wait five minutes, then declare it lost")
            if self._lives(row):  # a clock that was wrong, here or there, must not decide
                raise Unavailable(f"node {node_id} says that it lives: stop it first")

        def work(connection: Connection) -> None:
            found = connection.execute(_FIND, {"node": node_id}).first()
            if found != row:
                raise Unavailable(f"node {node_id} came back meanwhile")
            if row.seen_at != _LOST:
                connection.execute(update(NODES).where(NODES.c.node_id == node_id).values(seen_at=_LOST))
                detail = {"node": node_id, "host": row.host}
                self._audit.append(connection, AuditEvent(action="node.lost", outcome="success", actor=actor, detail=detail))

        self._database.write(work)

    def require_lost_in(self, connection: Connection, node_id: str) -> None:
        """Raise Unavailable when a node that was declared lost came back; it cannot before the end of this transaction."""
        row = connection.execute(_FIND, {"node": node_id}).first()
        if row is None or row.seen_at != _LOST:
            raise Unavailable(f"node {node_id} came back: what lies on its disk is not lost")

    def lying(self) -> dict[str, Lying]:
        """Return by node what lies on its disk alone; nodes with nothing are not in it."""
        with self._database.read() as connection:
            waiting, lost = ({row[0]: row[1] for row in connection.execute(statement)} for statement in (_LYING, _GONE))
        return {node: Lying(waiting.get(node, 0), lost.get(node, 0)) for node in sorted({*waiting, *lost})}

    def all(self) -> list[Node]:
        """Return every node, the one seen last first."""
        with self._database.read() as connection:
            return [_node(row) for row in connection.execute(select(NODES).order_by(NODES.c.seen_at.desc(), NODES.c.node_id))]


def lost_with(database: Database, node_id: str, sop_instance_uid: str) -> bool:
    """Tell whether an instance that its row says lies on the disk of a node alone was lost with it.

    Raises
    ------
    Unavailable
        The database cannot be read now.
    """
    with database.read() as connection:
        return was_lost_in(connection, sop_instance_uid, home=node_id)


def _node(row: Row[Any]) -> Node:
    state: Literal["seen", "stopped", "lost"] = "lost" if row.seen_at == _LOST else "stopped" if row.seen_at == _STOPPED else "seen"
    return Node(row.node_id, row.host, row.data_dir, row.version, from_micros(row.started_at), from_micros(row.seen_at), state)
