"""The nodes that share one database: who they are, and when each was seen last.

A node is a data folder: its identity is made once and kept there. A copied folder would be a second node of the same identity, and
two nodes would believe that the same landed objects lie on their disk; the register refuses the second. Neither host name nor path tell
the two apart, a cloned machine has both: an `Incarnation` does, which is made anew whenever nobody held the folder's lock. Where it is not
proven that the last one ended, it is watched for a while whether it goes on saying that it lives; clocks, of which one may be wrong, are
not asked.

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
    Column("incarnation", Text),
    Column("clock_ahead", BigInteger),
)
_STOPPED: Final = 0
"""In the place of the time when a node was seen last: it stopped in order."""
_LOST: Final = -1
"""The same: it was declared lost."""
_FIND = select(NODES).where(NODES.c.node_id == bindparam("node")).with_for_update()
_SERVER_TIME = select(func.clock_timestamp())
_BRINGING = JOBS.c.kind == JobKind.ARCHIVE.value
_LYING = select(JOBS.c.home, func.count()).where(_BRINGING, JOBS.c.home != "", JOBS.c.due_at.is_not(None)).group_by(JOBS.c.home)
# of those that ended so, what was sent again since lies elsewhere
_GONE = (
    select(JOBS.c.home, func.count(JOBS.c.sop_instance_uid.distinct()))
    .select_from(JOBS.join(INSTANCES, INSTANCES.c.sop_instance_uid == JOBS.c.sop_instance_uid))
    .where(_BRINGING, LOST, JOBS.c.due_at.is_(None), INSTANCES.c.landed_on == JOBS.c.home)
    .group_by(JOBS.c.home)
)

SEEN_EVERY_S = 5.0
"""How often a node says that it lives."""
_WATCH_S: Final = 20.0
"""A node that says nothing for so long is not there."""
_LOOK_EVERY_S: Final = 5.0
_MINUTE: Final = timedelta(minutes=1)
QUIET: Final = timedelta(minutes=5)
"""A node that was seen so lately is not declared lost: it may be starting again."""


CLOCK_OFF: Final = timedelta(seconds=3)
"""A clock that is further than this from the database server's makes leases and duties end too early or too late."""


class Replaced(StorageError):
    """Another incarnation of this node was registered: who finds that must take nothing in any more, and end."""


