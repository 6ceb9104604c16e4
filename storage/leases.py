"""Leases of a batch of jobs, renewed from a thread of their own while the batch is under way."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Self

from storage.errors import LeaseLost, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from storage.records import Job
    from storage.work import WorkQueue

_log = logging.getLogger(__name__)


class Leases:
    """Renews the leases of a batch from a thread of its own, while the batch is under way.

    Parameters
    ----------
    queue
        Whose leases.
    jobs
        The batch.
    every_s
        Seconds between renewals.
    """

    def __init__(self, queue: WorkQueue, jobs: Sequence[Job], every_s: float) -> None:
        self._queue = queue
        self._every_s = every_s
        self._lock = threading.Lock()
        self._held = {job.id: job for job in jobs}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)

    @property
    def held(self) -> list[Job]:
        """Jobs of the batch that are not concluded and not lost."""
        with self._lock:
            return list(self._held.values())

    def drop(self, job: Job) -> bool:
        """Stop renewing `job`, to conclude it. False when it is ours no more."""
        with self._lock:
            return self._held.pop(job.id, None) is not None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._done.wait(self._every_s):
            for job in self.held:
                try:
                    self._queue.heartbeat(job)
                except LeaseLost:
                    _log.warning("job.lease_lost", extra={"job": job.id, "lane": job.lane})
                    self.drop(job)
                except StorageError as error:
                    _log.warning("job.heartbeat_failed", extra={"job": job.id, "reason": str(error)})
