"""Key rings: what wraps the data keys. Here the ring in a file, for a node without a key service.

One JSON file, readable by its owner only. Every change writes a new file beside it, flushes it and renames it over the old one,
so that at any moment one whole ring is there. Losing the file loses every object: back it up apart from the data.

References
----------
RFC 3394 AES Key Wrap; RFC 5869 HKDF
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from storage.errors import IntegrityError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FORMAT = "dicom-node key ring 1"
_KEY_BYTES = 32


class Keyring(Protocol):
    """Holds key-encryption keys; data keys go in and out wrapped."""

    def wrap(self, data_key: bytes) -> tuple[str, bytes]:
        """Wrap a data key of 32 bytes under the primary key; return the key's id and the wrapped key."""

    def unwrap(self, key_id: str, wrapped: bytes) -> bytes:
        """Return the data key.

        Raises
        ------
        IntegrityError
            No such key is in the ring, or it did not wrap these bytes.
        """


def derive_key(secret: bytes, *, salt: bytes | None, info: bytes) -> bytes:
    """Derive 32 bytes from `secret` by HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be shown of a key."""

    key_id: str
    created_at: datetime
    primary: bool
    """New objects are wrapped by this one."""


class FileKeyring:
    """A :class:`Keyring` in a file; make one by :meth:`load`, :meth:`create` or :meth:`add`."""

    def __init__(self, keys: Mapping[str, tuple[bytes, datetime]], primary: str, secret: bytes, path: Path | None = None) -> None:
        self._keys = dict(keys)
        self._primary = primary
        self._secret = secret
        self._path = path

    @classmethod
    def load(cls, path: Path | str) -> FileKeyring:
        """Read the ring.

        Raises
        ------
        Unavailable
            No file, one that others can read, or one that is damaged; the message says what to do.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read()
        except FileNotFoundError as error:
            raise Unavailable(f"no key ring at {path}: run `dicom-node keys init`, or restore the file from its backup") from error
        except OSError as error:
            raise Unavailable(f"the key ring {path} cannot be read ({error.strerror}): give the node's user access to it") from error
        if mode & 0o077:
            raise Unavailable(f"the key ring {path} is open to other users: run `chmod 600 {path}`")
        try:
            return cls._parse(json.loads(text), path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"the key ring {path} is damaged ({type(error).__name__}): restore the file from its backup") from error

    @classmethod
    def create(cls, path: Path | str) -> FileKeyring:
        """Make a new ring with one key; an existing file is never written over.

        Raises
        ------
        Unavailable
            The file exists, or cannot be written.
        """
        path = Path(path)
        key_id = _new_id()
        ring = cls({key_id: (os.urandom(_KEY_BYTES), datetime.now(UTC))}, key_id, os.urandom(_KEY_BYTES))
        with _locked(path):
            _write(path, ring.document(), replace=False)
        return ring

    @classmethod
    def add(cls, path: Path | str) -> str:
        """Add a key to the ring and make it primary; objects sealed before stay readable by the older ones.

        Returns
        -------
        str
            Id of the new key. A ring that is already loaded goes on wrapping with its own primary key, and learns the new one when it
            is asked to unwrap with it.

        Raises
        ------
        Unavailable
            As :meth:`load`, or the file cannot be written; the ring is then as it was.
        """
        path = Path(path)
        with _locked(path):
            ring = cls.load(path).with_new_key()
            _write(path, ring.document(), replace=True)
        return ring.primary_key_id

    @property
    def primary_key_id(self) -> str:
        """Id of the key that wraps the data keys of new objects."""
        return self._primary

    def keys(self) -> list[KeyInfo]:
        """Return the keys of the ring, oldest first, without their secrets."""
        return [KeyInfo(key_id, created_at, key_id == self._primary) for key_id, (_, created_at) in self._keys.items()]

    def wrap(self, data_key: bytes) -> tuple[str, bytes]:
        """Wrap a data key under the primary key (RFC 3394)."""
        return self._primary, aes_key_wrap(self._keys[self._primary][0], data_key)

    def unwrap(self, key_id: str, wrapped: bytes) -> bytes:
        """Return the data key.

        Raises
        ------
        IntegrityError
            The key is not in this ring, or did not wrap these bytes.
        Unavailable
            The key may have been added since, but the file cannot be read now.
        """
        if key_id not in self._keys:
            self._learn()
        if key_id not in self._keys:
            raise IntegrityError("the object was sealed under a key that is not in the ring: restore that ring, or the object is damaged")
        try:
            return aes_key_unwrap(self._keys[key_id][0], wrapped)
        except InvalidUnwrap as error:
            raise IntegrityError("the object's data key is damaged, or the ring holds another key of this id") from error

    def _learn(self) -> None:
        """Take over keys that were added to the file since it was loaded: another process of the node may seal with them already."""
        if self._path is None:
            return
        ring = FileKeyring.load(self._path)
        if ring.database_key() == self.database_key():  # else another ring lies there now
            self._keys = {**ring._keys, **self._keys}  # noqa: SLF001 - of our own class

    def database_key(self) -> bytes:
        """Return the 32 bytes that the database is encrypted with; they stay the same when keys are added."""
        return self.derive("database")

    def derive(self, purpose: str) -> bytes:
        """Return 32 secret bytes of the ring for one purpose; they stay the same when keys are added."""
        return derive_key(self._secret, salt=None, info=f"dicom-node {purpose}".encode())

    @classmethod
    def _parse(cls, document: Any, path: Path) -> FileKeyring:
        if document["format"] != _FORMAT:
            raise ValueError("format")
        keys = {
            str(key_id): (_secret(entry["secret"]), datetime.fromisoformat(entry["created_at"]))
            for key_id, entry in document["keys"].items()
        }
        if document["primary"] not in keys or not all(key_id.isascii() for key_id in keys):
            raise ValueError("primary")
        return cls(keys, document["primary"], _secret(document["secret"]), path)

    def with_new_key(self) -> FileKeyring:
        """Return a ring of the same keys and one more, which is primary."""
        key_id = _new_id()
        return FileKeyring({**self._keys, key_id: (os.urandom(_KEY_BYTES), datetime.now(UTC))}, key_id, self._secret)

    def document(self) -> dict[str, Any]:
        """Return what the file holds, secrets and all."""
        return {
            "format": _FORMAT,
            "primary": self._primary,
            "keys": {
                key_id: {"secret": base64.b64encode(secret).decode("ascii"), "created_at": created_at.isoformat()}
                for key_id, (secret, created_at) in self._keys.items()
            },
            "secret": base64.b64encode(self._secret).decode("ascii"),
        }


def _write(path: Path, document: Mapping[str, Any], *, replace: bool) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(document, indent=2).encode() + b"\n")
                file.flush()
                os.fsync(descriptor)
            if replace:
                fresh.rename(path)
            else:
                path.hardlink_to(fresh)  # refuses where a rename would replace
        finally:
            fresh.unlink(missing_ok=True)
        _flush_directory(path.parent)
    except FileExistsError as error:
        raise Unavailable(f"a key ring exists at {path} and is kept: add a key by `dicom-node keys add`") from error
    except OSError as error:
        raise Unavailable(f"the key ring {path} cannot be written ({error.strerror}): check directory, access and space") from error


def _new_id() -> str:
    return secrets.token_hex(8)


def _secret(text: str) -> bytes:
    try:
        secret = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("base64") from error
    if len(secret) != _KEY_BYTES:
        raise ValueError("length")
    return secret


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process change the ring at a time; the lock is on the directory, since the file is replaced."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"the directory {path.parent} of the key ring cannot be opened ({error.strerror}): make it, mode 700") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