@dataclass(frozen=True, slots=True)
class Incarnation:
    """The processes that hold the lock of one data folder together, from the first that took it to the last that lets it go."""

    id: str
    """Random."""
    ended: frozenset[str] = frozenset()
    """Those that held the very same lock on this machine since it was booted: they have ended, since it was free."""
    earlier: frozenset[str] = frozenset()
    """All that this folder knows to have been before; of a copied one, what the other folder's were up to then."""


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
    clock_ahead: timedelta = timedelta()
    """How far its clock was ahead of the database server's when it was seen last; zero where they are the same."""


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
    shared
        Other nodes may be in it. One that lies in the data folder is the node's own: who holds the folder's lock is the node.
    wait
        Waits so many seconds.
    """

    def __init__(self, *, database: Database, shared: bool = True, wait: Callable[[float], object] = time.sleep) -> None:
        self._database = database
        self._shared = shared
        self._audit = AuditTrail(database=database)
        self._wait = wait

    def enter(self, *, node_id: str, incarnation: Incarnation, host: str, data_dir: str, version: str) -> None:
        """Register a node that starts, or one more process of it. Another incarnation that may live yet is watched for 20 seconds before.

        Raises
        ------
        Unavailable
            A node of this identity lives elsewhere: its data folder was copied, or is mounted twice. Or a reindex is under way: a
            sweep beside it would take reports that are not linked yet for work undone.
        """
        values = {"host": host, "data_dir": data_dir, "version": version}
        enter = partial(self._enter_in, node_id=node_id, incarnation=incarnation, values=values)
        elsewhere = self._database.write(partial(enter, silent_since=None))
        if elsewhere is None:
            return
        silent_since = None if self._lives(elsewhere) else elsewhere
        # it may also have been another process of this incarnation that entered meanwhile
        elsewhere = self._database.write(partial(enter, silent_since=silent_since))
        if elsewhere is not None:
            raise Unavailable(
                f"node {node_id} lives on {elsewhere.host} in {elsewhere.data_dir}: this data folder is a copy of that one, or the same "
                "folder mounted on two machines; stop one of them, or give this node an empty folder (with a copy of the ring), or, if "
                "nothing lies in `landed` of this one, remove its file `node_id`: it becomes another node then"
            )

    def _enter_in(
        self, connection: Connection, *, node_id: str, incarnation: Incarnation, values: dict[str, Any], silent_since: Row[Any] | None
    ) -> Row[Any] | None:
        """Register it, unless the one that the row tells of may live elsewhere: that row is returned."""
        if inspect(connection).has_table(HEARD.name):
            raise Unavailable("the database is being filled by `dicom-node reindex`: let it end, or run it again if it was killed")
        row = connection.execute(_FIND, {"node": node_id}).first()
        if row is not None and self._may_live(row, incarnation, values) and row != silent_since:
            return row
        values = {**values, "incarnation": incarnation.id, "started_at": to_micros(self._database.clock())}
        self._present_in(connection, node_id, row, values)
        return None

    def _may_live(self, row: Row[Any], incarnation: Incarnation, values: dict[str, Any]) -> bool:
        """Whether another incarnation than this may live, for all that the row says."""
        if not self._shared or row.seen_at in (_STOPPED, _LOST):
            return False
        if row.incarnation is None:  # a version that had none yet was killed
            return (row.host, row.data_dir) != (values["host"], values["data_dir"])
        return row.incarnation != incarnation.id and row.incarnation not in incarnation.ended

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

    def seen(self, *, node_id: str, incarnation: Incarnation, host: str, data_dir: str, version: str) -> timedelta:
        """Note that the node lives; in a database that was restored meanwhile it is registered again.

        Returns
        -------
        timedelta
            How far this machine's clock is ahead of the database server's.

        Raises
        ------
        Replaced
            Another incarnation of this node was registered since.
        """

        def work(connection: Connection) -> timedelta:
            row = connection.execute(_FIND, {"node": node_id}).first()
            values = {"host": host, "data_dir": data_dir, "version": version, "started_at": to_micros(self._database.clock())}
            # an earlier one of ours is there when the database was put back to before we came
            if self._shared and row is not None and row.incarnation not in (None, incarnation.id, *incarnation.earlier):
                raise Replaced(
                    f"node {node_id} was started on {row.host} in {row.data_dir} while this process could not say that it lives: one of "
                    "the two data folders is a copy of the other; this process takes nothing more and ends. Keep that one of them whose "
                    "folder `landed` is to be used, and give the other an empty data folder"
                )
            ahead = clock_ahead(connection, self._database.clock)
            told = {"incarnation": incarnation.id, "clock_ahead": ahead}
            self._present_in(connection, node_id, row, told if row is not None else values | told)
            return timedelta(microseconds=ahead)

        return self._database.write(work)

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

    def leave(self, node_id: str, incarnation: Incarnation) -> None:
        """Note that the node stopped in order: another may take its folder at once. Nothing changes where another incarnation is there."""
        ours = (NODES.c.node_id == node_id, NODES.c.incarnation == incarnation.id)
        stopped = update(NODES).where(*ours, NODES.c.seen_at != _LOST).values(seen_at=_STOPPED)
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


def clock_ahead(connection: Connection, clock: Callable[[], datetime]) -> int:
    """Return by how many microseconds `clock` is ahead of the database server's; 0 where it has none of its own, or none can tell."""
    if connection.dialect.name != "postgresql":
        return 0
    before = clock()
    server = connection.execute(_SERVER_TIME).scalar_one()
    after = clock()
    # it was read somewhere in between
    return 0 if before <= server <= after else to_micros(before if server < before else after) - to_micros(server)


def clock_words(ahead: timedelta) -> str:
    """Return a sentence about a clock that is so far from the database server's."""
    seconds = ahead.total_seconds()
    return (
        f"this machine's clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the database server's: leases of jobs and "
        "duties end too early or too late by that; let NTP set both"
    )


def _node(row: Row[Any]) -> Node:
    state: Literal["seen", "stopped", "lost"] = "lost" if row.seen_at == _LOST else "stopped" if row.seen_at == _STOPPED else "seen"
    ahead = timedelta(microseconds=row.clock_ahead or 0)
    return Node(row.node_id, row.host, row.data_dir, row.version, from_micros(row.started_at), from_micros(row.seen_at), state, ahead)
