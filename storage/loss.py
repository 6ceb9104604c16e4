"""The loss of a node: what lay on its disk alone comes to a declared end.

With policy ``land`` an instance is acknowledged when it lies on one node's disk. When that node never returns, its rows would name it for
ever and its jobs would wait for it for ever. Declared lost, each of its objects is looked for in the store (it was brought, and the node
died before it could say so) and in the spool of the node that asks (what could be saved from the disk):

===============================  ===================================================================================================
found                            the row says where it lies; whoever can read it does its work
an instance is gone              ``instance.lost`` in the audit trail; its jobs are dead until it is sent again, which takes its place
a report is gone                 ``report.lost``; its row goes, and the analysis that made it runs again, to the same UID
it was in quarantine, and gone   ``quarantine.lost``; its row goes, so that it is kept aside again when it is sent again
===============================  ===================================================================================================

It may be killed at any moment and run again. If the node comes back all the same, what is left of its work goes on (`Nodes.enter`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from sqlalchemy import bindparam, delete, select, update

from storage.admission import event_of
from storage.errors import ColdObject, InstanceNotFound, IntegrityError, StorageError
from storage.places import digest_of
from storage.records import JobKind, JobState, NewJob
from storage.removal import remove_in, remove_quarantined_in
from storage.tables import INSTANCES, QUARANTINE, REPORTS
from storage.work import JOBS, LOST

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.index import Index
    from storage.nodes import Nodes
    from storage.places import Places
    from storage.records import InstanceRecord
    from storage.work import WorkQueue

_PAGE: Final = 100
_AT_ONCE: Final = 8
_LIVE_AT = (
    select(JOBS.c.id, JOBS.c.kind, JOBS.c.sop_instance_uid)
    .where(JOBS.c.home == bindparam("node"), JOBS.c.due_at.is_not(None), JOBS.c.id > bindparam("after"))
    .order_by(JOBS.c.id)
    .limit(_PAGE)
)
_UNDELIVERED = delete(JOBS).where(
    JOBS.c.sop_instance_uid == bindparam("uid"), JOBS.c.kind == JobKind.DELIVER.value, JOBS.c.state != JobState.DONE.value
)
_SOURCE = select(REPORTS.c.source_sop_instance_uid).where(REPORTS.c.sop_instance_uid == bindparam("uid"))


@dataclass(slots=True)
class Losses:
    """What became of the objects of a lost node."""

    found: int = 0
    """In the store, or in the spool of the node that asked."""
    lost: int = 0
    """Instances that are nowhere: to be sent again."""
    reports: int = 0
    """Of ours, nowhere: made again where their source can be read."""
    quarantined: int = 0
    """Kept aside, and nowhere."""

    def __str__(self) -> str:
        """Say it for people."""
        return ", ".join(f"{getattr(self, field.name)} {field.name}" for field in fields(self))


@dataclass(frozen=True, slots=True)
class _Landed:
    """An object that the index says lies on the lost node, and where it was found."""

    row_id: int
    quarantined: bool
    record: InstanceRecord
    place: str | None
    """Empty: in the store; a node's identity: in its spool; None: nowhere."""


