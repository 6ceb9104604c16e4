"""Back-off for those who guess: the more failures, the longer the wait, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """How many failures are free, and the longest wait after more, in seconds: it doubles from one second on."""

    free: int
    longest_s: float


@dataclass(slots=True)
class _Failures:
    count: int
    last: float


class Throttle:
    """Counts failures by key. A wait is never extended by attempts within it, so that nobody can keep another out by trying.

    Parameters
    ----------
    patience
        Of the keys.
    capacity
        Most keys remembered; the one that failed longest ago is forgotten first.
    clock
        Seconds, monotonic.
    """

    def __init__(self, patience: Patience, *, capacity: int = 16_384, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: OrderedDict[Hashable, _Failures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures)

    def wait_s(self, key: Hashable) -> float:
        """Return the seconds until the next attempt is heard; 0: now."""
        with self._lock:
            failures = self._failures.get(key)
            if failures is None:
                return 0.0
            beyond = failures.count - self._patience.free
            if beyond < 0:
                return 0.0
            wait = min(self._patience.longest_s, 2.0 ** min(beyond, 30))
            return min(wait, max(0.0, failures.last + wait - self._clock()))  # the sum is rounded

    def failed(self, key: Hashable) -> None:
        """Count a failure. A key that did not fail for four times its longest wait begins anew."""
        now = self._clock()
        with self._lock:
            failures = self._failures.pop(key, None)
            if failures is None or now - failures.last > 4 * self._patience.longest_s:
                failures = _Failures(0, now)
            failures.count, failures.last = failures.count + 1, now
            self._failures[key] = failures
            if len(self._failures) > self._capacity:
                self._failures.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """Forget the failures of a key: it succeeded."""
        with self._lock:
            self._failures.pop(key, None)
