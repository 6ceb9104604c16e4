"""The landing folder: where sealed bytes lie between their arrival and the store.

Each process owns one sub-folder and holds a lock on it while it lives; what lies in a sub-folder whose lock is free was left by a
dead process and is swept. Files are created exclusively, mode 0600, under random names; only ciphertext is ever written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import Unavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SPACE_EVERY = 64 * 1024**2


class Landing:
    """Makes landing files, guards the free space, remembers a disk that failed.

    Parameters
    ----------
    root
        The landing folder, shared by all processes of the node; on the file system of a `DirectoryStore`.
    min_free_bytes
        Below this much free space nothing more is taken in.
    max_bytes_in_flight
        Above so many bytes that this process received and has not committed nothing more is taken in; 0: no limit.
    """

    def __init__(self, root: Path, *, min_free_bytes: int, max_bytes_in_flight: int = 0) -> None:
        self._root = root
        self._min_free_bytes = min_free_bytes
        self._max_bytes_in_flight = max_bytes_in_flight
        self._in_flight = 0
        self._lock = threading.Lock()
        self._own: tuple[int, Path, int] | None = None
        self._fault = ""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self.failure(error) from error

    def create(self) -> LandingFile:
        """Make a landing file; Unavailable when the disk is full or has failed."""
        self.check()
        try:
            path = f"{self._folder()}/{secrets.token_hex(16)}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self.failure(error) from error
        return LandingFile(self, Path(path), descriptor)

    def flown(self, byte_count: int) -> None:
        """Note bytes that came into flight, or left it (negative).

        Raises
        ------
        Unavailable
            Too many are in flight: the disk or the store does not keep up. The bytes are not counted.
        """
        with self._lock:
            if byte_count > 0 and self._max_bytes_in_flight and self._in_flight + byte_count > self._max_bytes_in_flight:
                raise Unavailable(
                    f"{self._in_flight >> 20} MiB are received and not committed yet, {self._max_bytes_in_flight >> 20} MiB are allowed: "
                    "send again in a while; if this goes on, look whether disk and store keep up",
                )
            self._in_flight += byte_count

    def check(self) -> None:
        """Raise Unavailable when nothing can be taken in: too little space, or a flush failed since the start."""
        if self._fault:
            raise Unavailable(self._fault)
        try:
            space = os.statvfs(self._root)
        except OSError as error:
            raise self.failure(error) from error
        free = space.f_bavail * space.f_frsize
        if free < self._min_free_bytes:
            raise Unavailable(
                f"{self._root}: {free >> 20} MiB free, {self._min_free_bytes >> 20} MiB are kept in reserve; free space or enlarge it",
            )

    def quiet_s(self) -> float:
        """Return for how many seconds no process of this node began or ended a landing file; by the folders' times, read from the disk.

        Many when nothing can be told. A clock that was set makes it wrong once, until the next file.
        """
        latest = 0.0
        with suppress(OSError):  # a disk that cannot be read has nobody busy
            for entry in os.scandir(self._root):
                with suppress(FileNotFoundError):  # a process ended
                    latest = max(latest, entry.stat(follow_symlinks=False).st_mtime)
        return max(time.time() - latest, 0.0)

    def failure(self, error: OSError) -> Unavailable:
        """Return what `error` means for the sender, and remember an input/output error: the disk cannot be believed any more."""
        if error.errno == errno.EIO:
            # What a failed flush dropped may be reported as written by the next one, so there is no next one.
            self._fault = f"{self._root}: the disk reported an I/O error; look into the kernel log, replace it, start the node again"
            return Unavailable(self._fault)
        reasons = {
            errno.ENOSPC: "the disk is full; free space or enlarge it",
            errno.EDQUOT: "the quota is used up; raise it",
            errno.EROFS: "the file system is read-only; look into the kernel log and remount it",
            errno.EACCES: "access is denied; the folder must belong to the node's user",
            errno.EMFILE: "too many open files; raise the limit of open files (ulimit -n)",
            errno.ENOENT: "the folder is gone; restore it",
        }
        return Unavailable(f"{self._root}: {reasons.get(error.errno or 0, os.strerror(error.errno or 0))}")

    def sweep(self) -> int:
        """Remove what dead processes left behind and return how many files; safe while other processes work."""
        removed = 0
        try:
            for folder in sorted(self._root.iterdir()):
                if folder.is_symlink() or not folder.is_dir():
                    continue
                removed += self._sweep_folder(folder)
        except OSError as error:
            raise self.failure(error) from error
        return removed

    def close(self) -> None:
        """Give the own folder back; it is removed if empty."""
        with self._lock:
            if self._own is None or self._own[0] != os.getpid():
                return
            _, path, descriptor = self._own
            self._own = None
            with suppress(OSError):
                path.rmdir()
            os.close(descriptor)

    def _folder(self) -> Path:
        """Return this process's own, locked folder; after a fork the child makes another."""
        with self._lock:
            if self._own is not None and self._own[0] == os.getpid():
                return self._own[1]
            while True:
                path = self._root / secrets.token_hex(8)
                path.mkdir(mode=0o700)
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                # Between mkdir and the lock another process may have swept the folder away: then it lost its name.
                if _locked(descriptor) and path.is_dir():
                    self._own = (os.getpid(), path, descriptor)
                    return path
                os.close(descriptor)

    @staticmethod
    def _sweep_folder(folder: Path) -> int:
        removed = 0
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0  # another process swept it
        try:
            if not _locked(descriptor):
                return 0  # its owner lives
            for name in os.listdir(descriptor):  # noqa: PTH208 - by descriptor: a path could lead elsewhere
                os.unlink(name, dir_fd=descriptor)
                removed += 1
            with suppress(FileNotFoundError):
                folder.rmdir()
        finally:
            os.close(descriptor)
        return removed


class LandingFile:
    """One landing file: written from the front, flushed once, then moved into the store or discarded."""

    def __init__(self, landing: Landing, path: Path, descriptor: int) -> None:
        self.path = path
        self._landing = landing
        self._descriptor = descriptor
        self._until_check = _SPACE_EVERY
        self._in_flight = 0

    def write(self, chunk: Buffer) -> None:
        """Append `chunk`."""
        view = memoryview(chunk).cast("B")
        self._until_check -= len(view)
        if self._until_check < 0:
            self._until_check = _SPACE_EVERY
            self._landing.check()
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise self._landing.failure(error) from error

    def reserve(self, byte_count: int) -> None:
        """Count bytes that were received for this file; Unavailable when too much is in flight."""
        self._landing.flown(byte_count)
        self._in_flight += byte_count

    def release(self) -> None:
        """Count its bytes no longer: they are committed, or given up."""
        self._landing.flown(-self._in_flight)
        self._in_flight = 0

    def flush(self) -> None:
        """Bring the bytes to the disk; on return a power cut cannot take them."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._landing.failure(error) from error

    def reader(self) -> LandingReader:
        """Return a reader of what was written; it lives as long as this file is open."""
        return LandingReader(self._landing, self._descriptor)

    def close(self) -> None:
        """Close the descriptor; the file stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.release()

    def discard(self) -> None:
        """Close and remove; no error when the store has consumed the file."""
        self.close()
        with suppress(OSError):  # a file that cannot be removed is ciphertext without a row; the next start sweeps it
            self.path.unlink()


class LandingReader:
    """Reads a landing file back before it is in the store; an ``ObjectReader``."""

    def __init__(self, landing: Landing, descriptor: int) -> None:
        self._landing = landing
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`."""
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise self._landing.failure(error) from error

    def close(self) -> None:
        """Do nothing: the landing file stays open."""


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
