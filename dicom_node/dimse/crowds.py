"""Whose turn it is: so many association requests a second of one address, and among those that wait the calling AE titles in turn.

A request costs the door some milliseconds before it is decided, so who sends whole ones as fast as the network carries them would take the
door's time from everybody else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

Waiting = TypeVar("Waiting")


class _Crowd(Generic[Waiting]):
    """One address: its tokens as of a time, and who waits, by AE title."""

    __slots__ = ("at", "by_title", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at
        self.by_title: OrderedDict[bytes, deque[Waiting]] = OrderedDict()


class Crowds(Generic[Waiting]):
    """Token buckets, one for each address.

    Parameters
    ----------
    rate
        Requests a second of one address.
    burst
        As many may come at once after a pause.
    """

    def __init__(self, *, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._crowds: OrderedDict[str, _Crowd[Waiting]] = OrderedDict()
        self._queues: dict[str, None] = {}
        """Addresses somebody of which waits."""

    def enter(self, one: Waiting, *, address: str, title: bytes, now: float) -> bool:
        """Whether it is this one's turn now; else he waits until `ready` gives him."""
        crowd = self._of(address, now)
        if crowd.tokens >= 1.0 and not crowd.by_title:
            crowd.tokens -= 1.0
            return True
        crowd.by_title.setdefault(title, deque()).append(one)
        self._queues[address] = None
        return False

    def ready(self, now: float) -> Iterator[Waiting]:
        """Give those whose turn has come."""
        for address in list(self._queues):
            crowd = self._of(address, now)
            while crowd.by_title and crowd.tokens >= 1.0:
                crowd.tokens -= 1.0
                title, queue = crowd.by_title.popitem(last=False)
                one = queue.popleft()
                if queue:
                    crowd.by_title[title] = queue  # behind the other titles
                yield one
            if not crowd.by_title:
                self._queues.pop(address, None)

    def next_at(self) -> float | None:
        """When somebody's turn comes; None: nobody waits."""
        crowds = [self._crowds[address] for address in self._queues]
        return min((crowd.at + (1.0 - crowd.tokens) / self._rate for crowd in crowds), default=None)

    def leave(self, one: Waiting, *, address: str, title: bytes) -> None:
        """Forget who waits no longer."""
        crowd = self._crowds.get(address)
        queue = crowd.by_title.get(title) if crowd is not None else None
        if crowd is None or queue is None or one not in queue:
            return
        queue.remove(one)
        if not queue:
            del crowd.by_title[title]

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
            if crowd.by_title or crowd.tokens + (now - crowd.at) * self._rate < self._burst:
                return
            del self._crowds[address]
