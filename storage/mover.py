"""The Mover: brings landed objects from a node's disk into the store, some at a time, no faster than allowed, in the senders' pauses."""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from storage.errors import LeaseLost, StorageError
from storage.failpoints import unarmed
from storage.leases import Leases
from storage.records import Job, JobKind
from storage.work import growing_delay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from storage.archive import Archive
    from storage.records import InstanceRecord
    from storage.work import WorkQueue

_log = logging.getLogger(__name__)


_REPORT_S: Final = 1.0
_PAUSE_S: Final = 0.5
"""Nobody sent anything for so long: a pause of the senders."""


@dataclass(frozen=True, slots=True)
class _Carried:
    """An object that is in the store, while its row does not say so yet."""

    job: Job
    record: InstanceRecord
    began: float


def _give_way() -> None:
    """Have this thread come after all that answer senders, where the processor is short: what landed is safe already."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10))


def unobserved(_event: str, **_labels: Any) -> None:
    """Ignore what happens."""


class Bandwidth:
    """Spreads bytes, or any other units, over time: whoever took some waits until they are due. For many threads.

    Parameters
    ----------
    bytes_per_s
        0: as fast as it goes.
    monotonic
        Seconds of a clock that never steps.
    """

    def __init__(self, bytes_per_s: int, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = bytes_per_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, byte_count: int) -> float:
        """Take bytes and return the seconds to wait before the next may be moved."""
        if not self._bytes_per_s:
            return 0.0
        with self._lock:
            now = self._monotonic()
            self._free_at = max(self._free_at, now) + byte_count / self._bytes_per_s
            return self._free_at - now


class Mover:
    """Brings this node's landed objects into the store.

    Parameters
    ----------
    archive, queue
        Of this node: its queue claims what has this node as its home.
    at_once
        Objects under way at the same time.
    batch
        Objects that each of those claims in one transaction, and reports in one: the disk is flushed for all of them once. What was
        brought waits a second at most for the others.
    bytes_per_s
        Bandwidth over all of them; 0: no limit.
    processor_share
        Part of the machine's processors that may be spent on it while senders are busy: what landed is safe, and a sender waits. A store
        far away costs little of it; one on the same machine costs that much again.
    poll_s
        How often the queue is looked at.
    patience_s
        Seconds for which what landed may wait while senders are busy: receiving goes first, the backlog is brought in their pauses. After
        so long without a pause, or with less than a tenth of the disk free, it is brought beside them, until nothing waits any more. What
        landed is safe on this node's disk, and only there: the longer the patience, the more a node that is lost for ever takes along.
        0: never waits.
    heartbeat_s
        How often the lease of an object under way is renewed; a third of the queue's lease.
    wait
        Waits for news at most so many seconds (the database's ``changed``); by default just that time, or until stopped.
    reach
        Failpoint: bring.claimed; the others are the archive's.
    observe
        Told ``instance.archived`` (byte_count, seconds) and ``archive.failed`` (retryable).
    """

    def __init__(
        self,
        *,
        archive: Archive,
        queue: WorkQueue,
        at_once: int = 4,
        batch: int = 8,
        bytes_per_s: int = 0,
        processor_share: float = 0.25,
        poll_s: float = 0.5,
        patience_s: float = 10.0,
        heartbeat_s: float = 20.0,
        owner: str = "mover",
        wait: Callable[[float], object] | None = None,
        reach: Callable[[str], None] = unarmed,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._archive = archive
        self._queue = queue
        self._at_once = at_once
        self._batch = batch
        self._bandwidth = Bandwidth(bytes_per_s)
        self._processors = Bandwidth(int(processor_share * (os.cpu_count() or 1) * 1_000_000))  # microseconds of them
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._heartbeat_s = heartbeat_s
        self._owner = owner
        self._wait = wait
        self._reach = reach
        self._observe = observe
        self._lock = threading.Lock()
        self._failures = 0
        self._rests_until = 0.0
        self._waiting_since: float | None = None
        self._unavailable = False

    def run(self, stop: threading.Event) -> None:
        """Bring until `stop` is set; objects under way are finished first."""
        wait = self._wait or stop.wait
        busy: list[Future[None]] = []
        with self._carriers() as carriers, ThreadPoolExecutor(self._at_once, thread_name_prefix="mover") as pool:
            while not stop.is_set():
                busy = [future for future in busy if not future.done()]
                if self._rests():
                    stop.wait(self._poll_s)  # not for the database's news, of which a busy sender makes many
                    continue
                due = self._any_due()
                busy += [pool.submit(self._lane, stop, carriers) for _ in range(self._at_once - len(busy))] if due else []
                if not due:
                    with self._lock:
                        self._waiting_since = None
                try:
                    wait(self._poll_s)
                except StorageError:
                    stop.wait(self._poll_s)  # the next look at the queue says what is wrong

    def bring_once(self) -> bool:
        """Take one landed object to its end, good or bad. False when none was due.

        Raises
        ------
        StorageError
            The queue can neither be read nor written now; a job that was claimed is claimed again when its lease ends.
        """
        job = self._queue.claim(JobKind.ARCHIVE, owner=self._owner)
        if job is None:
            return False
        with self._carriers() as carriers:
            self._bring([job], threading.Event(), carriers)
        return True

    def _carriers(self) -> ThreadPoolExecutor:
        # Threads of their own: the one that commits for this process must not hold the database's lock at a low priority.
        return ThreadPoolExecutor(self._at_once, thread_name_prefix="carrier", initializer=_give_way)

    def _lane(self, stop: threading.Event, carriers: ThreadPoolExecutor) -> None:
        try:
            while not stop.is_set() and not self._rests():
                jobs = self._queue.claim_some(JobKind.ARCHIVE, owner=self._owner, at_most=self._batch)
                if not jobs:
                    return
                self._bring(jobs, stop, carriers)
        except StorageError as error:
            _log.warning("mover.queue_unavailable", extra={"reason": str(error)})
        except Exception:  # noqa: BLE001 - the edge of a mover's thread: the lease runs out and the job is claimed again
            _log.exception("mover.failed")

    def _bring(self, jobs: Sequence[Job], stop: threading.Event, carriers: ThreadPoolExecutor) -> None:
        """Bring some objects; report each within a second or so."""
        carried: list[_Carried] = []
        with Leases(self._queue, jobs, self._heartbeat_s) as leases:
            for number, job in enumerate(jobs):
                if number and (stop.is_set() or self._rests()):
                    if leases.drop(job):
                        self._give_back(job)
                    continue
                self._reach("bring.claimed")
                began = time.monotonic()
                try:
                    record, spent_us = carriers.submit(self._carry, job).result()
                except LeaseLost:
                    _log.warning("job.lease_lost", extra={"job": job.id})
                    leases.drop(job)
                    continue
                except StorageError as error:
                    if leases.drop(job):
                        self._failed(job, error)
                    continue
                with self._lock:
                    self._failures = 0
                if record is None:
                    leases.drop(job)
                    continue
                carried.append(_Carried(job, record, began))
                if began - carried[0].began > _REPORT_S:
                    self._report(carried, leases)
                    carried = []
                pause = self._bandwidth.take(record.sealed.byte_count)
                if self._archive.quiet_s() <= _PAUSE_S:  # else the processors are nobody's
                    pause = max(pause, self._processors.take(spent_us))
                stop.wait(pause)
            self._report(carried, leases)

    def _carry(self, job: Job) -> tuple[InstanceRecord | None, int]:
        """In a carrier: bring one object; return its record and the microseconds of a processor that it took."""
        before = time.thread_time_ns()
        record = self._archive.carry(job)
        return record, (time.thread_time_ns() - before) // 1000

    def _report(self, carried: Sequence[_Carried], leases: Leases) -> None:
        """End the jobs of what was carried, together; each by itself when one of them was lost."""
        mine = [one for one in carried if leases.drop(one.job)]
        groups = [mine] if mine else []
        while groups:
            group = groups.pop()
            try:
                self._archive.arrived([(one.job, one.record) for one in group])
            except LeaseLost:
                if len(group) > 1:
                    groups += [[one] for one in group]
                else:
                    _log.warning("job.lease_lost", extra={"job": group[0].job.id})
                continue
            except StorageError as error:
                for one in group:
                    self._failed(one.job, error)
                continue
            for one in group:
                self._observe("instance.archived", byte_count=one.record.sealed.byte_count, seconds=time.monotonic() - one.began)

    def _give_back(self, job: Job) -> None:
        try:
            self._queue.release(job)  # the reason of the last failure stays
        except StorageError as error:  # claimed again when the lease ends
            _log.warning("job.not_released", extra={"job": job.id, "reason": str(error)})

    def _failed(self, job: Job, error: StorageError) -> None:
        """Give the job back, or bury it. A store that is away is no fault of the object: the Mover rests, a minute at most."""
        self._observe("archive.failed", retryable=error.retryable)
        try:
            if error.retryable:
                with self._lock:
                    self._failures += 1
                    rest = growing_delay(self._failures, first_s=0.5, longest_s=60.0)
                    self._rests_until = time.monotonic() + rest
                self._queue.release(job, after_s=rest, reason=str(error))
                _log.warning("archive.failed", extra={"job": job.id, "reason": str(error), "again_in_s": round(rest, 1)})
            else:
                self._archive.fail(job, str(error), retryable=False)
                _log.error("archive.failed", extra={"job": job.id, "reason": str(error)})
        except LeaseLost:
            _log.warning("job.lease_lost", extra={"job": job.id})

    def _rests(self) -> bool:
        """Whether nothing may be begun now: the store failed a moment ago, or senders are busy and patience is left."""
        now = time.monotonic()
        with self._lock:
            if now < self._rests_until:
                return True
            if not self._patience_s or self._archive.quiet_s() > _PAUSE_S:
                return False
            if self._waiting_since is None:
                self._waiting_since = now
            return now - self._waiting_since < self._patience_s and not self._archive.places.crowded()

    def _any_due(self) -> bool:
        try:
            due = bool(self._queue.lanes(JobKind.ARCHIVE))
        except StorageError as error:
            if not self._unavailable:  # said once an outage
                _log.warning("mover.queue_unavailable", extra={"reason": str(error)})
            self._unavailable = True
            return False
        self._unavailable = False
        return due
