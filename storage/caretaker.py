"""The caretaker: does from time to time what keeps an archive sound. One process of all nodes does what concerns all, each node its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self

from storage.database import utc_now
from storage.errors import LeaseLost, StorageError
from storage.mover import Bandwidth, unobserved

if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType

    from storage.archive import Archive
    from storage.duties import Duties, Duty
    from storage.places import Places
    from storage.study_keys import StudyKeys

DAY_S: Final = 86_400.0
HOUR_S: Final = 3_600.0
_AGAIN_S: Final = 600.0
"""After a failure: soon, but not at once."""
_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """The work was stopped between two steps."""


class _Held(Exception):
    """The work is not to be done now; an operator is told why."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A duty as the caretaker does it."""

    every_s: float
    run: Callable[[_Watch], object]
    """Does it; what it returns is told to people."""
    remembers: bool = False
    """Whether its cursor stays when a round ended well."""


class _Watch:
    """Keeps a duty in hand while it is done: renews it, from a thread of its own; holds the speed, notices the stop."""

    def __init__(self, duty: Duty, duties: Duties, stop: threading.Event, *, bandwidth: Bandwidth, renew_s: float) -> None:
        self.cursor = duty.cursor
        self._name = duty.name
        self._duties = duties
        self._stop = stop
        self._bandwidth = bandwidth
        self._renew_s = renew_s
        self._lock = threading.Lock()
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="duty", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def save(self, cursor: str) -> None:
        """Remember how far the duty came."""
        with self._lock:
            self._duties.renew(self._name, cursor=cursor)
            self.cursor = cursor

    def pace(self, byte_count: int) -> None:
        """Wait until so many bytes may have been read."""
        wait_s = self._bandwidth.take(byte_count)
        while True:
            if self._lost:
                raise LeaseLost(f"another process took the duty {self._name}")
            if self._stop.wait(min(wait_s, self._renew_s)):
                raise _Stopped
            wait_s -= self._renew_s
            if wait_s <= 0:
                return

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                with self._lock:
                    self._duties.renew(self._name, cursor=self.cursor)
            except LeaseLost:
                self._lost = True
                return
            except StorageError as error:
                _log.warning("duty.not_renewed", extra={"duty": self._name, "reason": str(error)})


