"""Object stores: sealed objects under opaque keys, in a directory (here) or in an S3 bucket (`storage.s3`).

Both keep the same layout (``ab/abcdef…``: two digits of the key, then the key), so that a bucket copied to a disk is a
`DirectoryStore` and the other way round. A store sees only ciphertext and knows nothing of DICOM. Beside the objects lie
*documents*: small named things that make the store describe itself (``keys/ab/abcdef…``: wrapped study keys).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from storage.errors import InstanceNotFound, IntegrityError, Unavailable
from storage.failpoints import unarmed

if TYPE_CHECKING:
    from storage.records import SealedObject

OBJECT_KEY = re.compile(r"[0-9a-f]{32}")
DOCUMENT_NAME = re.compile(r"[a-z]+/[0-9a-f]{2}/[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{8}")
"""A document on its way in, or what a kill left of it."""
DOCUMENT_PREFIX = re.compile(r"[a-z]+/(?:[0-9a-f]{2}/)?")
DOCUMENT_BYTES = 64 << 10
"""The largest document."""
CHUNK = 1 << 20
_FOLDERS = tuple(f"{number:02x}" for number in range(256))
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as the store itself tells it (a listing, a `stat`): believed for existence and length, proof of no byte."""

    object_key: str
    byte_count: int
    modified_at: datetime
    """Aware, UTC: when the store took it."""
    cold: bool = False
    """Whether it lies in a class that must be restored before it can be read. A listing also calls a restored copy cold."""


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

    def put(self, object_key: str, path: Path, sealed: SealedObject, *, tags: Mapping[str, str] | None = None) -> None:
        """Store a file whose bytes are already flushed. The file stays: the caller removes it, after its commit.

        On return the object is durable and its digest confirmed. The same bytes under the same key are accepted again.

        Parameters
        ----------
        tags
            For the lifecycle rules of a bucket; never anything of a patient. A directory has none and passes over them.

        Raises
        ------
        Unavailable
            The store did not take the object, or did not keep what it said it took.
        IntegrityError
            There is an object of that key with other bytes, or the file is not as long as what was sealed.
        """
        ...

    def open(self, object_key: str) -> ObjectReader:
        """Open an object for reading.

        Raises
        ------
        InstanceNotFound
            There is none.
        ColdObject
            It lies in a cold class; its restore is under way now, ``retry_after_s`` says when to come again.
        Unavailable
            The store cannot say.
        """
        ...

    def stat(self, object_key: str) -> ObjectInfo:
        """Tell length and age of an object without reading it (nor restoring a cold one); raises as `open` does, but never ColdObject."""
        ...

    def sha256(self, object_key: str) -> str:
        """Return the SHA-256 (hexadecimal) of an object as the store keeps it; empty when it keeps none. Raises as `stat`."""
        ...

    def delete(self, object_key: str, *, versions: bool = False) -> None:
        """Remove an object; no error when there is none.

        With `versions` (erasure) every version that a versioned bucket keeps is removed, and the removal is durable on return.
        """
        ...

    def list(self) -> Iterator[ObjectInfo]:
        """Yield every object, by rising key, in bounded memory."""
        ...

    def put_document(self, name: str, content: bytes) -> None:
        """Write a document of at most 64 KiB, or replace it; durable and confirmed on return. ValueError for a bad name or too much."""
        ...

    def get_document(self, name: str) -> bytes:
        """Return a document; InstanceNotFound when there is none, Unavailable when the store cannot say."""
        ...

    def delete_document(self, name: str) -> None:
        """Remove a document, every version of it; no error when there is none; durable on return."""
        ...

    def list_documents(self, prefix: str) -> Iterator[str]:
        """Yield the names of the documents below `prefix` (``keys/`` or ``keys/ab/``) in rising order."""
        ...

    def check(self) -> None:
        """Raise Unavailable with cause and remedy when the store cannot work now (readiness)."""
        ...


