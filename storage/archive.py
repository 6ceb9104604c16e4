"""The archive: receive, open, conclude, acknowledge. Ties bytes, keys, index, queue and audit trail together.

Three commits carry an instance through the house, each one transaction: *admit* (instance row, jobs, audit), *conclude* (report rows,
deliveries, job done, audit), *acknowledge* (the destination's answer, job done, audit). Objects are durable before the row that
names them. A crash in between leaves an object without a row, never a row without an object, and every step may run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from storage.admission import Admission, OnConflict, actor_of, event_of, whence
from storage.caretaker import Caretaker
from storage.database import utc_now
from storage.envelope import Segments
from storage.erasure import Erasure
from storage.errors import ColdObject, ConflictingInstance, InstanceNotFound, IntegrityError, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.holds import Holds
from storage.intake import Intake, Vessel
from storage.landing import Landing
from storage.nodes import lost_with
from storage.orphans import Orphans
from storage.places import Acknowledge, Places
from storage.quarantine import Quarantine
from storage.reconcile import Reconciliation, verify
from storage.records import (
    Announced,
    AuditEvent,
    InstanceRecord,
    Job,
    JobKind,
    JobState,
    Limits,
    NewJob,
    NewReport,
    Origin,
    Outcome,
    Receipt,
    ReportRecord,
    Summary,
)
from storage.reindex import Reindex
from storage.retention import Retention
from storage.scrub import Scrub
from storage.stored import StoredInstance
from storage.trace import trace

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.cache import ReadCache
    from storage.database import Database
    from storage.duties import Duties
    from storage.index import Index
    from storage.objects import DirectoryStore, ObjectReader, ObjectStore
    from storage.study_keys import StudyKey, StudyKeys
    from storage.work import WorkQueue

__all__ = ["Acknowledge", "Archive", "Intake", "NewReport", "OnConflict", "StoredInstance"]

ENDED_BADLY: Final[Mapping[JobKind, str]] = {
    JobKind.ANALYSE: "analysis.refused",
    JobKind.DELIVER: "delivery.given_up",
    JobKind.ARCHIVE: "instance.damaged",
}
"""Audit action of a job that is dead."""

_HEADS_AT_ONCE = 8

_log = logging.getLogger(__name__)


class Archive:
    """One per process; its methods may be called from many threads at once.

    Parameters
    ----------
    database, index, queue, audit, store, study_keys
        The parts it ties together; those of the database share `database`.
    landing
        Folder for bytes on their way in; on the file system of a `DirectoryStore`, spool or store.
    spool, cache, node_id
        As `storage.places.Places`; only for a remote store.
    acknowledge
        What Success means for a sender; pure. Reports of our own follow that of door ``node``, or of their source when it is stricter.
    limits
        Hard limits on one instance.
    jobs_for
        What work a newly admitted instance makes necessary; pure.
    pixels_equal
        Compares two Part 10 instances pixel by pixel; without it the same instance in another transfer syntax is a conflict.
    on_conflict
        What becomes of other content under an archived SOP Instance UID: kept aside, or dropped. The sender is refused either way.
    accept_sop_class
        Whether instances of a SOP class are taken in.
    min_free_bytes
        Free space on the landing disk below which nothing is taken in.
    max_bytes_in_flight
        Bytes of this process that were received and not yet committed, above which nothing more is taken in; 0: no limit.
    comparison_bytes
        Instances larger than this are not compared pixel by pixel.
    require_room
        Raises Unavailable when nothing may be taken in for now, for a reason that lies elsewhere.
    reach
        Failpoint, for tests.
    clock
        Time of day for what the node itself makes.
    """

    def __init__(
        self,
        *,
        database: Database,
        index: Index,
        queue: WorkQueue,
        audit: AuditTrail,
        store: ObjectStore,
        study_keys: StudyKeys,
        landing: Path,
        limits: Limits,
        jobs_for: Callable[[Summary, Origin], Sequence[NewJob]],
        spool: DirectoryStore | None = None,
        cache: ReadCache | None = None,
        node_id: str = "",
        acknowledge: Callable[[Origin], Acknowledge] = lambda _: "land",
        max_bytes_in_flight: int = 0,
        pixels_equal: Callable[[bytes, bytes], bool] | None = None,
        on_conflict: OnConflict = "quarantine",
        accept_sop_class: Callable[[str], bool] = lambda _: True,
        min_free_bytes: int = 256 * 1024**2,
        comparison_bytes: int = 64 * 1024**2,
        require_room: Callable[[], None] = lambda: None,
        reach: Callable[[str], None] = unarmed,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._store = store
        self._study_keys = study_keys
        self._landing = Landing(landing, min_free_bytes=min_free_bytes, max_bytes_in_flight=max_bytes_in_flight)
        self._segments = Segments()
        self._limits = limits
        self._acknowledge = acknowledge
        self._jobs_for = jobs_for
        self._on_conflict = on_conflict
        self._accept_sop_class = accept_sop_class
        self._require_room = require_room
        self._reach = reach
        self._clock = clock
        self._node_id = node_id
        self._holds = Holds(database=database, audit=audit)
        self._places = Places(store=store, spool=spool, cache=cache, node_id=node_id, lost=partial(lost_with, database))
        self._admission = Admission(
            database=database,
            index=index,
            queue=queue,
            audit=audit,
            places=self._places,
            study_keys=study_keys,
            landing=self._landing,
            jobs_for=jobs_for,
            acknowledge=acknowledge,
            pixels_equal=pixels_equal,
            on_conflict=on_conflict,
            comparison_bytes=comparison_bytes,
            reach=reach,
        )

    @property
    def places(self) -> Places:
        """Where its objects lie, for those who take care of them."""
        return self._places

    def quiet_s(self) -> float:
        """Return for how many seconds nothing began or ended to arrive at this node, whichever of its processes it came to."""
        return self._landing.quiet_s()

    # --- commit 1: admit ---------------------------------------------------------------------------------------------

    def receive(
        self,
        origin: Origin,
        *,
        transfer_syntax_uid: str,
        announced: Announced | None = None,
        limits: Limits | None = None,
        vessel: Vessel | None = None,
    ) -> Intake:
        """Begin to take an instance in; into a `vessel` that was made before, which is used up, or a new one.

        Raises
        ------
        UnsupportedInstance
            The transfer syntax is unknown.
        Unavailable
            The landing disk is full or has failed, or `require_room` says so. The latter leaves no audit record, or who sends again and
            again would fill the trail that has no room.
        """
        try:
            self._require_room()
        except BaseException:
            if vessel is not None:
                vessel.discard()
            raise
        return self._intake(
            origin,
            vessel=vessel,
            role="source",
            transfer_syntax_uid=transfer_syntax_uid,
            announced=announced or Announced(),
            limits=limits or self._limits,
            accept_sop_class=self._accept_sop_class,
        )

    def vessel(self) -> Vessel:
        """Make what the next instance can be taken into, while nobody waits for it.

        Raises
        ------
        Unavailable
            The landing disk is full or has failed.
        """
        return Vessel(self._landing, self._segments)

    def _intake(
        self,
        origin: Origin,
        *,
        role: str,
        transfer_syntax_uid: str,
        announced: Announced,
        limits: Limits,
        accept_sop_class: Callable[[str], bool],
        report: Mapping[str, Any] | None = None,
        vessel: Vessel | None = None,
    ) -> Intake:
        def usable() -> Vessel:
            if vessel is None:
                return self.vessel()
            try:
                self._landing.check()
            except BaseException:
                vessel.discard()
                raise
            return vessel

        return Intake(
            origin=origin,
            role=role,
            transfer_syntax_uid=transfer_syntax_uid,
            announced=announced,
            limits=limits,
            study_keys=self._study_keys,
            vessel=usable,
            accept_sop_class=accept_sop_class,
            report=report,
            admit=self._admission.admit,
            refused=self._refused,
            reach=self._reach,
        )

    def _known(self, sop_instance_uid: str) -> InstanceRecord | None:
        with self._database.read() as connection:
            return self._index.find_in(connection, sop_instance_uid)

    def _refused(self, origin: Origin, announced: Announced, error: StorageError) -> None:
        """Record one refusal. The refusal stands whether or not it can be recorded."""
        if isinstance(error, ConflictingInstance) and self._on_conflict == "quarantine":
            return  # its audit record was written with the quarantine row
        event = AuditEvent(
            action="instance.refused",
            outcome=f"0x{error.failure_reason:04X} {error}",
            actor=actor_of(origin),
            subject=announced.sop_instance_uid[:64],  # the peer's words, not yet known to be a UID
            detail={**whence(origin), "sop_class_uid": announced.sop_class_uid},
        )
        try:
            self._audit.record(event)
        except StorageError as unrecorded:
            _log.error(
                "audit.unavailable",
                extra={"action": event.action, "reason": str(unrecorded)},
            )

    # --- reading -----------------------------------------------------------------------------------------------------

    def open(self, sop_instance_uid: str) -> StoredInstance:
        """Open an archived instance for reading; a context manager.

        Raises
        ------
        InstanceNotFound
            It was never admitted.
        IntegrityError
            It was, but its object is gone or is not what was stored. The alarm is in the audit trail.
        Unavailable
            Store or database cannot give it now.
        """
        record = self._index.find(sop_instance_uid)
        return StoredInstance(record, self._open_object(record), self._study_keys, self._damaged)

    def require_readable(self, records: Sequence[InstanceRecord]) -> None:
        """Look that the objects of all these instances are there and can be read, before an answer of many begins.

        A remote store is asked for their heads, several at a time. Of cold objects the restore is started, of all of them at once.

        Raises
        ------
        ColdObject
            Some have to be restored first; with the longest time until then.
        IntegrityError
            One is gone, or is not as long as what was stored. The alarm is in the audit trail.
        Unavailable
            Store or database cannot give them now.
        """
        if not self._places.remote:
            for record in records:
                StoredInstance(record, self._open_object(record), self._study_keys, self._damaged).close()
            return
        cold: list[ColdObject] = []
        with ThreadPoolExecutor(min(_HEADS_AT_ONCE, max(len(records), 1)), thread_name_prefix="heads") as pool:
            for found in pool.map(self._readable, records):
                if found is not None:
                    cold.append(found)
        if cold:
            raise max(cold, key=lambda error: error.retry_after_s)

    def _readable(self, record: InstanceRecord) -> ColdObject | None:
        """Look at one object; return the error of a cold one, whose restore was started."""
        try:
            if record.landed_on:
                self._open_object(record).close()
                return None
            info = self._store.stat(record.sealed.object_key)
            if info.cold or info.byte_count != record.sealed.byte_count:
                self._open_object(record).close()
        except ColdObject as error:
            return error
        except InstanceNotFound:
            self._open_object(record).close()  # raises the alarm
        return None

    def _open_object(self, record: InstanceRecord) -> ObjectReader:
        try:
            reader = self._places.open(record)
        except InstanceNotFound as error:
            missing = IntegrityError(
                f"object {record.sealed.object_key} of an archived instance is gone from the store; restore it from a backup",
            )
            self._damaged(record, missing)
            raise missing from error
        if reader.size != record.sealed.byte_count:
            reader.close()
            short = IntegrityError(
                f"object {record.sealed.object_key} has {reader.size} bytes where {record.sealed.byte_count} were stored; restore it",
            )
            self._damaged(record, short)
            raise short
        return reader

    def _damaged(self, record: InstanceRecord, error: IntegrityError) -> None:
        """Raise the alarm; the caller raises the error."""
        _log.error("object.damaged", extra={"object_key": record.sealed.object_key, "reason": str(error)})
        event = AuditEvent(
            action="instance.damaged",
            outcome=str(error),
            actor="node",
            subject=record.summary.sop_instance_uid,
            detail={"object_key": record.sealed.object_key},
        )
        with suppress(Unavailable):  # logged above
            self._audit.record(event)

    # --- commit 2: conclude ------------------------------------------------------------------------------------------

    def conclude(
        self,
        job: Job,
        *,
        reports: Sequence[NewReport],
        result: Mapping[str, Any],
        deliveries: Sequence[NewJob] = (),
    ) -> list[Receipt]:
        """Archive the reports of an analysis and end its job: commit 2.

        The report objects are made durable first; then one transaction writes their rows, one DELIVER job per report and peer (and
        `deliveries`), the end of the job and the audit records. Safe to run again after a crash: a report that is archived already
        with the same content is not stored again.

        Raises
        ------
        LeaseLost
            Another worker has the job; nothing of this call is kept.
        ConflictingInstance
            A report of that UID with other content is archived: the analysis is not reproducible.
        InvalidInstance
            A report is no well-framed data set.
        Unavailable
            Disk, store or database; the job runs again.
        """
        arrivals: list[tuple[NewReport, InstanceRecord, StudyKey]] = []
        put: set[str] = set()
        for report in reports:
            record, study_key, stored = self._store_report(report, job)
            arrivals.append((report, record, study_key))
            if stored:
                put.add(record.sealed.object_key)
            self._reach("report.stored")
        spare: set[str] = set()
        try:
            receipts = self._admission.write(
                partial(self._conclude_in, job=job, arrivals=arrivals, put=put, spare=spare, result=result, deliveries=deliveries),
                *(study_key for _, _, study_key in arrivals),
            )
        except Unavailable:
            raise  # of unknown outcome: objects without a row are swept later
        except StorageError:
            self._drop_all(arrivals, put)
            raise
        self._reach("conclude.committed")
        self._drop_all(arrivals, spare)
        return receipts

    def _store_report(self, report: NewReport, job: Job) -> tuple[InstanceRecord, StudyKey, bool]:
        """Seal a report and put it where it belongs, unless the same is archived already."""
        intake = self._intake(
            Origin(door="node", received_at=self._clock()),
            role="report",
            transfer_syntax_uid=report.transfer_syntax_uid,
            announced=Announced(),
            limits=self._limits,
            accept_sop_class=lambda _: True,
            report={
                "source_sop_instance_uid": job.sop_instance_uid,
                "kind": report.kind,
                "models": dict(report.models),
                "deliver_to": list(report.deliver_to),
            },
        )
        with intake:
            intake.write(report.data_set)
            record, study_key = intake.seal()
            known = self._known(record.summary.sop_instance_uid)
            if known is not None:
                _require_same_report(known, record)
                self._open_object(known).close()
                return record, study_key, False
            record = self._admission.put(record, intake.landing_file, study_key, self._policy_of_report(record, job))
        return record, study_key, True

    def _policy_of_report(self, record: InstanceRecord, job: Job) -> Acknowledge:
        """A report of what was acknowledged in the store goes there too: with this node lost, nobody would make it again."""
        policy = self._acknowledge(record.origin)
        source = self._known(job.sop_instance_uid) if self._places.lands(policy) else None
        return policy if source is None else self._acknowledge(source.origin)

    def _conclude_in(
        self,
        connection: Connection,
        *,
        job: Job,
        arrivals: Sequence[tuple[NewReport, InstanceRecord, StudyKey]],
        put: set[str],
        spare: set[str],
        result: Mapping[str, Any],
        deliveries: Sequence[NewJob],
    ) -> list[Receipt]:
        self._reach("conclude.begin")
        if self._index.find_in(connection, job.sop_instance_uid) is None:
            raise InstanceNotFound("the instance was erased while it was analysed; its reports are dropped")
        receipts = []
        for report, record, study_key in arrivals:
            summary = record.summary
            known = self._index.find_in(connection, summary.sop_instance_uid)
            if known is None:
                if record.sealed.object_key not in put:
                    raise Unavailable("a report that was archived a moment ago is gone from the index; the job runs again")
                self._admission.add_in(connection, record, study_key)
                self._index.add_report(
                    connection,
                    ReportRecord(
                        sop_instance_uid=summary.sop_instance_uid,
                        source_sop_instance_uid=job.sop_instance_uid,
                        kind=report.kind,
                        models=report.models,
                    ),
                )
                detail = {"source_sop_instance_uid": job.sop_instance_uid, "kind": report.kind, "models": dict(report.models)}
                self._audit.append(connection, event_of("report.concluded", record, detail=detail))
            else:
                _require_same_report(known, record)
                spare.add(record.sealed.object_key)
            for peer in report.deliver_to:
                home = (known or record).landed_on
                self._queue.enqueue(connection, NewJob(JobKind.DELIVER, summary.sop_instance_uid, lane=peer, home=home))
            receipts.append(
                Receipt(
                    outcome=Outcome.STORED if known is None else Outcome.DUPLICATE,
                    sop_class_uid=summary.sop_class_uid,
                    sop_instance_uid=summary.sop_instance_uid,
                    study_instance_uid=summary.study_instance_uid,
                    series_instance_uid=summary.series_instance_uid,
                    sha256=summary.sha256,
                ),
            )
        for delivery in deliveries:
            self._queue.enqueue(connection, delivery)
        self._queue.finish_in(connection, job, result)
        self._audit.append(
            connection,
            AuditEvent(
                action="analysis.concluded",
                outcome="success",
                actor="node",
                subject=job.sop_instance_uid,
                detail={"job": job.id, "reports": [record.summary.sop_instance_uid for _, record, _ in arrivals]},
            ),
        )
        self._reach("conclude.written")
        return receipts

    def _drop_all(self, arrivals: Sequence[tuple[NewReport, InstanceRecord, StudyKey]], object_keys: set[str]) -> None:
        for _, record, _ in arrivals:
            if record.sealed.object_key in object_keys:
                self._admission.drop(record)

    # --- commit 3: acknowledge ---------------------------------------------------------------------------------------

    def acknowledge(self, job: Job, *, status: int, detail: Mapping[str, Any] | None = None) -> None:
        """Record the destination's answer (a DIMSE status) as proof of delivery and end the job: commit 3.

        Raises
        ------
        LeaseLost
            Another courier has the job.
        Unavailable
            The database; the delivery is made again under the same SOP Instance UID.
        """
        proof = {"status": f"{status:04X}", **(detail or {})}

        def work(connection: Connection) -> None:
            self._queue.finish_in(connection, job, proof)
            self._audit.append(
                connection,
                AuditEvent(
                    action="report.delivered",
                    outcome="success",
                    actor=job.lane or "node",
                    subject=job.sop_instance_uid,
                    detail={"job": job.id, **proof},
                ),
            )

        self._database.write(work)
        self._reach("acknowledge.committed")

    def fail(self, job: Job, reason: str, *, retryable: bool) -> JobState:
        """Note a failed attempt, and return the job's new state. A job that ends with it leaves an audit record in the same transaction.

        Raises
        ------
        LeaseLost
            Another holder has the job.
        Unavailable
            The database; the lease runs out and the job is claimed again.
        """

        def work(connection: Connection) -> JobState:
            state = self._queue.fail_in(connection, job, reason, retryable=retryable)
            if state is JobState.DEAD:
                action = ENDED_BADLY[job.kind]
                detail = {"job": job.id, "attempts": job.attempts}
                event = AuditEvent(action=action, outcome=reason, actor=job.lane or "node", subject=job.sop_instance_uid, detail=detail)
                self._audit.append(connection, event)
            return state

        return self._database.write(work)

    # --- bring -------------------------------------------------------------------------------------------------------

    def bring(self, job: Job) -> int:
        """Bring a landed object into the store, and end the job of the Mover: its bytes, 0 when there was nothing to bring (any more).

        Raises
        ------
        IntegrityError, Unavailable
            As `carry`.
        LeaseLost
            As `arrived`.
        """
        record = self.carry(job)
        if record is None:
            return 0
        self.arrived([(job, record)])
        return record.sealed.byte_count

    def carry(self, job: Job) -> InstanceRecord | None:
        """Put a landed object into the store, read back and compared; None, and the job is ended, when there is nothing to bring.

        Raises
        ------
        IntegrityError
            The spool lost what it had promised, or changed it; the alarm is in the audit trail.
        LeaseLost
            Another Mover has the job.
        Unavailable
            Store or database is away; the job runs again.
        """
        object_key = str(job.payload["object_key"])
        record = self._index.record_of_object(object_key)
        if record is not None and record.landed_on not in ("", self._node_id):
            self._queue.release(job, home=record.landed_on)  # that node alone can bring it
            return None
        if record is None or not record.landed_on:
            self._queue.finish(job, {"outcome": "nothing to bring"})
            if record is not None:
                self._places.settle(record.sealed)
            return None
        try:
            self._publish_key(record)
            self._reach("bring.key_published")
            self._places.bring(record, still=lambda: self._index.record_of_object(object_key) == record)
        except InstanceNotFound as error:
            lost = IntegrityError(
                f"landed object {object_key} is in neither spool nor store: the disk lost it; have the instance sent again"
            )
            self._damaged(record, lost)
            raise lost from error
        except IntegrityError as error:
            self._damaged(record, error)
            raise
        self._reach("bring.put")
        return record

    def arrived(self, carried: Sequence[tuple[Job, InstanceRecord]]) -> None:
        """Say of objects that were carried that they are in the store, and end their jobs, in one transaction; then settle the spool.

        The spool keeps its files until this commit.

        Raises
        ------
        LeaseLost
            Another Mover has one of the jobs; nothing is said of any.
        Unavailable
            The database is away; the jobs run again.
        """

        def work(connection: Connection) -> None:
            for job, record in carried:
                object_key = record.sealed.object_key
                self._queue.finish_in(connection, job, {"object_key": object_key})
                if self._index.arrived_in_store(connection, object_key, landed_on=self._node_id):
                    known = self._index.find_in(connection, record.summary.sop_instance_uid)
                    if known is not None and known.sealed.object_key == object_key:  # not another one of this UID, in quarantine
                        self._queue.rehome(connection, record.summary.sop_instance_uid)
                    self._audit.append(connection, event_of("instance.archived", record, detail={"landed_on": self._node_id}))
            self._reach("bring.written")

        self._database.write(work)
        self._reach("bring.committed")
        for _, record in carried:
            self._places.settle(record.sealed)
            self._reach("bring.settled")

    def _publish_key(self, record: InstanceRecord) -> None:
        """Have the document of the study's key in the store. That this node's ring does not open the key is no fault of the object."""
        try:
            self._study_keys.publish(
                record.sealed.key_id, put_document=self._store.put_document, delete_document=self._store.delete_document
            )
        except IntegrityError as error:
            if self._study_keys.known([record.sealed.key_id]):
                raise Unavailable(f"{error}; landed object {record.sealed.object_key} stays on this node's disk until then") from error
            if self._index.record_of_object(record.sealed.object_key) is None:
                raise Unavailable("the instance was erased while its object was brought") from error
            raise

    # --- care --------------------------------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int | None], object] = lambda _, __: None) -> Reconciliation:
        """Read every object again and compare store and index both ways. See `storage.reconcile.verify`."""
        return verify(index=self._index, places=self._places, study_keys=self._study_keys, audit=self._audit, progress=progress)

    def sweep(self, *, orphan_grace: timedelta | None = None) -> int:
        """Remove landing files of dead processes, and return how many things were removed. For the start; safe at any time.

        With `orphan_grace` it is also decided about objects without a row that are older than it: see `storage.orphans`.
        """
        removed = self._landing.sweep()
        if orphan_grace is not None:
            removed += self.orphans().sweep(grace=orphan_grace).settled
        return removed

    def scrub(self) -> Scrub:
        """Return what looks after the archived objects, on a schedule."""
        return Scrub(
            database=self._database,
            index=self._index,
            audit=self._audit,
            study_keys=self._study_keys,
            places=self._places,
            landing=self._landing,
            reach=self._reach,
        )

    def erasure(self) -> Erasure:
        """Return what erases studies and patients."""
        return Erasure(
            database=self._database,
            index=self._index,
            queue=self._queue,
            audit=self._audit,
            study_keys=self._study_keys,
            places=self._places,
            holds=self._holds,
            reach=self._reach,
        )

    def caretaker(self, *, duties: Duties, **settings: Any) -> Caretaker:
        """Return what does the duties of this node; `settings` as `storage.caretaker.Caretaker`."""
        return Caretaker(
            archive=self, places=self._places, study_keys=self._study_keys, duties=duties, **{"clock": self._clock, **settings}
        )

    def retention(self, *, days: float) -> Retention:
        """Return what lists and erases studies of which nothing came for so many days; 0: never."""
        return Retention(database=self._database, erasure=self.erasure(), days=days, clock=self._clock)

    def quarantine(self) -> Quarantine:
        """Return what shows, accepts and drops what was kept aside."""
        return Quarantine(
            database=self._database,
            index=self._index,
            queue=self._queue,
            audit=self._audit,
            study_keys=self._study_keys,
            places=self._places,
            holds=self._holds,
            jobs_for=self._jobs_for,
            reach=self._reach,
        )

    def orphans(self) -> Orphans:
        """Return what decides about objects that no row names."""
        return Orphans(
            database=self._database,
            index=self._index,
            queue=self._queue,
            audit=self._audit,
            study_keys=self._study_keys,
            places=self._places,
            jobs_for=self._jobs_for,
            follow_marks=self.quarantine().follow_marks,
            reach=self._reach,
            clock=self._clock,
        )

    def reindex(self, *, deliver: bool = False) -> Reindex:
        """Return what fills an empty database from the store. `deliver`: have every report delivered again."""
        return Reindex(
            database=self._database,
            index=self._index,
            queue=self._queue,
            audit=self._audit,
            study_keys=self._study_keys,
            places=self._places,
            jobs_for=self._jobs_for,
            deliver=deliver,
            reach=self._reach,
        )

    def requeue(self, *, job_id: int | None = None, kind: JobKind | None = None) -> int:
        """Let a dead or finished job run again, or every dead job of a kind; return how many. The audit trail keeps it.

        Raises
        ------
        StorageError
            There is no such job, or it is neither dead nor done.
        """
        count = 0
        if job_id is not None:
            self._queue.requeue(job_id)
            count = 1
        if kind is not None:
            count += self._queue.requeue_dead(kind)
        detail = {"job": job_id, "kind": kind and str(kind), "count": count}
        self._audit.record(AuditEvent(action="jobs.requeued", outcome="success", actor="operator", detail=detail))
        return count

    def trace(self, uid: str) -> dict[str, Any]:
        """Tell all that is known of an instance, series or study. See `storage.trace.trace`."""
        return trace(uid, index=self._index, queue=self._queue, audit=self._audit)

    def check(self) -> None:
        """Raise Unavailable with cause and remedy when nothing can be taken in now (readiness)."""
        self._landing.check()
        self._require_room()
        self._places.check()
        if self._acknowledge(Origin(door="node", received_at=self._clock())) == "archive":
            self._store.check()  # without it every sender is refused
        self._database.check()

    def close(self) -> None:
        """Give back the landing folder; the parts belong to whoever made them."""
        self._landing.close()


def _require_same_report(known: InstanceRecord, record: InstanceRecord) -> None:
    if known.summary.sha256 != record.summary.sha256:
        raise ConflictingInstance(
            "a report of this SOP Instance UID and other content is archived; a second run of an analysis must give the same bytes",
        )
