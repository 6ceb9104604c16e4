"""ReadCache: copies of sealed objects on the node's own disk, so that what was just stored or read needs no journey to the store."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from storage.objects import OBJECT_KEY, FileReader, ObjectReader, relative_path

_log = logging.getLogger(__name__)

_BATCH = 4096
"""Files of which an eviction knows the age at a time: its memory does not grow with the cache."""
_STALE_S = 3600.0
"""Age at which an unfinished copy is surely no one's any more."""


class ReadCache:
    """A folder of sealed bytes by object key, limited in size; the least recently used go first.

    It holds ciphertext alone, files 0600 in folders 0700. It may be deleted at any time, also while it is used, and several processes may
    use one folder. A cache whose disk fails has nothing: such errors are logged, never raised, so that no reading and no storing
    fails for its sake. What lies in it was compared with its digest when it came; whoever finds a copy damaged later drops it and reads
    from the store.

    Parameters
    ----------
    root
        The folder, made when it is absent; on the file system of what is to be adopted.
    limit_bytes
        How much may lie in it. Each process counts its own additions and looks at the folder again after a sixteenth of the limit: with
        n processes it may for a moment hold n sixteenths more.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._counting = threading.Lock()
        self._estimate: int | None = None
        """Bytes in the folder as far as this process knows; None before it has looked."""
        self._added = 0
        """Bytes this process added since it looked."""

    def open(self, object_key: str) -> ObjectReader | None:
        """Open the copy and remember that it was used; None when there is none."""
        try:
            descriptor = os.open(self._root / relative_path(object_key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("open", error)
            return None
        try:
            os.utime(descriptor)
            return FileReader(descriptor, self._root)
        except OSError as error:
            os.close(descriptor)
            self._failed("open", error)
            return None

    def adopt(self, path: Path, object_key: str) -> bool:
        """Move a file of sealed bytes in, by renaming; False when that is impossible (the file is where it was) or it is too large."""
        target = self._root / relative_path(object_key)
        try:
            byte_count = path.stat(follow_symlinks=False).st_size
            if byte_count > self._limit_bytes:
                return False
            self._folder(target.parent)
            path.chmod(0o600, follow_symlinks=True)
            os.utime(path)
            path.rename(target)
        except OSError as error:
            self._failed("adopt", error)
            return False
        self._count(byte_count)
        return True

    def fill(self, object_key: str, chunks: Iterable[bytes], sha256: str, byte_count: int) -> bool:
        """Write a copy; it is kept, and True returned, when length and SHA-256 (hex) are right, and only then.

        What `chunks` raises is raised here; nothing is kept then.
        """
        if byte_count > self._limit_bytes:
            return False
        target = self._root / relative_path(object_key)
        new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            self._folder(target.parent)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._failed("fill", error)
            return False
        kept = False
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                digest, written = hashlib.sha256(), 0
                for chunk in chunks:
                    digest.update(chunk)
                    written += len(chunk)
                    if written > byte_count:
                        return False
                    try:
                        _write_all(descriptor, chunk)
                    except OSError as error:
                        self._failed("fill", error)
                        return False
                if (written, digest.hexdigest()) != (byte_count, sha256):
                    return False
                try:
                    os.fdatasync(file.fileno())  # else a power cut could leave a file of the right length and no content
                    new.rename(target)
                except OSError as error:
                    self._failed("fill", error)
                    return False
            kept = True
        finally:
            if not kept:
                self._unlink(new)
        self._count(byte_count)
        return True

    def drop(self, object_key: str) -> None:
        """Remove the copy; no error when there is none. A reader that has it open reads on."""
        self._unlink(self._root / relative_path(object_key))

    def evict(self) -> tuple[int, int]:
        """Remove the least recently used copies until nine tenths of the limit are left, when it is exceeded; return (files, bytes)."""
        return self._evict(wait=True, to_bytes=self._limit_bytes)

    def clear(self) -> None:
        """Remove every copy."""
        self._evict(wait=True, to_bytes=-1)

    # --- inside ----------------------------------------------------------------------------------------------------------

    def _count(self, byte_count: int) -> None:
        with self._counting:
            self._added += byte_count
            known = self._estimate
            over = known is None or known + self._added > self._limit_bytes or self._added > self._limit_bytes // 16
        if over:
            self._evict(wait=False, to_bytes=self._limit_bytes)

    def _evict(self, *, wait: bool, to_bytes: int) -> tuple[int, int]:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._root / ".lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX if wait else (fcntl.LOCK_EX | fcntl.LOCK_NB))
                except BlockingIOError:
                    return 0, 0  # another process or thread is at it
                return self._evict_alone(to_bytes)
        except OSError as error:
            self._failed("evict", error)
            return 0, 0

    def _evict_alone(self, to_bytes: int) -> tuple[int, int]:
        files = byte_count = 0
        with self._counting:
            self._added = 0
        while True:
            total = 0
            oldest: list[tuple[float, str, int]] = []  # a heap whose first is the youngest of the oldest: (-time, path, bytes)
            for entry, found in self._entries():
                if not OBJECT_KEY.fullmatch(entry.name):
                    if found.st_mtime < time.time() - _STALE_S:
                        self._unlink(Path(entry.path))
                    continue
                total += found.st_size
                item = (-found.st_mtime, entry.path, found.st_size)
                if len(oldest) < _BATCH:
                    heapq.heappush(oldest, item)
                else:
                    heapq.heappushpop(oldest, item)
            if total > to_bytes:
                for _, path, size in sorted(oldest, reverse=True):
                    if total <= to_bytes - max(0, to_bytes) // 10:
                        break
                    if not self._unlink(Path(path)):
                        return files, byte_count  # said already; another round would find the same file
                    total -= size
                    files += 1
                    byte_count += size
            if total <= to_bytes or not oldest:
                with self._counting:
                    self._estimate = total
                return files, byte_count

    def _entries(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        for number in range(256):
            with contextlib.suppress(FileNotFoundError), os.scandir(self._root / f"{number:02x}") as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed since the folder was read
                        yield entry, entry.stat(follow_symlinks=False)

    def _folder(self, folder: Path) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)

    def _unlink(self, path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._failed("remove", error)
            return False
        return True

    def _failed(self, doing: str, error: OSError) -> None:
        _log.warning("cache.failed", extra={"doing": doing, "folder": str(self._root), "reason": os.strerror(error.errno or 0)})


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]