class Caretaker:
    """Does the duties of this process's node, and those of all nodes that nobody else is doing.

    Parameters
    ----------
    archive, places, study_keys, duties
        Of this node; `Archive.caretaker` makes one.
    scrub_days
        How often everything is read again; 0: never.
    scrub_bytes_per_s
        How fast; 0: as fast as it goes.
    orphan_grace
        Age at which an object without a row is decided about.
    retention_days
        As `storage.retention.Retention`; 0: never.
    poll_s
        How often it is looked what is due.
    renew_s
        How often a duty in hand is renewed; a quarter of its lease.
    observe
        Told ``duty.finished`` (duty, failed, seconds).
    clock
        Time of day.
    """

    def __init__(
        self,
        *,
        archive: Archive,
        places: Places,
        study_keys: StudyKeys,
        duties: Duties,
        scrub_days: float = 30.0,
        scrub_bytes_per_s: int = 20 * 1024**2,
        orphan_grace: timedelta = timedelta(hours=24),
        retention_days: float = 0.0,
        poll_s: float = 30.0,
        renew_s: float = 30.0,
        observe: Callable[..., None] = unobserved,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._archive = archive
        self._places = places
        self._study_keys = study_keys
        self._duties = duties
        self._scrub_bytes_per_s = scrub_bytes_per_s
        self._orphan_grace = orphan_grace
        self._retention_days = retention_days
        self._poll_s = poll_s
        self._renew_s = renew_s
        self._observe = observe
        self._clock = clock
        tasks = {
            "documents": _Task(HOUR_S, self._documents),
            "orphans": _Task(DAY_S, lambda watch: archive.orphans().sweep(grace=orphan_grace, pace=watch.pace)),
            "uploads": _Task(DAY_S, self._uploads),
        }
        if retention_days > 0:
            tasks["retention"] = _Task(DAY_S, self._retention, remembers=True)
        if scrub_days > 0:
            tasks["scrub"] = _Task(scrub_days * DAY_S, lambda watch: archive.scrub().round(watch.cursor, save=watch.save, pace=watch.pace))
        own = {"landing": _Task(HOUR_S, lambda _: f"{archive.sweep()} files of dead processes removed")}
        if places.spool is not None:
            own["spool"] = _Task(HOUR_S, lambda watch: archive.orphans().sweep_spool(grace=orphan_grace, pace=watch.pace))
        if places.cache is not None:
            own["cache"] = _Task(HOUR_S / 6, self._cache)
        tasks |= {f"{name} {places.node_id}".strip(): task for name, task in own.items()}
        self._tasks: Mapping[str, _Task] = tasks

    @property
    def duties(self) -> list[str]:
        """Names of what this caretaker does."""
        return list(self._tasks)

    def run(self, stop: threading.Event) -> None:
        """Do what is due until `stop` is set; what is under way is left in order, and goes on later where it was."""
        while not stop.is_set():
            self.do_due(stop)
            stop.wait(self._poll_s)

    def do_due(self, stop: threading.Event, only: str | None = None) -> list[str]:
        """Do once what is due now (or the one of that name); return the names of what was done, well or badly."""
        done = []
        for name, task in self._tasks.items():
            if stop.is_set() or only not in (None, name):
                continue
            try:
                duty = self._duties.take(name, every_s=task.every_s)
                if duty is not None:
                    self._do(duty, task, stop)
                    done.append(name)
            except LeaseLost:
                _log.warning("duty.lost", extra={"duty": name})  # it took too long over one step, and another went on with it
            except StorageError as error:
                _log.warning("duty.unavailable", extra={"duty": name, "reason": str(error)})
        return done

    def _do(self, duty: Duty, task: _Task, stop: threading.Event) -> None:
        bandwidth = Bandwidth(self._scrub_bytes_per_s)
        watch = _Watch(duty, self._duties, stop, bandwidth=bandwidth, renew_s=self._renew_s)
        began = time.monotonic()
        try:
            with watch:
                outcome = str(task.run(watch))
        except _Held as error:
            _log.error("duty.held", extra={"duty": duty.name, "reason": str(error)})
            self._observe("duty.finished", duty=duty.name, failed=True, seconds=0.0)
            self._duties.finish(duty.name, every_s=task.every_s, outcome=f"held: {error}", cursor=watch.cursor)
        except _Stopped:
            self._duties.finish(duty.name, every_s=0.0, outcome="stopped; it goes on where it was", cursor=watch.cursor)
        except LeaseLost:
            raise
        except StorageError as error:
            self._failed(duty, task, watch, str(error))
        except Exception as error:  # noqa: BLE001 - the edge of a duty: the others go on
            _log.exception("duty.failed", extra={"duty": duty.name})
            self._failed(duty, task, watch, type(error).__name__)
        else:
            cursor = watch.cursor if task.remembers else ""
            self._duties.finish(duty.name, every_s=task.every_s, outcome=outcome or "nothing to do", cursor=cursor)
            _log.info("duty.finished", extra={"duty": duty.name, "outcome": outcome})
            self._observe("duty.finished", duty=duty.name, failed=False, seconds=time.monotonic() - began)

    def _failed(self, duty: Duty, task: _Task, watch: _Watch, reason: str) -> None:
        _log.warning("duty.failed", extra={"duty": duty.name, "reason": reason})
        self._observe("duty.finished", duty=duty.name, failed=True, seconds=0.0)
        self._duties.finish(duty.name, every_s=min(_AGAIN_S, task.every_s), outcome=f"failed: {reason}", cursor=watch.cursor)

    # -- the duties that are no single call ----------------------------------------------------------------------------------------

    def _documents(self, _watch: _Watch) -> str:
        store = self._places.store
        keys = self._study_keys.publish_all(put_document=store.put_document, delete_document=store.delete_document)
        marks = self._archive.quarantine().synchronise_marks()
        return f"{keys} documents of keys, {marks} marks of the quarantine put right"

    def _uploads(self, _watch: _Watch) -> str:
        clean: Callable[[datetime], int] | None = getattr(self._places.store, "clean_uploads", None)
        return "a directory has none" if clean is None else f"{clean(self._clock() - self._orphan_grace)} uploads given up"

    def _retention(self, watch: _Watch) -> str:
        retention = self._archive.retention(days=self._retention_days)
        first, noted = not watch.cursor, retention.noted(watch.cursor)
        if doubt := retention.doubt(noted):
            watch.save(noted)
            retention.note_doubt(doubt)
            raise _Held(doubt)
        if first:
            watch.cursor = retention.believed(noted)  # kept with the end of this round: the next is a day later, whatever happens here
            return "the time is noted; what is due is erased from the next round on, in a day"
        watch.save(retention.believed(noted))
        return f"{retention.erase_due(pace=watch.pace)} studies erased"

    def _cache(self, _watch: _Watch) -> str:
        files, byte_count = self._places.cache.evict() if self._places.cache is not None else (0, 0)
        return f"{files} files, {byte_count} bytes removed"
