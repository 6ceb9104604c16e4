"""The way of the log to standard error: who writes a line never waits, whatever is the matter at the other end.

A pipe whose reader is stuck, a terminal that was stopped, a volume that is full or hangs: a write of them may take for ever or fail. So
lines go into a queue of limited size, and one daemon thread writes them. What does not fit, and what could not be written, is counted
and dropped; when the writer gets through again, one line says how many were lost. Nothing is lost at a normal end: it is waited for, for
a short time. What a process wrote just before SIGKILL or a segmentation fault may be.

C libraries that write to descriptor 2 by themselves do not come through here.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

LIMIT_BYTES: Final = 4 << 20
"""Held for a reader that is slow: some ten thousand lines a process."""
END_S: Final = 2.0
"""How long the end of a process waits for its last lines to be written."""
_AT_ONCE: Final = select.PIPE_BUF
"""Lines are written together up to here: so much is never mixed with the lines of another process on one pipe."""


def _uncounted(_lines: int) -> None:
    """Count nothing."""


class LogPipe:
    """Writes text to a descriptor from a thread of its own.

    Parameters
    ----------
    descriptor
        What is written to; it stays the caller's.
    lost_line
        Makes the line that says how many were lost before it, with its line feed.
    limit_bytes
        What may wait to be written, in UTF-8; what comes when it is full is dropped.
    """

    def __init__(self, descriptor: int, *, lost_line: Callable[[int], str], limit_bytes: int = LIMIT_BYTES) -> None:
        self._descriptor = descriptor
        self._lost_line = lost_line
        self._limit_bytes = limit_bytes
        self._count: Callable[[int], None] = _uncounted
        self.lost = 0
        """Lines that were dropped since the start of this process."""
        self._closed = False
        self._begin()
        os.register_at_fork(after_in_child=self._begin)
        atexit.register(self.close)

    def _begin(self) -> None:
        """Start with nothing waiting; a child that was forked leaves to its parent what waited there."""
        lock = threading.RLock()  # a finalizer may log wherever the same thread is
        self._news, self._idle = threading.Condition(lock), threading.Condition(lock)
        self._queue: deque[bytes | int] = deque()
        """Texts, and in their places how many lines were dropped."""
        self._size = 0
        self._busy = self._stuck = self._torn = False
        self._owed = 0
        """Lines lost that were not told of yet; the writer's own."""
        if not self._closed:
            threading.Thread(target=self._run, name="log", daemon=True).start()

    def counted_by(self, count: Callable[[int], None]) -> None:
        """Have lost lines counted by `count` too, those of before at once; it must not block, and not log."""
        with self._news:
            self._count, before = count, self.lost
        if before:
            count(before)

    def write(self, text: str) -> None:
        """Have `text` written, whole lines or parts of one; returns at once."""
        data = text.encode("utf-8", "backslashreplace")
        with self._news:
            if not self._closed:
                if not self._size or self._size + len(data) <= self._limit_bytes:
                    self._queue.append(data)
                    self._size += len(data)
                    self._news.notify()
                    return
                lines = data.count(b"\n")
                if self._queue and isinstance(self._queue[-1], int):
                    self._queue[-1] += lines
                else:
                    self._queue.append(lines)
        if self._closed and self._put_at_once(data):
            return
        self._lose(data)

    def drain(self, timeout_s: float) -> bool:
        """Wait until what was written so far is out, at most `timeout_s`; not at all when nothing moved since an earlier wait in vain."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while self._queue or self._busy:
                left = deadline - time.monotonic()
                if self._stuck or left <= 0:
                    self._stuck = True
                    return False
                self._idle.wait(left)
        return True

    def close(self) -> None:
        """Write what waits, within two seconds; what is written later goes out at once, or not at all."""
        self.drain(END_S)
        self._closed = True

    def _lose(self, data: bytes) -> None:
        lines = data.count(b"\n")
        with self._news:
            self.lost += lines
            count = self._count
        count(lines)

    # -- the writer --------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                self._busy = False
                while not self._queue:
                    self._idle.notify_all()
                    self._news.wait()
                lost, data = self._taken()
                self._busy = True
            self._put(lost, data)
            self._stuck = False

    def _taken(self) -> tuple[int, bytes]:
        """Take the next piece of the queue: so many lines were dropped, or texts that fit into one write."""
        first = self._queue.popleft()
        if isinstance(first, int):
            return first, b""
        pieces, size = [first], len(first)
        while self._queue and isinstance(self._queue[0], bytes) and size + len(self._queue[0]) <= _AT_ONCE:
            pieces.append(self._queue[0])
            size += len(pieces[-1])
            self._queue.popleft()
        self._size -= size
        return 0, b"".join(pieces)

    def _put(self, lost: int, data: bytes) -> None:
        self._owed += lost
        if self._owed:
            line = ("\n" if self._torn else "") + self._lost_line(self._owed)
            if self._written(line.encode("utf-8", "backslashreplace")):
                self._owed = 0
        if data and (self._owed or not self._written(data)):
            self._owed += data.count(b"\n")
            self._lose(data)

    def _written(self, data: bytes) -> bool:
        """Write all of it, for as long as it takes; False when that failed: no space, an error of the disk, nobody there to read."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody made the descriptor, which we share, one that does not wait
                waiting = select.poll()
                waiting.register(self._descriptor, select.POLLOUT)
                waiting.poll()
            except OSError:
                self._torn = self._torn or len(left) < len(data)
                return False
        self._torn = False
        return True

    def _put_at_once(self, data: bytes) -> bool:
        """Write without a thread, when there is no more: the interpreter ends. False where that could have to wait."""
        for start in range(0, len(data), _AT_ONCE):
            ready = select.poll()
            ready.register(self._descriptor, select.POLLOUT)
            try:
                if self._stuck or not ready.poll(0):
                    return False
                os.write(self._descriptor, data[start : start + _AT_ONCE])
            except OSError:
                return False
        return True


class LogStream(io.TextIOBase):
    """A `LogPipe` as a text stream: what loggers write to, and the ``sys.stderr`` of a process that serves.

    Parameters
    ----------
    flush_s
        How long ``flush`` waits for what was written to be out; loggers flush after each line, and must not wait.
    """

    def __init__(self, pipe: LogPipe, *, descriptor: int, flush_s: float) -> None:
        super().__init__()
        self._pipe = pipe
        self._descriptor = descriptor
        self._flush_s = flush_s

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """UTF-8, as the log is."""
        return "utf-8"

    def write(self, text: str, /) -> int:
        """Hand it to the pipe."""
        self._pipe.write(text)
        return len(text)

    def flush(self) -> None:
        """Wait a moment for the pipe, if this stream does."""
        if self._flush_s:
            self._pipe.drain(self._flush_s)

    def fileno(self) -> int:
        """Give the descriptor behind it."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether that is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """It is."""
        return True
