"""Object stores: sealed objects under opaque keys, in a directory (here) or in an S3 bucket (`storage.s3`).

Both keep the same layout (``ab/abcdef…``: two digits of the key, then the key), so that a bucket copied to a disk is a
`DirectoryStore` and the other way round. A store sees only ciphertext and knows nothing of DICOM.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from storage.errors import InstanceNotFound, IntegrityError, Unavailable
from storage.failpoints import unarmed

if TYPE_CHECKING:
    from storage.records import SealedObject

OBJECT_KEY = re.compile(r"[0-9a-f]{32}")
CHUNK = 1 << 20
_FOLDERS = tuple(f"{number:02x}" for number in range(256))


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing of the store tells it."""

    object_key: str
    byte_count: int
    modified_at: datetime
    """Aware, UTC: when the store took it."""


class ObjectReader(Protocol):
    """An object opened for reading, usable from one thread at a time."""

    @property
    def size(self) -> int:
        """Bytes of the sealed object."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; fewer only where the object ends."""
        ...

    def close(self) -> None:
        """Give back what the reader holds; may be called twice."""
        ...


class ObjectStore(Protocol):
    """A place for sealed objects."""

    @property
    def remote(self) -> bool:
        """Whether every ``put`` is a journey, so that one in vain is worth avoiding."""
        ...

    def put(self, object_key: str, landing_file: Path, sealed: SealedObject) -> None:
        """Store a landing file whose bytes are already flushed, and consume it.

        On return the object is durable and its digest confirmed; the landing file is gone. On an error it is still there.

        Raises
        ------
        Unavailable
            The store did not take the object, or did not keep what it said it took.
        IntegrityError
            There is an object of that key with other bytes.
        """
        ...

    def open(self, object_key: str) -> ObjectReader:
        """Open an object; InstanceNotFound when there is none, Unavailable when the store cannot say."""
        ...

    def delete(self, object_key: str) -> None:
        """Remove an object; no error when there is none."""
        ...

    def list(self) -> Iterator[ObjectInfo]:
        """Yield every object, by rising key."""
        ...

    def check(self) -> None:
        """Raise Unavailable with cause and remedy when the store cannot work now (readiness)."""
        ...


def relative_path(object_key: str) -> str:
    """Where an object lies below the root or the prefix; ValueError for what is no key of ours."""
    if not OBJECT_KEY.fullmatch(object_key):
        raise ValueError("an object key is 32 lower-case hexadecimal digits; nothing that came from a peer may be one")
    return f"{object_key[:2]}/{object_key}"


# --- directory -------------------------------------------------------------------------------------------------------


