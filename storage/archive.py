"""The archive: receive, open, conclude, acknowledge. Ties bytes, keys, index, queue and audit trail together.

Three commits carry an instance through the house, each one transaction: *admit* (instance row, jobs, audit), *conclude* (report rows,
deliveries, job done, audit), *acknowledge* (the destination's answer, job done, audit). Objects are durable before the row that
names them. A crash in between leaves an object without a row, never a row without an object, and every step may run again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from storage.comparison import same_picture
from storage.database import utc_now
from storage.errors import ConflictingInstance, InstanceNotFound, IntegrityError, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.intake import Intake
from storage.landing import Landing, LandingFile
from storage.reconcile import Reconciliation, remove_orphans, verify
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
from storage.stored import StoredInstance
from storage.trace import trace

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.audit import AuditTrail
    from storage.database import Database
    from storage.envelope import Keyring
    from storage.index import Index
    from storage.objects import ObjectReader, ObjectStore
    from storage.work import WorkQueue

__all__ = ["Archive", "Intake", "NewReport", "OnConflict", "StoredInstance"]

OnConflict = Literal["quarantine", "refuse"]

_log = logging.getLogger(__name__)
_LOOK_FIRST = 256 * 1024
"""Above so many bytes, and for every remote store, a look into the index costs less than storing a duplicate in vain."""


class _Decision(Enum):
    STORED = auto()
    DUPLICATE = auto()
    AGAIN = auto()


class Archive:
    """One per process; its methods may be called from many threads at once.

    Parameters
    ----------
    database, index, queue, audit, store, keyring
        The parts it ties together; the four of the database share `database`.
    landing
        Folder for bytes on their way in; on the file system of a `DirectoryStore`.
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
    comparison_bytes
        Instances larger than this are not compared pixel by pixel.
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
        keyring: Keyring,
        landing: Path,
        limits: Limits,
        jobs_for: Callable[[Summary, Origin], Sequence[NewJob]],
        pixels_equal: Callable[[bytes, bytes], bool] | None = None,
        on_conflict: OnConflict = "quarantine",
        accept_sop_class: Callable[[str], bool] = lambda _: True,
        min_free_bytes: int = 256 * 1024**2,
        comparison_bytes: int = 64 * 1024**2,
        reach: Callable[[str], None] = unarmed,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._index = index
        self._queue = queue
        self._audit = audit
        self._store = store
        self._keyring = keyring
        self._landing = Landing(landing, min_free_bytes=min_free_bytes)
        self._limits = limits
        self._jobs_for = jobs_for
        self._pixels_equal = pixels_equal
        self._on_conflict = on_conflict
        self._accept_sop_class = accept_sop_class
        self._comparison_bytes = comparison_bytes
        self._reach = reach
        self._clock = clock

    # --- commit 1: admit ---------------------------------------------------------------------------------------------

    def receive(
        self,
        origin: Origin,
        *,
        transfer_syntax_uid: str,
        announced: Announced | None = None,
        limits: Limits | None = None,
    ) -> Intake:
        """Begin to take an instance in.

        Raises
        ------
        UnsupportedInstance
            The transfer syntax is unknown.
        Unavailable
            The landing disk is full or has failed.
        """
        return self._intake(
            origin,
            role="source",
            transfer_syntax_uid=transfer_syntax_uid,
            announced=announced or Announced(),
            limits=limits or self._limits,
            accept_sop_class=self._accept_sop_class,
        )

    def _intake(
        self,
        origin: Origin,
        *,
        role: str,
        transfer_syntax_uid: str,
        announced: Announced,
        limits: Limits,
        accept_sop_class: Callable[[str], bool],
    ) -> Intake:
        return Intake(
            origin=origin,
            role=role,
            transfer_syntax_uid=transfer_syntax_uid,
            announced=announced,
            limits=limits,
            object_key=secrets.token_hex(16),
            keyring=self._keyring,
            landing=self._landing,
            accept_sop_class=accept_sop_class,
            admit=self._admit,
            refused=self._refused,
            reach=self._reach,
        )

    def _admit(self, record: InstanceRecord, file: LandingFile) -> Receipt:
        """Store and index what was sealed, or find that it is here already. The database's transaction has the last word."""
        summary = record.summary
        settled: dict[str, bool] = {}  # object key of an archived instance of this UID -> is the new one its duplicate?
        stored = False
        known: InstanceRecord | None = None
        if self._store.remote or record.sealed.byte_count > _LOOK_FIRST:
            known = self._known(summary.sop_instance_uid)
        while True:
            if known is not None and known.sealed.object_key not in settled:
                # Should this raise over a lost object, what was just stored may be the last copy: it stays, without a row.
                settled[known.sealed.object_key] = self._is_duplicate(known, record, file, stored=stored)
            if not stored and not (known is not None and settled[known.sealed.object_key]):
                self._put(record, file)
                stored = True
            try:
                decision, known = self._database.write(partial(self._decide, record=record, settled=settled, stored=stored))
            except ConflictingInstance as error:
                self._set_aside(record, file, error, stored=stored)
                raise
            if decision is _Decision.AGAIN:
                continue
            self._reach("index.committed")
            if decision is _Decision.DUPLICATE:
                self._drop(record, stored=stored)
            outcome = Outcome.STORED if decision is _Decision.STORED else Outcome.DUPLICATE
            return Receipt(
                outcome=outcome,
                sop_class_uid=summary.sop_class_uid,
                sop_instance_uid=summary.sop_instance_uid,
                study_instance_uid=summary.study_instance_uid,
                series_instance_uid=summary.series_instance_uid,
                sha256=summary.sha256,
            )

    def _decide(
        self, connection: Connection, *, record: InstanceRecord, settled: Mapping[str, bool], stored: bool
    ) -> tuple[_Decision, InstanceRecord | None]:
        """Commit 1: decide what the instance is and write what follows, all in one transaction.

        AGAIN, with the archived instance of this UID, when that has to be compared first; it writes nothing. So does ConflictingInstance.
        """
        self._reach("index.begin")
        summary = record.summary
        known = self._index.find_in(connection, summary.sop_instance_uid)
        if known is None:
            if not stored:
                return _Decision.AGAIN, None
            self._index.add(connection, record)
            for job in self._jobs_for(summary, record.origin):
                self._queue.enqueue(connection, job)
            self._audit.append(connection, _event_of("instance.received", record))
            self._reach("index.written")
            return _Decision.STORED, None
        duplicate = settled.get(known.sealed.object_key)
        if duplicate is None or not (duplicate or stored):
            return _Decision.AGAIN, known
        if duplicate:
            self._audit.append(connection, _event_of("instance.duplicate", record))
            return _Decision.DUPLICATE, known
        fate = "is kept in quarantine; an operator decides" if self._on_conflict == "quarantine" else "was dropped, as configured"
        raise ConflictingInstance(f"an instance of this SOP Instance UID and other content is archived; this one {fate}")

    def _set_aside(self, record: InstanceRecord, file: LandingFile, conflict: ConflictingInstance, *, stored: bool) -> None:
        """Keep a conflicting instance in quarantine, or drop it, as configured. The archived one is not touched."""
        if self._on_conflict == "refuse":
            self._drop(record, stored=stored)
            return
        if not stored:
            self._put(record, file)

        def work(connection: Connection) -> bool:
            new = self._index.quarantine(connection, record, str(conflict))
            self._audit.append(connection, _event_of("instance.quarantined", record, outcome=str(conflict)))
            return new

        if not self._database.write(work):
            self._drop(record, stored=True)  # the same content is kept already: a sender that tries again

    def _put(self, record: InstanceRecord, file: LandingFile) -> None:
        try:
            self._store.put(record.sealed.object_key, file.path, record.sealed)
        except Unavailable as error:
            if isinstance(error.__cause__, OSError):
                self._landing.failure(error.__cause__)  # remembers an input/output error
            raise

    def _drop(self, record: InstanceRecord, *, stored: bool) -> None:
        """Remove an object that surely got no row. After a commit of unknown outcome nothing is dropped: the sweep asks the index."""
        if not stored:
            return
        try:
            self._store.delete(record.sealed.object_key)
        except StorageError as error:
            _log.warning("object.left", extra={"object_key": record.sealed.object_key, "reason": str(error)})

    def _known(self, sop_instance_uid: str) -> InstanceRecord | None:
        with self._database.read() as connection:
            return self._index.find_in(connection, sop_instance_uid)

    def _is_duplicate(self, known: InstanceRecord, record: InstanceRecord, file: LandingFile, *, stored: bool) -> bool:
        """Tell whether `record` says nothing that `known` does not; IntegrityError when the object of `known` is lost."""
        if known.summary.sha256 != record.summary.sha256:
            return self._same_picture(known, record, file, stored=stored)
        self._require_object(known)
        return True

    def _require_object(self, known: InstanceRecord) -> None:
        """Look that the object of an archived instance is there and whole in length, before a duplicate is answered with success."""
        self._open_object(known).close()

    def _same_picture(self, known: InstanceRecord, record: InstanceRecord, file: LandingFile, *, stored: bool) -> bool:
        if (
            self._pixels_equal is None
            or known.summary.transfer_syntax_uid == record.summary.transfer_syntax_uid
            or max(known.summary.byte_count, record.summary.byte_count) > self._comparison_bytes
        ):
            return False
        with StoredInstance(known, self._open_object(known), self._keyring, self._damaged) as archived:
            first = b"".join(archived.part10())
        reader = self._open_object(record) if stored else file.reader()
        with StoredInstance(record, reader, self._keyring, self._damaged) as arrived:
            second = b"".join(arrived.part10())
        return same_picture(first, second, self._pixels_equal)

    def _refused(self, origin: Origin, announced: Announced, error: StorageError) -> None:
        """Record one refusal. The refusal stands whether or not it can be recorded."""
        if isinstance(error, ConflictingInstance) and self._on_conflict == "quarantine":
            return  # its audit record was written with the quarantine row
        event = AuditEvent(
            action="instance.refused",
            outcome=f"0x{error.failure_reason:04X} {error}",
            actor=_actor(origin),
            subject=announced.sop_instance_uid[:64],  # the peer's words, not yet known to be a UID
            detail={"door": origin.door, "address": origin.address, "sop_class_uid": announced.sop_class_uid},
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
        return StoredInstance(record, self._open_object(record), self._keyring, self._damaged)

    def _open_object(self, record: InstanceRecord) -> ObjectReader:
        try:
            reader = self._store.open(record.sealed.object_key)
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
        arrivals: list[tuple[NewReport, InstanceRecord]] = []
        put: set[str] = set()
        for report in reports:
            record, stored = self._store_report(report)
            arrivals.append((report, record))
            if stored:
                put.add(record.sealed.object_key)
            self._reach("report.stored")
        spare: set[str] = set()
        try:
            receipts = self._database.write(
                partial(self._conclude_in, job=job, arrivals=arrivals, put=put, spare=spare, result=result, deliveries=deliveries),
            )
        except Unavailable:
            raise  # of unknown outcome: objects without a row are swept later
        except StorageError:
            self._drop_all(arrivals, put)
            raise
        self._reach("conclude.committed")
        self._drop_all(arrivals, spare)
        return receipts

    def _store_report(self, report: NewReport) -> tuple[InstanceRecord, bool]:
        """Seal a report and put it into the store, unless the same is archived already."""
        intake = self._intake(
            Origin(door="node", received_at=self._clock()),
            role="report",
            transfer_syntax_uid=report.transfer_syntax_uid,
            announced=Announced(),
            limits=self._limits,
            accept_sop_class=lambda _: True,
        )
        with intake:
            intake.write(report.data_set)
            record = intake.seal()
            known = self._known(record.summary.sop_instance_uid)
            if known is not None:
                _require_same_report(known, record)
                self._require_object(known)
                return record, False
            self._put(record, intake.landing_file)
        return record, True

    def _conclude_in(
        self,
        connection: Connection,
        *,
        job: Job,
        arrivals: Sequence[tuple[NewReport, InstanceRecord]],
        put: set[str],
        spare: set[str],
        result: Mapping[str, Any],
        deliveries: Sequence[NewJob],
    ) -> list[Receipt]:
        self._reach("conclude.begin")
        receipts = []
        for report, record in arrivals:
            summary = record.summary
            known = self._index.find_in(connection, summary.sop_instance_uid)
            if known is None:
                if record.sealed.object_key not in put:
                    raise Unavailable("a report that was archived a moment ago is gone from the index; the job runs again")
                self._index.add(connection, record)
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
                self._audit.append(connection, _event_of("report.concluded", record, detail=detail))
            else:
                _require_same_report(known, record)
                spare.add(record.sealed.object_key)
            for peer in report.deliver_to:
                self._queue.enqueue(connection, NewJob(JobKind.DELIVER, summary.sop_instance_uid, lane=peer))
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
                detail={"job": job.id, "reports": [record.summary.sop_instance_uid for _, record in arrivals]},
            ),
        )
        self._reach("conclude.written")
        return receipts

    def _drop_all(self, arrivals: Sequence[tuple[NewReport, InstanceRecord]], object_keys: set[str]) -> None:
        for _, record in arrivals:
            self._drop(record, stored=record.sealed.object_key in object_keys)

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
                action = "analysis.refused" if job.kind is JobKind.ANALYSE else "delivery.given_up"
                detail = {"job": job.id, "attempts": job.attempts}
                event = AuditEvent(action=action, outcome=reason, actor=job.lane or "node", subject=job.sop_instance_uid, detail=detail)
                self._audit.append(connection, event)
            return state

        return self._database.write(work)

    # --- care --------------------------------------------------------------------------------------------------------

    def verify(self, progress: Callable[[int, int | None], object] = lambda _, __: None) -> Reconciliation:
        """Read every object again and compare store and index both ways. See `storage.reconcile.verify`."""
        return verify(index=self._index, store=self._store, keyring=self._keyring, audit=self._audit, progress=progress)

    def sweep(self, *, orphan_grace: timedelta | None = None) -> int:
        """Remove landing files of dead processes, and return how many things were removed. For the start; safe at any time.

        With `orphan_grace` objects without a row that are older than it go too. Without it they stay: an index restored from a backup
        knows less than the store, and what it does not know may have been acknowledged.
        """
        removed = self._landing.sweep()
        if orphan_grace is not None:
            removed += remove_orphans(index=self._index, store=self._store, older_than=self._clock() - orphan_grace)
        return removed

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
        self._store.check()
        self._database.check()

    def close(self) -> None:
        """Give back the landing folder; the parts belong to whoever made them."""
        self._landing.close()


def _require_same_report(known: InstanceRecord, record: InstanceRecord) -> None:
    if known.summary.sha256 != record.summary.sha256:
        raise ConflictingInstance(
            "a report of this SOP Instance UID and other content is archived; a second run of an analysis must give the same bytes",
        )


def _actor(origin: Origin) -> str:
    return origin.peer or origin.calling_ae_title or origin.address or origin.door


def _event_of(action: str, record: InstanceRecord, *, outcome: str = "success", detail: Mapping[str, Any] | None = None) -> AuditEvent:
    summary, origin = record.summary, record.origin
    return AuditEvent(
        action=action,
        outcome=outcome,
        actor=_actor(origin),
        subject=summary.sop_instance_uid,
        detail={
            "door": origin.door,
            "address": origin.address,
            "calling_ae_title": origin.calling_ae_title,
            "study_instance_uid": summary.study_instance_uid,
            "sha256": summary.sha256,
            "object_key": record.sealed.object_key,
            "byte_count": summary.byte_count,
            **(detail or {}),
        },
    )