def relative_path(object_key: str) -> str:
    """Where an object lies below the root or the prefix; ValueError for what is no key of ours."""
    if not OBJECT_KEY.fullmatch(object_key):
        raise ValueError("an object key is 32 lower-case hexadecimal digits; nothing that came from a peer may be one")
    return f"{object_key[:2]}/{object_key}"


def document_path(name: str) -> str:
    """Where a document lies below the root or the prefix; ValueError for what is no name of ours."""
    if not DOCUMENT_NAME.fullmatch(name):
        raise ValueError("a document is named by lower-case letters, two hexadecimal digits and 32 of them, with slashes between")
    return name


def document_prefix(prefix: str) -> str:
    """Return `prefix`; ValueError when no document's name begins so."""
    if not DOCUMENT_PREFIX.fullmatch(prefix):
        raise ValueError("documents are listed below 'letters/' or 'letters/two hexadecimal digits/'")
    return prefix


def document_content(content: bytes) -> bytes:
    """Return `content`; ValueError when it is too much for a document."""
    if len(content) > DOCUMENT_BYTES:
        raise ValueError(f"a document has at most {DOCUMENT_BYTES} bytes, this one {len(content)}")
    return content


# --- directory -------------------------------------------------------------------------------------------------------


class DirectoryStore:
    """Objects as files of a directory: 256 folders made at the start, files 0600 in folders 0700.

    ``put`` is a link, not a copy: what is put must lie on the same file system. A link never replaces an object that is
    there, which a rename would do.
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

    def put(self, object_key: str, path: Path, sealed: SealedObject, *, tags: Mapping[str, str] | None = None) -> None:  # noqa: ARG002 - S3's
        """Link the flushed file into its folder and flush the folder. See `ObjectStore.put`.

        The digest needs no second reading here: the file is the one that was sealed, flushed and never reopened. Its
        length is compared, against a mix-up of files.
        """
        name = relative_path(object_key)[3:]
        try:
            folder = os.open(f"{self._root}/{name[:2]}", _FOLDER)
            try:
                landed = os.lstat(path)
                if not stat.S_ISREG(landed.st_mode) or landed.st_size != sealed.byte_count:
                    raise wrong_length(object_key, landed.st_size, sealed.byte_count)
                try:
                    os.link(path, name, dst_dir_fd=folder, follow_symlinks=False)
                except FileExistsError as error:
                    if _digest_of_file(self._root / relative_path(object_key)) != (sealed.byte_count, sealed.sha256):
                        raise occupied(object_key) from error
                self._reach("object.renamed")
                os.fsync(folder)
                self._reach("directory.flushed")
            finally:
                os.close(folder)
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
        return FileReader(descriptor, self._root)

    def stat(self, object_key: str) -> ObjectInfo:
        """Look at the object's file."""
        try:
            found = (self._root / relative_path(object_key)).stat(follow_symlinks=False)
        except FileNotFoundError as error:
            raise absent(object_key) from error
        except OSError as error:
            raise disk_unavailable(error, self._root) from error
        return ObjectInfo(object_key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def sha256(self, object_key: str) -> str:
        """Return nothing: a directory keeps no digests. Read the file."""
        self.stat(object_key)
        return ""

    def path_of(self, object_key: str) -> Path:
        """Return where an object's file lies, for handing it on; nobody writes there."""
        return self._root / relative_path(object_key)

    @contextmanager
    def held(self, object_key: str) -> Iterator[Path]:
        """Give a second name of an object's file, good to its end even when the object is deleted meanwhile; `clean_uploads` after a kill.

        Raises
        ------
        InstanceNotFound, Unavailable
            As `open`.
        """
        path = self._root / "keys" / object_key[:2] / f".{object_key}.{secrets.token_hex(4)}"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.link(self._root / relative_path(object_key), path, follow_symlinks=False)
            os.utime(path)  # young for who cleans
        except FileNotFoundError as error:
            raise absent(object_key) from error
        except OSError as error:
            raise disk_unavailable(error, self._root) from error
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def delete(self, object_key: str, *, versions: bool = False) -> None:
        """Unlink the object's file. Without `versions` that becomes durable with the folder's next flush; a sweep would find it again."""
        try:
            (self._root / relative_path(object_key)).unlink(missing_ok=True)
            if versions:
                _flush_directory(self._root / object_key[:2])
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

    def put_document(self, name: str, content: bytes) -> None:
        """Write a new file beside, flush it, rename it over the old one, flush the folder."""
        path = self._root / document_path(name)
        document_content(content)
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            for folder in (path.parent.parent, path.parent):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700, exist_ok=True)
                    _flush_directory(folder.parent)
            try:
                with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
            _flush_directory(path.parent)
        except OSError as error:
            raise disk_unavailable(error, self._root) from error

    def get_document(self, name: str) -> bytes:
        """Read the document's file, never through a symbolic link."""
        try:
            with os.fdopen(os.open(self._root / document_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                content = file.read(DOCUMENT_BYTES + 1)
        except FileNotFoundError as error:
            raise no_document(name) from error
        except OSError as error:
            raise disk_unavailable(error, self._root) from error
        if len(content) > DOCUMENT_BYTES:
            raise oversized(name)
        return content

    def delete_document(self, name: str) -> None:
        """Unlink the document's file and flush its folder."""
        path = self._root / document_path(name)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _flush_directory(path.parent)
        except OSError as error:
            raise disk_unavailable(error, self._root) from error

    def list_documents(self, prefix: str) -> Iterator[str]:
        """Yield the names folder by folder; what is no document is passed over."""
        kind, _, folder = document_prefix(prefix).partition("/")
        for name in (folder.rstrip("/"),) if folder else _FOLDERS:
            try:
                files = sorted(file.name for file in (self._root / kind / name).iterdir())
            except FileNotFoundError:
                continue
            except OSError as error:
                raise disk_unavailable(error, self._root) from error
            yield from (f"{kind}/{name}/{file}" for file in files if OBJECT_KEY.fullmatch(file))

    def clean_uploads(self, older_than: datetime) -> int:
        """Remove what a kill left of documents on their way in; return how many files.

        Parameters
        ----------
        older_than
            Younger ones may be under way.

        Raises
        ------
        Unavailable
            The disk cannot be read or written.
        """
        cleaned = 0
        try:
            for file in self._root.glob("[a-z]*/[0-9a-f][0-9a-f]/.*"):
                if not _UNFINISHED.fullmatch(file.name):
                    continue
                try:
                    if datetime.fromtimestamp(file.stat(follow_symlinks=False).st_mtime, UTC) < older_than:
                        file.unlink()
                        cleaned += 1
                except FileNotFoundError:
                    continue  # it came to its end
        except OSError as error:
            raise disk_unavailable(error, self._root) from error
        return cleaned

    def check(self) -> None:
        """Look whether the root is there and may be written."""
        if not self._root.is_dir():
            raise Unavailable(f"the object directory {self._root} is gone; mount or restore it")
        if not os.access(self._root / _FOLDERS[0], os.W_OK | os.X_OK):
            raise Unavailable(f"the object directory {self._root} cannot be written; look for a read-only mount or wrong ownership")


class FileReader:
    """A file opened for reading as an `ObjectReader`; it owns the descriptor."""

    def __init__(self, descriptor: int, root: Path) -> None:
        self._descriptor = descriptor
        self._root = root
        self.size = os.fstat(descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """See `ObjectReader.read_at`."""
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
        """Close the descriptor."""
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


def no_document(name: str) -> InstanceNotFound:
    """The error for a document that is not there."""
    return InstanceNotFound(f"the store holds no document {name}; was it erased, or is the store older than the index?")


def oversized(name: str) -> IntegrityError:
    """The error for a document that is larger than any that was written."""
    return IntegrityError(
        f"document {name} of the store has more than {DOCUMENT_BYTES} bytes; the node writes none so large: someone changed it"
    )


def wrong_length(object_key: str, found: int, expected: int) -> IntegrityError:
    """The error for a file that is not as long as what was sealed."""
    return IntegrityError(
        f"the landing file of object {object_key} has {found} bytes where {expected} were sealed; "
        "something else writes into the landing folder",
    )


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
