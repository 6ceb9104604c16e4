"""Takes finished reports to the peers that are to have them, and records the proof that they arrived.

A lane is a peer. Each lane is served by one thread at a time, so a peer that is slow, away or refusing delays no other; nothing
is forgotten, because a job leaves the queue only with the peer's answer, or dead with the reason. Storage commitment has lanes of its
own beside these: reading a thousand instances again, to say that they are kept, delays no report.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from dicom_node.dimse.receive import unobserved
from dicom_node.dimse.scu import DUPLICATE, Outcome, Sendable, Stored
from dicom_node.errors import PeerUnreachable, Refused
from storage.errors import LeaseLost, StorageError
from storage.failpoints import unarmed
from storage.leases import Leases
from storage.records import Job, JobKind, JobState, Summary

if TYPE_CHECKING:
    from dicom_node.peers import Peer, Peers
    from storage.archive import Archive, StoredInstance
    from storage.work import WorkQueue

log = structlog.get_logger(__name__)

_DELIVERIES, _COMMITMENTS = "deliveries", "commitments"


class Sender(Protocol):
    """A way to a peer: C-STORE (`dicom_node.dimse.scu.StorageSCU`), STOW-RS."""

    def store(self, peer: Peer, instances: Sequence[Sendable], *, sent: Callable[[], None]) -> Iterator[tuple[Sendable, Outcome]]:
        """See `StorageSCU.store`."""


class Clerk(Protocol):
    """Sees to storage commitment (`dicom_node.clerk.CommitmentClerk`)."""

    def lanes(self) -> Sequence[str]:
        """Return the peers for which something is due."""

    def serve(self, lane: str, stop: threading.Event) -> None:
        """Do what is due for a peer."""

    def delivered(self, peer: Peer, job: Job, summary: Summary) -> None:
        """Hear that a peer acknowledged a report, before the delivery is called done."""


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A report on its way: the job, and what is read of the archive for it."""

    job: Job
    stored: StoredInstance

    @property
    def summary(self) -> Summary:
        """Identity and transfer syntax."""
        return self.stored.record.summary

    def chunks(self) -> Iterator[bytes]:
        """Data set bytes."""
        return iter(self.stored.chunks())


