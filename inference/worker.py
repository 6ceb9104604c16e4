"""Takes analysis jobs from the queue to their reports: claim, open, decode, predict, report, conclude.

Every step may run twice. What a job brings about is derived from the picture, the models and the configuration, and the time that
reports carry is that of the job's first claim, so a second worker makes the same bytes under the same UIDs; what a worker does
after it lost its lease is dropped by the archive.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from inference.errors import DeviceFull, DeviceLost, InferenceError, UnsupportedPixels
from inference.pixels import decode_frames, source_header
from inference.records import Failure, ImageAnalysis, Report, ReportContext, ReportReference
from storage.errors import ColdObject, LeaseLost, StorageError, Unavailable
from storage.failpoints import unarmed
from storage.records import InstanceRecord, Job, JobKind, JobState, NewReport, Origin

if TYPE_CHECKING:
    from types import TracebackType

    from pydicom.dataset import Dataset

    from inference.pipeline import Pipeline
    from storage.archive import Archive
    from storage.index import Index
    from storage.work import WorkQueue

Builder = Callable[["Dataset", ImageAnalysis, ReportContext], Sequence[Report]]
"""Writes the reports; the same arguments give the same bytes (`inference.report.build_reports` with its identity)."""

_log = logging.getLogger(__name__)


def nowhere(_origin: Origin, _kind: str) -> tuple[str, ...]:
    """Deliver to nobody: reports are archived and can be searched and retrieved."""
    return ()


def unobserved(_event: str, **_labels: Any) -> None:
    """Ignore what happens."""


class Worker:
    """Analyses, one instance at a time.

    Parameters
    ----------
    archive, index, queue
        Where instances, reports and jobs are.
    pipeline
        What runs on a picture.
    reports
        Writes what was found.
    deliver_to
        Names of the peers that get a report of a kind (summary, findings, segmentation) about an instance of an origin.
    installation_uid
        Device Observer UID of this installation.
    max_pixels, max_bytes
        Budget of one instance: pixels decoded, bytes read into memory.
    reach
        Failpoints: analyse.claimed, analyse.decoded, analyse.predicted, report.built.
    poll_s
        How often the queue is looked at.
    heartbeat_s
        How often the lease is renewed while work is under way; a third of the queue's lease.
    postpone_s
        How long a job waits whose analysis met a disk, store or database that was away; that is no try of the job.
    wait
        Waits for news at most so many seconds (the database's ``changed``); by default just that time, or until stopped.
    observe
        Told ``analysis.concluded`` (seconds, outcome), ``analysis.failed`` (retryable) and ``analysis.postponed``.
    """

    def __init__(
        self,
        *,
        archive: Archive,
        index: Index,
        queue: WorkQueue,
        pipeline: Pipeline,
        reports: Builder,
        installation_uid: str,
        deliver_to: Callable[[Origin, str], tuple[str, ...]] = nowhere,
        max_pixels: int = 400_000_000,
        max_bytes: int = 2 * 1024**3,
        reach: Callable[[str], None] = unarmed,
        poll_s: float = 0.5,
        heartbeat_s: float = 20.0,
        postpone_s: float = 30.0,
        owner: str = "",
        wait: Callable[[float], object] | None = None,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._archive = archive
        self._index = index
        self._queue = queue
        self._pipeline = pipeline
        self._reports = reports
        self._installation_uid = installation_uid
        self._deliver_to = deliver_to
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._reach = reach
        self._poll_s = poll_s
        self._heartbeat_s = heartbeat_s
        self._postpone_s = postpone_s
        self._owner = owner or f"worker {os.getpid()}"
        self._wait = wait
        self._observe = observe

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; the instance under way is finished first.

        Raises
        ------
        DeviceLost
            As `work_once`.
        """
        wait = self._wait or stop.wait
        unavailable = False
        while not stop.is_set():
            try:
                worked = self.work_once()
                unavailable = False
            except StorageError as error:
                if not unavailable:  # said once an outage
                    _log.warning("worker.queue_unavailable", extra={"reason": str(error)})
                worked, unavailable = False, True
            if not worked:
                wait(self._poll_s)

    def work_once(self) -> bool:
        """Take one ready job to its end, good or bad. False when none was ready.

        Raises
        ------
        StorageError
            The queue can neither be read nor written now; a job that was claimed is claimed again when its lease ends.
        DeviceLost
            This process can compute no more; the job was given back.
        """
        job = self._queue.claim(JobKind.ANALYSE, owner=self._owner)
        if job is None:
            return False
        began = time.monotonic()
        try:
            with Lease(self._queue, job, self._heartbeat_s) as lease:
                self._reach("analyse.claimed")
                outcome = self._analyse(job, lease)
        except LeaseLost:
            _log.warning("analysis.lease_lost", extra={"job": job.id, "reason": "another worker has the job; this result was dropped"})
        except Unavailable as error:
            self._postponed(job, error)
        except DeviceLost as error:
            self._device_lost(job, error)
            raise
        except DeviceFull as error:
            self._failed(job, str(error), retryable=True)
        except (InferenceError, StorageError) as error:
            self._failed(job, str(error), retryable=error.retryable)
        except Exception as error:  # noqa: BLE001 - the edge of a worker; a message may quote the header, so only the class is kept
            _log.exception("analysis.crashed", exc_info=_without_values(error), extra={"job": job.id})
            self._failed(job, f"The analysis failed with {type(error).__name__}; the log of the worker says where.", retryable=True)
        else:
            seconds = time.monotonic() - began
            _log.info("analysis.concluded", extra={"job": job.id, "outcome": outcome, "seconds": round(seconds, 3)})
            self._observe("analysis.concluded", seconds=seconds, outcome=outcome)
        return True

    def _analyse(self, job: Job, lease: Lease) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom puts values of the header into its warnings, and they go to standard error
            return self._concluded(job, lease)

    def _concluded(self, job: Job, lease: Lease) -> str:
        with self._archive.open(job.sop_instance_uid) as stored:
            record = stored.record
            if stored.size > self._max_bytes:
                raise UnsupportedPixels(f"The instance has {stored.size} bytes, more than the {self._max_bytes} that are analysed.")
            part10 = b"".join(stored.part10())
        header = source_header(part10)
        frames = decode_frames(part10, max_pixels=self._max_pixels, max_frames=self._pipeline.max_frames)
        del part10
        self._reach("analyse.decoded")
        lease.require()
        analysis = self._pipeline.run(header, frames)
        self._reach("analyse.predicted")
        lease.require()
        reports = self._built(job, record, header, analysis)
        self._reach("report.built")
        models = self._pipeline.models
        outcome = "analysed" if any(frame.valid for frame in analysis.frames) else "refused"
        self._archive.conclude(
            job,
            reports=[
                NewReport(
                    kind=report.kind,
                    data_set=report.data_set,
                    transfer_syntax_uid=report.transfer_syntax_uid,
                    deliver_to=self._deliver_to(record.origin, report.kind),
                    models=models,
                )
                for report in reports
            ],
            result={
                "outcome": outcome,
                "profile": self._pipeline.profile,
                "configuration_digest": self._pipeline.configuration_digest,
                "models": models,
                "frames": [{"number": frame.frame_number, "valid": frame.valid} for frame in analysis.frames],
                "failures": [f"{failure.item}: {failure.reason}" for failure in _failures(analysis)],
                "reports": {report.kind: report.sop_instance_uid for report in reports},
            },
        )
        return outcome

    def _built(self, job: Job, record: InstanceRecord, header: Dataset, analysis: ImageAnalysis) -> Sequence[Report]:
        """Write the reports; those that replace earlier ones name them."""
        if job.first_claimed_at is None:
            raise ValueError("a claimed job knows when it was first claimed")
        at = job.first_claimed_at.isoformat()
        profile, digest = self._pipeline.profile, self._pipeline.configuration_digest
        context = ReportContext(at, profile, digest, self._installation_uid, record.summary.sha256)
        reports = self._reports(header, analysis, context)
        predecessors = self._predecessors(job.sop_instance_uid, reports)
        if not predecessors:
            return reports
        return self._reports(header, analysis, replace(context, predecessors=predecessors))

    def _predecessors(self, source_sop_instance_uid: str, reports: Sequence[Report]) -> dict[str, ReportReference]:
        """Give the latest earlier report of each kind; earlier than the one that is archived already under the UID of the new one, if any.

        The UIDs of reports do not depend on what they replace, so they can be asked for after a first draft.
        """
        made: dict[str, list[InstanceRecord]] = {}
        for earlier in self._index.reports_of(source_sop_instance_uid):
            made.setdefault(earlier.kind, []).append(self._index.find(earlier.sop_instance_uid))
        predecessors = {}
        for report in reports:
            records = sorted(made.get(report.kind, ()), key=lambda record: (record.origin.received_at, record.summary.sop_instance_uid))
            uids = [record.summary.sop_instance_uid for record in records]
            if report.sop_instance_uid in uids:
                records = records[: uids.index(report.sop_instance_uid)]
            if records:
                summary = records[-1].summary
                predecessors[report.kind] = ReportReference(
                    summary.study_instance_uid, summary.series_instance_uid, summary.sop_class_uid, summary.sop_instance_uid
                )
        return predecessors

    def _postponed(self, job: Job, error: Unavailable) -> None:
        """Give the job back: disk, store or database are away, which is no fault of the picture and must not use up its tries."""
        try:
            after_s = error.retry_after_s if isinstance(error, ColdObject) else self._postpone_s
            self._queue.release(job, after_s=after_s, reason=str(error))
        except LeaseLost:
            return
        _log.warning("analysis.postponed", extra={"job": job.id, "reason": str(error)})
        self._observe("analysis.postponed")

    def _device_lost(self, job: Job, error: DeviceLost) -> None:
        """Give the job back untried, since the device failed and not the picture; at the second time running it may be the picture."""
        if job.reason == str(error):
            self._failed(job, str(error), retryable=True)
            return
        try:
            self._queue.release(job, reason=str(error))
        except StorageError as away:  # it is taken again when its lease ends
            _log.warning("analysis.not_given_back", extra={"job": job.id, "reason": str(away)})
            return
        self._observe("analysis.postponed")

    def _failed(self, job: Job, reason: str, *, retryable: bool) -> None:
        try:
            state = self._archive.fail(job, reason, retryable=retryable)
        except LeaseLost:
            return
        _log.warning("analysis.failed", extra={"job": job.id, "reason": reason, "state": state.value})
        self._observe("analysis.failed", retryable=state is not JobState.DEAD)


def _failures(analysis: ImageAnalysis) -> list[Failure]:
    return [*analysis.failures, *(failure for frame in analysis.frames for failure in frame.failures)]


def _without_values(error: Exception) -> Exception:
    """Give the same traceback under an exception without a message: messages of libraries quote values of the data set."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)


class Lease:
    """Renews the lease of a job from a thread of its own while the block runs."""

    def __init__(self, queue: WorkQueue, job: Job, heartbeat_s: float) -> None:
        self._queue = queue
        self._job = job
        self._heartbeat_s = heartbeat_s
        self._lost = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of job {job.id}", daemon=True)

    def require(self) -> None:
        """Raise `LeaseLost` when another worker took the job: going on would be work for nothing."""
        if self._lost.is_set():
            raise LeaseLost("the lease ran out while the picture was analysed; another worker has the job")

    def _beat(self) -> None:
        while not self._done.wait(self._heartbeat_s):
            try:
                self._queue.heartbeat(self._job)
            except LeaseLost:
                self._lost.set()
                return
            except StorageError as error:  # the lease may still hold when the database answers again
                _log.warning("analysis.heartbeat_failed", extra={"job": self._job.id, "reason": str(error)})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