class Loss:
    """Declares nodes lost.

    Parameters
    ----------
    database, index, queue, audit, places, nodes
        The parts it ties together; `places` are those of the node that asks.
    """

    def __init__(self, *, database: Database, index: Index, queue: WorkQueue, audit: AuditTrail, places: Places, nodes: Nodes) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._places = places
        self._nodes = nodes

    def declare(self, node_id: str, *, actor: str, progress: Callable[[int, int | None], object] = lambda _, __: None) -> Losses:
        """Declare a node lost, and bring everything that waits for it to an end.

        Parameters
        ----------
        progress
            Called with the number of objects done, and None.

        Raises
        ------
        StorageError
            It is the node that asks, or none of that identity was ever registered.
        Unavailable
            The node lives, or was seen in the last minutes; or store or database cannot be asked now: run it again.
        """
        if node_id == self._places.node_id:
            raise StorageError(f"node {node_id} is this one, and its disk is here: run `dicom-node serve --role mover`")
        self._nodes.give_up(node_id, actor=actor)
        losses, done = Losses(), 0
        with ThreadPoolExecutor(_AT_ONCE, "loss") as pool:
            for quarantined in (False, True):
                after = 0
                while rows := self._landed(node_id, after, quarantined=quarantined):
                    after = rows[-1][0]
                    looked = [one for one in pool.map(partial(self._look, quarantined=quarantined), rows) if one is not None]
                    self._database.write(partial(self._settle_in, node_id=node_id, landed=looked, losses=losses))
                    done += len(rows)
                    progress(done, None)
        after = 0
        while (last := self._database.write(partial(self._jobs_in, node_id=node_id, after=after))) is not None:
            after = last
        return losses

    # -- objects -----------------------------------------------------------------------------------------------------------------

    def _landed(self, node_id: str, after: int, *, quarantined: bool) -> Sequence[tuple[int, str]]:
        table = QUARANTINE if quarantined else INSTANCES
        statement = select(table.c.id, table.c.object_key).where(table.c.landed_on == node_id, table.c.id > after)
        with self._database.read() as connection:
            return [(row.id, row.object_key) for row in connection.execute(statement.order_by(table.c.id).limit(_PAGE))]

    def _look(self, row: tuple[int, str], *, quarantined: bool) -> _Landed | None:
        """Look where an object is, if not on the disk of the lost node; None when no row names it any more."""
        row_id, object_key = row
        record = self._index.record_of_object(object_key)
        return None if record is None else _Landed(row_id, quarantined, record, self._place_of(record))

    def _place_of(self, record: InstanceRecord) -> str | None:
        try:
            self._places.require_whole(replace(record, landed_on=""), thaw=False)
        except ColdObject:
            return ""
        except (InstanceNotFound, IntegrityError):
            pass
        else:
            return ""
        return self._places.node_id if self._in_spool(record) else None

    def _in_spool(self, record: InstanceRecord) -> bool:
        if self._places.spool is None:
            return False
        try:
            reader = self._places.spool.open(record.sealed.object_key)
        except InstanceNotFound:
            return False
        try:
            return reader.size == record.sealed.byte_count and digest_of(reader) == record.sealed.sha256
        finally:
            reader.close()

    def _settle_in(self, connection: Connection, *, node_id: str, landed: Sequence[_Landed], losses: Losses) -> None:
        self._nodes.require_lost_in(connection, node_id)
        for one in landed:
            known = self._index.record_of_object_in(connection, one.record.sealed.object_key)
            if known is None or known.landed_on != node_id:
                continue  # it was sent again, or erased, meanwhile
            if one.place is not None:
                self._found_in(connection, one, node_id)
                losses.found += 1
            elif one.quarantined:
                remove_quarantined_in(connection, [one.row_id])
                self._note_in(connection, "quarantine.lost", one, node_id)
                losses.quarantined += 1
            elif one.record.role == "report":
                self._lost_report_in(connection, one, node_id)
                losses.reports += 1
            elif self._lost_in(connection, one, node_id):
                self._note_in(connection, "instance.lost", one, node_id)
                losses.lost += 1

    def _found_in(self, connection: Connection, one: _Landed, node_id: str) -> None:
        sealed, uid, place = one.record.sealed, one.record.summary.sop_instance_uid, one.place or ""
        self._index.replace_object(connection, sealed.object_key, sealed, landed_on=place)
        if not one.quarantined:
            self._queue.rehome(connection, uid, home=place)
        if place:
            job = NewJob(JobKind.ARCHIVE, uid, payload={"object_key": sealed.object_key}, home=place)
            number = self._queue.enqueue_again(connection, job)
            connection.execute(update(JOBS).where(JOBS.c.id == number).values(home=place))
            self._note_in(connection, "instance.found", one, node_id)
        else:
            self._note_in(connection, "instance.archived", one, node_id)

    def _lost_report_in(self, connection: Connection, one: _Landed, node_id: str) -> None:
        """Forget a report, so that its analysis can make it again; proofs that it was delivered stay."""
        uid = one.record.summary.sop_instance_uid
        source_uid = connection.scalar(_SOURCE, {"uid": uid})
        connection.execute(_UNDELIVERED, {"uid": uid})
        remove_in(connection, [uid])
        source = None if source_uid is None else self._index.find_in(connection, str(source_uid))
        if source is not None:
            self._queue.redo_in(connection, source.summary.sop_instance_uid, home=source.landed_on)
        self._note_in(connection, "report.lost", one, node_id)

    def _lost_in(self, connection: Connection, one: _Landed, node_id: str) -> bool:
        """End the jobs of an instance that is gone; False when that was done before."""
        uid = one.record.summary.sop_instance_uid
        bringing = NewJob(JobKind.ARCHIVE, uid, payload={"object_key": one.record.sealed.object_key}, home=node_id)
        number = self._queue.enqueue(connection, bringing)
        if connection.scalar(select(JOBS.c.id).where(JOBS.c.id == number, LOST)) is not None:
            return False
        self._queue.enqueue_again(connection, bringing)  # dead of another reason, perhaps
        ids = connection.scalars(select(JOBS.c.id).where(JOBS.c.sop_instance_uid == uid, JOBS.c.home == node_id, JOBS.c.due_at > 0)).all()
        self._queue.lose_in(connection, ids, _reason(node_id))
        return True

    def _note_in(self, connection: Connection, action: str, one: _Landed, node_id: str) -> None:
        self._audit.append(connection, event_of(action, one.record, detail={"landed_on": node_id}))

    # -- jobs that are left ------------------------------------------------------------------------------------------------------

    def _jobs_in(self, connection: Connection, *, node_id: str, after: int) -> int | None:
        """Let the next page of the jobs that still wait for the node go where their object is; return the last, None at the end."""
        self._nodes.require_lost_in(connection, node_id)
        rows = connection.execute(_LIVE_AT, {"node": node_id, "after": after}).all()
        for row in rows:
            record = self._index.find_in(connection, row.sop_instance_uid)
            if row.kind == JobKind.ARCHIVE.value or record is None:
                home = ""  # whoever takes it finds nothing to bring, to analyse or to deliver, or gives it to the node that has the object
            elif record.landed_on == node_id:
                self._queue.lose_in(connection, [row.id], _reason(node_id))
                continue
            else:
                home = record.landed_on
            connection.execute(update(JOBS).where(JOBS.c.id == row.id).values(home=home))
        return rows[-1].id if rows else None


def _reason(node_id: str) -> str:
    return f"the object lay on the disk of node {node_id} alone, which was declared lost: send the instance again"