class Courier:
    """Delivers.

    Parameters
    ----------
    archive, queue
        Where reports and jobs are.
    peers
        Lane name -> where that is.
    sender
        How to get there; None: nothing is delivered here, only the clerk has its work done.
    clerk
        Sees to storage commitment; None: nobody does.
    reach
        Failpoints: deliver.claimed, deliver.sent, deliver.answered.
    lanes_at_once
        Threads, that is peers served at the same time.
    batch
        Most reports on one association.
    poll_s
        How often the queue is looked at.
    rest_s
        Shortest time between two looks, whatever the news: a busy sender makes some with each instance.
    heartbeat_s
        How often the leases of a batch are renewed while it is under way; a third of the queue's lease.
    wait
        Waits for news at most so many seconds (the database's ``changed``); by default just that time, or until stopped.
    observe
        Told ``delivery.stored`` (peer, seconds), ``delivery.failed`` (peer, retryable).
    """

    def __init__(
        self,
        *,
        archive: Archive,
        queue: WorkQueue,
        peers: Peers,
        sender: Sender | None,
        clerk: Clerk | None = None,
        reach: Callable[[str], None] = unarmed,
        lanes_at_once: int = 8,
        batch: int = 32,
        poll_s: float = 0.5,
        rest_s: float = 0.1,
        heartbeat_s: float = 20.0,
        owner: str = "courier",
        wait: Callable[[float], object] | None = None,
        observe: Callable[..., None] = unobserved,
    ) -> None:
        self._archive = archive
        self._queue = queue
        self._peers = peers
        self._sender = sender
        self._clerk = clerk
        self._reach = reach
        self._lanes_at_once = lanes_at_once
        self._batch = batch
        self._poll_s = poll_s
        self._rest_s = rest_s
        self._heartbeat_s = heartbeat_s
        self._owner = owner
        self._wait = wait
        self._observe = observe
        self._unavailable = False

    def run(self, stop: threading.Event) -> None:
        """Deliver until `stop` is set; a batch under way is finished first."""
        wait = self._wait or stop.wait
        busy: dict[tuple[str, str], Future[None]] = {}
        served: dict[tuple[str, str], float] = {}
        with ThreadPoolExecutor(self._lanes_at_once, thread_name_prefix="courier") as pool:
            while not stop.is_set():
                busy = {lane: future for lane, future in busy.items() if not future.done()}
                for lane in sorted(self._ready(), key=lambda lane: served.get(lane, 0.0)):
                    if lane not in busy and len(busy) < self._lanes_at_once:
                        served[lane] = time.monotonic()
                        busy[lane] = pool.submit(self._serve, *lane, stop)
                stop.wait(self._rest_s)
                wait(self._poll_s)

    def deliver(self, lane: str) -> int:
        """Take one batch of a lane's ready jobs to its peer. Returns how many were claimed."""
        jobs = list(self._claim(lane))
        if not jobs:
            return 0
        peer = self._peers.get(lane)
        with Leases(self._queue, jobs, self._heartbeat_s) as leases, ExitStack() as opened:
            if peer is None:
                for job in jobs:
                    command = f"`dicom-node peers add {lane} --ae-title TITLE --host HOST --port PORT`"
                    reason = f"no peer is called {lane} now; add it: {command}, or as [[peers]] of the configuration"
                    self._failed(leases, job, PeerUnreachable(reason))
                return len(jobs)
            parcels = [parcel for job in jobs if (parcel := self._open(leases, job, opened)) is not None]
            self._send(peer, parcels, leases)
        return len(jobs)

    def _ready(self) -> Sequence[tuple[str, str]]:
        """Return what is due: deliveries and commitments, each with its lane."""
        try:
            lanes = [(_DELIVERIES, lane) for lane in self._queue.lanes(JobKind.DELIVER)] if self._sender is not None else []
            if self._clerk is not None:
                lanes += [(_COMMITMENTS, lane) for lane in self._clerk.lanes()]
        except StorageError as error:
            if not self._unavailable:  # said once an outage
                log.warning("courier.queue_unavailable", reason=str(error))
            self._unavailable = True
            return ()
        self._unavailable = False
        return lanes

    def _serve(self, what: str, lane: str, stop: threading.Event) -> None:
        try:
            if what == _COMMITMENTS and self._clerk is not None:
                self._clerk.serve(lane, stop)
                return
            while not stop.is_set() and self.deliver(lane) == self._batch:
                pass
        except StorageError as error:  # database away: as below, but no surprise
            log.warning("courier.queue_unavailable", peer=lane, reason=str(error))
        except Exception:  # the edge of a courier thread: leases run out and the jobs are claimed again
            log.exception("courier.failed", peer=lane)

    def _claim(self, lane: str) -> Iterator[Job]:
        for _ in range(self._batch):
            job = self._queue.claim(JobKind.DELIVER, lane=lane, owner=self._owner)
            if job is None:
                return
            self._reach("deliver.claimed")
            yield job

    def _open(self, leases: Leases, job: Job, opened: ExitStack) -> Parcel | None:
        try:
            return Parcel(job, opened.enter_context(self._archive.open(job.sop_instance_uid)))
        except StorageError as error:
            self._failed(leases, job, error)
            return None

    def _send(self, peer: Peer, parcels: Sequence[Parcel], leases: Leases) -> None:
        if self._sender is None:
            raise TypeError("this courier delivers nothing: it was given no sender")
        began = time.monotonic()
        try:
            for parcel, outcome in self._sender.store(peer, parcels, sent=lambda: self._reach("deliver.sent")):
                if not isinstance(parcel, Parcel):  # pragma: no cover - a sender gives back what it was given
                    raise TypeError("the sender answered for an instance it was not given")
                self._reach("deliver.answered")
                self._conclude(peer, parcel, outcome, leases, time.monotonic() - began)
        except PeerUnreachable as error:
            for job in leases.held:
                self._failed(leases, job, error)
        for job in leases.held:  # behind an instance at which the association broke: not their fault
            if leases.drop(job):
                self._queue.release(job)

    def _conclude(self, peer: Peer, parcel: Parcel, outcome: Outcome, leases: Leases, seconds: float) -> None:
        if isinstance(outcome, Refused) and outcome.status == DUPLICATE:
            outcome = Stored(outcome.status, outcome.comment)  # a report's UID is derived from its content: an answer of it was lost
        if not isinstance(outcome, Stored):
            self._failed(leases, parcel.job, outcome)
            return
        if self._clerk is not None:
            self._clerk.delivered(peer, parcel.job, parcel.summary)
        if not leases.drop(parcel.job):
            return
        detail: dict[str, Any] = {"peer": peer.name, "ae_title": peer.ae_title}
        if outcome.comment:
            detail["comment"] = outcome.comment
        try:
            self._archive.acknowledge(parcel.job, status=outcome.status, detail=detail)
        except LeaseLost:
            log.warning("delivery.lease_lost", job=parcel.job.id, peer=peer.name)
            return
        log.info("delivery.stored", job=parcel.job.id, peer=peer.name, status=f"{outcome.status:04X}")
        self._observe("delivery.stored", peer=peer.name, seconds=seconds)

    def _failed(self, leases: Leases, job: Job, error: Refused | PeerUnreachable | StorageError | Any) -> None:
        if not leases.drop(job):
            return
        self._observe("delivery.failed", peer=job.lane, retryable=error.retryable)
        comment = getattr(error, "comment", "")
        try:
            state = self._archive.fail(job, f"{error} [{comment}]" if comment else str(error), retryable=error.retryable)
        except LeaseLost:
            log.warning("delivery.lease_lost", job=job.id, peer=job.lane)
            return
        if state is JobState.DEAD:
            remedy = f"dicom-node requeue {job.id}"
            log.error("delivery.given_up", job=job.id, peer=job.lane, attempt=job.attempts, reason=str(error), remedy=remedy)
        else:
            log.warning("delivery.failed", job=job.id, peer=job.lane, attempt=job.attempts, reason=str(error))
