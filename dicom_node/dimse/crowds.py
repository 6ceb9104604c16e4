"""Whose turn it is: so many association requests a second of one address, and among those that wait the callers of it in turn.

A request costs the door some milliseconds before it is decided, so who sends whole ones as fast as the network carries them would take the
door's time from everybody else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

Waiting = TypeVar("Waiting")

_CALLERS = 256
"""Callers of one address whose last turn is remembered."""


class _Crowd(Generic[Waiting]):
    """One address: its tokens as of a time, and who waits, by caller; first the caller whose last turn is longest ago."""

    __slots__ = ("at", "by_caller", "count", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.by_caller: OrderedDict[Hashable, deque[Waiting]] = OrderedDict()
        self.count = 0

    def add(self, one: Waiting, caller: Hashable) -> None:
        """Let one wait; a caller who never had a turn is the next."""
        queue = self.by_caller.get(caller)
        if queue is None:
            queue = self.by_caller[caller] = deque()
            self.by_caller.move_to_end(caller, last=False)
        queue.append(one)
        self.count += 1

    def had_turn(self, caller: Hashable) -> None:
        """Put a caller behind the others, and forget who had his turn long ago and does not wait."""
        self.by_caller.setdefault(caller, deque())
        self.by_caller.move_to_end(caller)
        if len(self.by_caller) > _CALLERS:
            idle = next((one for one, queue in self.by_caller.items() if not queue), None)
            if idle is not None:
                del self.by_caller[idle]

    def next(self) -> Waiting:
        """Take out who is next."""
        caller, queue = next((caller, queue) for caller, queue in self.by_caller.items() if queue)
        one = queue.popleft()
        self.count -= 1
        self.had_turn(caller)
        return one


class Crowds(Generic[Waiting]):
    """Token buckets, one for each address.

    Parameters
    ----------
    rate
        Requests a second of one address; 0: as many as come.
    burst
        As many may come at once after a pause.
    """

    def __init__(self, *, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._crowds: OrderedDict[str, _Crowd[Waiting]] = OrderedDict()
        self._queues: dict[str, None] = {}
        """Addresses somebody of which waits."""

    def enter(self, one: Waiting, *, address: str, caller: Hashable, now: float) -> bool:
        """Whether it is this one's turn now; else he waits until `ready` gives him."""
        if not self._rate:
            return True
        crowd = self._of(address, now)
        if crowd.tokens >= 1.0 and not crowd.count:
            crowd.tokens -= 1.0
            crowd.had_turn(caller)
            return True
        crowd.add(one, caller)
        self._queues[address] = None
        return False

    def ready(self, now: float) -> Iterator[Waiting]:
        """Give those whose turn has come."""
        for address in list(self._queues):
            crowd = self._of(address, now)
            while crowd.count and crowd.tokens >= 1.0:
                crowd.tokens -= 1.0
                yield crowd.next()
            if not crowd.count:
                self._queues.pop(address, None)

    def give_back(self, address: str) -> None:
        """Hear that a turn was not used."""
        if (crowd := self._crowds.get(address)) is not None:
            crowd.tokens = min(self._burst, crowd.tokens + 1.0)

    def next_at(self) -> float | None:
        """When somebody's turn comes; None: nobody waits."""
        crowds = [self._crowds[address] for address in self._queues]
        return min((crowd.at + (1.0 - crowd.tokens) / self._rate for crowd in crowds), default=None)

    def leave(self, one: Waiting, *, address: str, caller: Hashable) -> None:
        """Forget who waits no longer."""
        crowd = self._crowds.get(address)
        queue = crowd.by_caller.get(caller) if crowd is not None else None
        if crowd is None or queue is None or one not in queue:
            return
        queue.remove(one)
        crowd.count -= 1
        if not crowd.count:
            self._queues.pop(address, None)

    def _of(self, address: str, now: float) -> _Crowd[Waiting]:
        crowd = self._crowds.get(address)
        if crowd is None:
            self._forget_old(now)
            crowd = self._crowds[address] = _Crowd(self._burst, now)
        crowd.tokens = min(self._burst, crowd.tokens + max(0.0, now - crowd.at) * self._rate)
        crowd.at = now
        self._crowds.move_to_end(address)
        return crowd

    def _forget_old(self, now: float) -> None:
        """Forget addresses whose bucket is full again; at most two at a time, which is more than come."""
        for address in list(islice(self._crowds, 2)):
            crowd = self._crowds[address]
            if crowd.count or crowd.tokens + (now - crowd.at) * self._rate < self._burst:
                return
            del self._crowds[address]
