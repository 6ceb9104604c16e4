"""Slots for associations, shared by all receiver processes of a node; those of a process that dies are free again.

A slot is a byte of a file, held by an open-file-description lock: the kernel gives it back whatever becomes of the holder.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20
"""First byte of the callers' own ranges; each has as many bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A slot of the whole, and one of its caller."""

    of_all: int
    of_caller: int


class Slots:
    """Counts associations.

    Parameters
    ----------
    total
        How many there are for all callers together.
    path
        The file shared by the processes; None: this process alone.
    """

    def __init__(self, *, total: int, path: Path | None = None) -> None:
        if not 0 < total < _BLOCK:
            raise ValueError(f"between 1 and {_BLOCK - 1} associations")
        self.total = total
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.memfd_create("slots", os.MFD_CLOEXEC) if path is None else os.open(path, flags, 0o600)
        self._lock = threading.Lock()
        self._ours: set[int] = set()  # a description's locks do not exclude each other

    def take(self, caller: str, quota: int) -> Held | None:
        """Take a slot for a caller that may hold `quota` at once; None: no slot of his, or none at all, is free."""
        first = (zlib.crc32(caller.encode()) + 1) * _BLOCK
        with self._lock:
            of_caller = self._free(first, min(quota, self.total))
            if of_caller is None:
                return None
            of_all = self._free(0, self.total)
            if of_all is None:
                self._give(of_caller)
                return None
            return Held(of_all, of_caller)

    def give(self, held: Held) -> None:
        """Give a slot back."""
        with self._lock:
            self._give(held.of_all)
            self._give(held.of_caller)

    @property
    def held(self) -> int:
        """How many slots this process holds."""
        with self._lock:
            return len(self._ours) // 2

    def close(self) -> None:
        """Give all back."""
        os.close(self._descriptor)

    def _free(self, first: int, count: int) -> int | None:
        for position in range(first, first + count):
            if position not in self._ours and self._locked(fcntl.F_WRLCK, position):
                self._ours.add(position)
                return position
        return None

    def _give(self, position: int) -> None:
        self._ours.discard(position)
        self._locked(fcntl.F_UNLCK, position)

    def _locked(self, kind: int, position: int) -> bool:
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, position, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True