class DirectoryStore:
    """Objects as files of a directory: 256 folders made at the start, files 0600 in folders 0700.

    ``put`` is a link and an unlink, not a copy: landing files must lie on the same file system. A link never replaces
    an object that is there, which a rename would do.
    """

    remote = False

    def __init__(self, root: Path, *, reach: Callable[[str], None] = unarmed) -> None:
        self._root = root
        self._reach = reach
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in _FOLDERS:
                (root / folder).mkdir(mode=0o700, exist_ok=True)
            _flush_directory(root)
            _flush_directory(root.parent)
        except OSError as error:
            raise disk_unavailable(error, root) from error

    def put(self, object_key: str, landing_file: Path, sealed: SealedObject) -> None:
        """Link the flushed landing file into its folder and flush the folder. See `ObjectStore.put`.

        The digest needs no second reading here: the file is the one that was sealed, flushed and never reopened. Its
        length is compared, against a mix-up of landing files.
        """
        name = Path(relative_path(object_key)).name
        try:
            folder = os.open(self._root / object_key[:2], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                landed = landing_file.stat(follow_symlinks=False)
                if not stat.S_ISREG(landed.st_mode) or landed.st_size != sealed.byte_count:
                    raise IntegrityError(
                        f"the landing file of object {object_key} has {landed.st_size} bytes where {sealed.byte_count} were sealed; "
                        "something else writes into the landing folder",
                    )
                try:
                    os.link(landing_file, name, dst_dir_fd=folder, follow_symlinks=False)
                except FileExistsError as error:
                    if _digest_of_file(self._root / relative_path(object_key)) != (sealed.byte_count, sealed.sha256):
                        raise occupied(object_key) from error
                self._reach("object.renamed")
                os.fsync(folder)
                self._reach("directory.flushed")
            finally:
                os.close(folder)
            landing_file.unlink()
        except OSError as error:
            raise disk_unavailable(error, self._root) from error

    def open(self, object_key: str) -> ObjectReader:
        """Open the object's file, never through a symbolic link."""
        try:
            descriptor = os.open(self._root / relative_path(object_key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise absent(object_key) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise IntegrityError(f"object {object_key} is a symbolic link; the store makes none: someone changed it") from error
            raise disk_unavailable(error, self._root) from error
        return _FileReader(descriptor, self._root)

    def delete(self, object_key: str) -> None:
        """Unlink the object's file. The removal becomes durable with the folder's next flush; a sweep would find it again."""
        try:
            (self._root / relative_path(object_key)).unlink(missing_ok=True)
        except OSError as error:
            raise disk_unavailable(error, self._root) from error

    def list(self) -> Iterator[ObjectInfo]:
        """Yield every object by rising key; files that are no objects are passed over."""
        for folder in _FOLDERS:
            try:
                names = sorted(file.name for file in (self._root / folder).iterdir() if OBJECT_KEY.fullmatch(file.name))
            except OSError as error:
                raise disk_unavailable(error, self._root) from error
            for name in names:
                try:
                    found = (self._root / folder / name).stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed since the folder was read
                yield ObjectInfo(name, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def check(self) -> None:
        """Look whether the root is there and may be written."""
        if not self._root.is_dir():
            raise Unavailable(f"the object directory {self._root} is gone; mount or restore it")
        if not os.access(self._root / _FOLDERS[0], os.W_OK | os.X_OK):
            raise Unavailable(f"the object directory {self._root} cannot be written; look for a read-only mount or wrong ownership")


class _FileReader:
    def __init__(self, descriptor: int, root: Path) -> None:
        self._descriptor = descriptor
        self._root = root
        self.size = os.fstat(descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            whole = os.pread(self._descriptor, length, offset)
            if len(whole) == length or offset + len(whole) >= self.size:
                return whole
            parts = [whole]  # a signal or the kernel's 2 GiB limit cut the read short
            got = len(whole)
            while got < length:
                part = os.pread(self._descriptor, length - got, offset + got)
                if not part:
                    break
                parts.append(part)
                got += len(part)
            return b"".join(parts)
        except OSError as error:
            raise disk_unavailable(error, self._root) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_of_file(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    count = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            count += len(chunk)
    return count, digest.hexdigest()


def absent(object_key: str) -> InstanceNotFound:
    """The error for an object that is not there."""
    return InstanceNotFound(f"the store holds no object {object_key}; run verify: it lists every object that is missing")


def occupied(object_key: str) -> IntegrityError:
    """The error for a key that holds other bytes."""
    return IntegrityError(
        f"the store already holds an object {object_key} of other bytes; keys are random: do two nodes share one key ring state?"
    )


def disk_unavailable(error: OSError, where: Path) -> Unavailable:
    """The error for a disk that does not take or give bytes, with its remedy."""
    remedies = {
        errno.ENOSPC: "the disk is full; free space or enlarge it",
        errno.EDQUOT: "the quota is used up; raise it",
        errno.EIO: "the disk reports an I/O error; look into the kernel log and replace it",
        errno.EROFS: "the file system is read-only; look into the kernel log and remount it",
        errno.EACCES: "access is denied; the directory must belong to the node's user",
        errno.EXDEV: "landing and object directory lie on different file systems; put both on one",
        errno.EMFILE: "too many open files; raise the limit of open files (ulimit -n)",
        errno.ENFILE: "too many open files on the system; raise fs.file-max",
        errno.ENOENT: "a directory or file is gone; restore it and start again",
    }
    return Unavailable(f"{where}: {remedies.get(error.errno or 0, os.strerror(error.errno or 0))}")
