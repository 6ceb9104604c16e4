"""The ring: the wrapping keys, which wrap the study keys, and the installation's own secret. One JSON file, for its owner only.

A wrapping key is 32 bytes in the file, or a key of a key service of which the file holds the address alone (`storage.kms`). One is
primary: it wraps what is new. The ring's own secret (the database's key is derived from it) lies in the file wrapped by the primary key,
so that the file of a ring with keys in a key service alone gives nothing away. Every change writes a new file beside the old one,
flushes it and renames it: at any moment one whole ring is there. Losing the file loses every object: back it up apart from the data.

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
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from storage.errors import IntegrityError, KeyNotHere, Unavailable

KEY_BYTES: Final = 32
"""Bytes of every secret key of ours."""

_FORMAT = "dicom-node key ring 2"
_ID = re.compile(r"[0-9a-f]{16}")
_STUDY_KEY = "study key"
_RING_SECRET = "ring secret"  # noqa: S105 - says what is wrapped

_Signature: TypeAlias = tuple[int, int, int]


class WrappingKey(Protocol):
    """Wraps secrets of 32 bytes; what is wrapped for one `purpose` and `name` is unwrapped for no other."""

    @property
    def place(self) -> str:
        """Where the secret is: empty for the ring file, else the address in the key service."""
        ...

    def generate(self, purpose: str, name: str) -> tuple[bytes, bytes]:
        """Return a new secret, in clear and wrapped; Unavailable when the key cannot be used now."""
        ...

    def wrap(self, secret: bytes, purpose: str, name: str) -> bytes:
        """Wrap a secret; Unavailable when the key cannot be used now."""
        ...

    def unwrap(self, wrapped: bytes, purpose: str, name: str) -> bytes:
        """Return the secret; IntegrityError when this key did not wrap these bytes for this, Unavailable when it cannot be used now."""
        ...

    def document(self) -> dict[str, str]:
        """Return what the ring file holds of it, ``kind`` among it."""
        ...


def derive_key(secret: bytes, *, salt: bytes | None, info: bytes) -> bytes:
    """Derive 32 bytes from `secret` by HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)


@dataclass(frozen=True, slots=True)
class FileKey:
    """A wrapping key whose secret lies in the ring file.

    A secret is wrapped (AES-KW) under a key derived from this one (HKDF, no salt, info ``dicom-node <purpose> <name>``): AES-KW has no
    place to say what a wrapped secret is for.
    """

    secret: bytes = field(default_factory=lambda: os.urandom(KEY_BYTES), repr=False)

    @property
    def place(self) -> str:
        """In the ring file."""
        return ""

    def generate(self, purpose: str, name: str) -> tuple[bytes, bytes]:
        """Return a new secret, in clear and wrapped."""
        secret = os.urandom(KEY_BYTES)
        return secret, self.wrap(secret, purpose, name)

    def wrap(self, secret: bytes, purpose: str, name: str) -> bytes:
        """Wrap a secret."""
        return aes_key_wrap(self._for(purpose, name), secret)

    def unwrap(self, wrapped: bytes, purpose: str, name: str) -> bytes:
        """Return the secret; IntegrityError when this key did not wrap these bytes for this."""
        try:
            return aes_key_unwrap(self._for(purpose, name), wrapped)
        except InvalidUnwrap as error:
            raise IntegrityError(f"a wrapped {purpose} is damaged, or the ring holds another key of this id") from error

    def document(self) -> dict[str, str]:
        """Return the secret in base64."""
        return {"kind": "file", "secret": base64.b64encode(self.secret).decode("ascii")}

    def _for(self, purpose: str, name: str) -> bytes:
        return derive_key(self.secret, salt=None, info=f"dicom-node {purpose} {name}".encode())


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be shown of a key."""

    key_id: str
    created_at: datetime
    primary: bool
    """New study keys are wrapped by this one."""
    place: str
    """Empty: in the ring file; else its address in the key service."""


@dataclass(frozen=True, slots=True)
class _Entry:
    key: WrappingKey
    created_at: datetime


@dataclass(frozen=True, slots=True)
class _Content:
    """What a ring file holds."""

    ring_id: str
    keys: Mapping[str, _Entry]
    primary: str
    wrapped: bytes
    """The ring's own secret, wrapped by the primary key."""

    def secret(self, path: Path) -> bytes:
        try:
            return self.keys[self.primary].key.unwrap(self.wrapped, _RING_SECRET, self.ring_id)
        except IntegrityError as error:
            raise Unavailable(f"the primary key of the ring {path} does not open the ring: restore the file from its backup") from error

    def with_primary(self, key_id: str, secret: bytes, entry: _Entry | None = None) -> _Content:
        keys = self.keys if entry is None else {**self.keys, key_id: entry}
        return replace(self, keys=keys, primary=key_id, wrapped=keys[key_id].key.wrap(secret, _RING_SECRET, self.ring_id))

    def at(self, place: str) -> list[str]:
        """Return the ids of the keys at an address in a key service."""
        return [key_id for key_id, entry in self.keys.items() if place and entry.key.place == place]

    def shown(self) -> list[KeyInfo]:
        return [KeyInfo(key_id, entry.created_at, key_id == self.primary, entry.key.place) for key_id, entry in self.keys.items()]

    def document(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "id": self.ring_id,
            "primary": self.primary,
            "keys": {key_id: {**entry.key.document(), "created_at": entry.created_at.isoformat()} for key_id, entry in self.keys.items()},
            "secret": base64.b64encode(self.wrapped).decode("ascii"),
        }


class Ring:
    """The ring as a process uses it; for any number of threads. Made by :meth:`load` or :meth:`create`.

    It looks whether the file has changed before it wraps (at most once a second) and when it meets a key that it does not know, so that
    a running process follows `add`, `promote` and `remove`.
    """

    def __init__(self, path: Path, content: _Content, seen: _Signature, secret: bytes, *, look_every_s: float = 1.0) -> None:
        self._path = path
        self._content = content
        self._seen = seen
        self._secret = secret
        self._look_every_s = look_every_s
        self._look_again = time.monotonic() + look_every_s
        self._lock = threading.Lock()

    # -- the file ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: Path | str, *, look_every_s: float = 1.0) -> Ring:
        """Read the ring and open its secret.

        Parameters
        ----------
        path
            The file.
        look_every_s
            Seconds for which the file is taken to be unchanged.

        Raises
        ------
        Unavailable
            No file, one that others can read, one that is damaged; or the key service of the primary key cannot be used now.
        """
        path = Path(path)
        content, seen = _read(path)
        return cls(path, content, seen, content.secret(path), look_every_s=look_every_s)

    @classmethod
    def create(cls, path: Path | str, key: WrappingKey | None = None) -> Ring:
        """Make a new ring with one key; an existing file is never written over.

        Parameters
        ----------
        path
            The file; its directory exists.
        key
            The key, a new :class:`FileKey` by default. With a key of a key service no secret lies on the disk in clear.

        Raises
        ------
        Unavailable
            The file exists, or cannot be written; or the key cannot be used.
        """
        path = Path(path)
        key = FileKey() if key is None else key
        key_id, ring_id = _new_id(), _new_id()
        wrapped = key.generate(_RING_SECRET, ring_id)[1]
        content = _Content(ring_id, {key_id: _Entry(key, _now())}, key_id, wrapped)
        content.secret(path)  # a key that may wrap but not unwrap must not come into use
        with _locked(path):
            _write(path, content, replacing=False)
        return cls.load(path)

    @classmethod
    def add(cls, path: Path | str, key: WrappingKey | None = None, *, promote: bool = True) -> str:
        """Add a key, a new :class:`FileKey` by default, and make it primary; study keys wrapped before stay readable by the older keys.

        Parameters
        ----------
        promote
            False where other nodes have copies of the ring: what it wraps they cannot open until they have it too, and :meth:`promote` is
            for when they do.

        Returns
        -------
        str
            Id of the new key. Running processes use it within a second.

        Raises
        ------
        Unavailable
            As :meth:`load` and :meth:`create`; or the key of this address is in the ring already. The ring is then as it was.
        """
        path = Path(path)
        key_id = _new_id()
        key = FileKey() if key is None else key
        with _locked(path):
            content, _ = _read(path)
            if same := content.at(key.place):
                raise Unavailable(
                    f"{key.place} is in the ring already, as key {same[0]}: to change it, make a new key in the key service and name that "
                    "one in keys.kms_key_id"
                )
            fresh = content.with_primary(key_id, content.secret(path), _Entry(key, _now()))
            fresh.secret(path)  # as in create
            if not promote:
                fresh = replace(content, keys=fresh.keys)
            _write(path, fresh, replacing=True)
        return key_id

    @classmethod
    def promote(cls, path: Path | str, key_id: str) -> None:
        """Make a key of the ring primary.

        Raises
        ------
        Unavailable
            As :meth:`load`; no such key is in the ring; or it cannot be used. The ring is then as it was.
        """
        path = Path(path)
        with _locked(path):
            content, _ = _read(path)
            _require(content, key_id, path)
            _write(path, content.with_primary(key_id, content.secret(path)), replacing=True)

    @classmethod
    def merge(cls, path: Path | str, other: Path | str) -> list[str]:
        """Take the keys of another ring file that this one lacks, to open what they wrapped; primary key and secret stay as they are.

        Returns
        -------
        list of str
            Their ids.

        Raises
        ------
        Unavailable
            As :meth:`load`, of either file; or a key of the same id is another one in each. The ring is then as it was.
        """
        path, other = Path(path), Path(other)
        theirs, _ = _read(other)
        with _locked(path):
            content, _ = _read(path)
            for key_id in content.keys.keys() & theirs.keys.keys():
                if content.keys[key_id].key.document() != theirs.keys[key_id].key.document():
                    raise Unavailable(f"key {key_id} is one in {path} and another in {other}: one of the files was changed by hand")
            new = {key_id: entry for key_id, entry in theirs.keys.items() if key_id not in content.keys}
            if new:
                _write(path, replace(content, keys={**new, **content.keys}), replacing=True)
        return sorted(new)

    @classmethod
    @contextmanager
    def removal(cls, path: Path | str, key_id: str) -> Iterator[Callable[[], None]]:
        """Keep others from changing the ring, and give what takes a key out of it: what that wrapped opens no more.

        Ask ``storage.retirement`` instead, which looks that nothing uses it.

        Raises
        ------
        Unavailable
            It is the primary key; no such key is in the ring; the file cannot be read or written.
        """
        path = Path(path)
        with _locked(path):
            content, _ = _read(path)
            _require(content, key_id, path)
            if key_id == content.primary:
                raise Unavailable(f"key {key_id} is the primary key of the ring: add or promote another one, then rotate, then remove it")
            keys = {other: entry for other, entry in content.keys.items() if other != key_id}
            yield lambda: _write(path, replace(content, keys=keys), replacing=True)

    @classmethod
    def remove(cls, path: Path | str, key_id: str) -> None:
        """Take a key out of the ring at once. Raises as :meth:`removal`."""
        with cls.removal(path, key_id) as take_out:
            take_out()

    @classmethod
    def shown(cls, path: Path | str) -> list[KeyInfo]:
        """Return the keys of the file, oldest first, without their secrets; no key service is asked."""
        return _read(Path(path))[0].shown()

    # -- use ---------------------------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def primary_key_id(self) -> str:
        """Id of the key that wraps what is new; Unavailable when the file is gone or damaged."""
        return self._look().primary

    def keys(self) -> list[KeyInfo]:
        """Return the keys of the ring, oldest first, without their secrets."""
        return self._look().shown()

    def holds(self, key_id: str) -> bool:
        """Tell whether the file holds the key at this moment; Unavailable when it is gone or damaged."""
        return key_id in self._look(now=True).keys

    def generate(self, study_key_id: str) -> tuple[str, bytes, bytes]:
        """Make a study key.

        Returns
        -------
        tuple
            Id of the wrapping key; the secret, 32 bytes; the secret wrapped.

        Raises
        ------
        Unavailable
            The key service cannot be used now, or the ring file is gone or damaged: a secret wrapped by a ring that is nowhere but in
            this process's memory would be lost with it.
        """
        content = self._look()
        secret, wrapped = content.keys[content.primary].key.generate(_STUDY_KEY, study_key_id)
        return content.primary, secret, wrapped

    def wrap(self, secret: bytes, study_key_id: str) -> tuple[str, bytes]:
        """Wrap a study key under the primary key; return the wrapping key's id and the wrapped secret. Raises as :meth:`generate`."""
        content = self._look()
        return content.primary, content.keys[content.primary].key.wrap(secret, _STUDY_KEY, study_key_id)

    def unwrap(self, wrapping_key_id: str, wrapped: bytes, study_key_id: str) -> bytes:
        """Return the secret of a study key, 32 bytes.

        Raises
        ------
        IntegrityError
            The wrapping key did not wrap these bytes for this study key; or its id is none.
        KeyNotHere
            The wrapping key is not in the ring: another node's has it.
        Unavailable
            The key service cannot be used now; or the key may have been added since, but the file cannot be read now.
        """
        entry = self._content.keys.get(wrapping_key_id) or self._look(now=True).keys.get(wrapping_key_id)
        if entry is None:
            if not _ID.fullmatch(wrapping_key_id):
                raise IntegrityError("a study key names its wrapping key by no key's name: it is damaged")
            raise KeyNotHere(
                f"the key ring {self._path} lacks key {wrapping_key_id}, which another node uses: copy the ring of that node here, or put "
                "back the one that had it (nothing has to be restarted)"
            )
        return entry.key.unwrap(wrapped, _STUDY_KEY, study_key_id)

    def database_key(self) -> bytes:
        """Return the 32 bytes that the embedded database is encrypted with; they stay the same whatever happens to the keys."""
        return self.derive("database")

    def derive(self, purpose: str) -> bytes:
        """Return 32 secret bytes of the ring for one purpose; they stay the same whatever happens to the keys."""
        return derive_key(self._secret, salt=None, info=f"dicom-node {purpose}".encode())

    def _look(self, *, now: bool = False) -> _Content:
        """Return what the file holds, as it was a second ago at most."""
        with self._lock:
            moment = time.monotonic()
            if now or moment >= self._look_again:
                if _signature(self._path) != self._seen:
                    self._take(*_read(self._path))
                self._look_again = moment + self._look_every_s
            return self._content

    def _take(self, content: _Content, seen: _Signature) -> None:
        if content.ring_id != self._content.ring_id:
            raise Unavailable(f"another key ring lies at {self._path} since this process started: put the former one back")
        # the same id is the same key: keep ours, which holds connections to its key service
        keys = {key_id: self._content.keys.get(key_id, entry) for key_id, entry in content.keys.items()}
        self._content, self._seen = replace(content, keys=keys), seen


def _require(content: _Content, key_id: str, path: Path) -> None:
    if key_id not in content.keys:
        raise Unavailable(f"no key {key_id} is in the ring {path}: `dicom-node keys list` shows what is")


def _signature(path: Path) -> _Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None  # reading it says why
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> tuple[_Content, _Signature]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError as error:
        raise Unavailable(f"no key ring at {path}: run `dicom-node keys init`, or restore the file from its backup") from error
    except OSError as error:
        raise Unavailable(f"the key ring {path} cannot be read ({error.strerror}): give the node's user access to it") from error
    if found.st_mode & 0o077:
        raise Unavailable(f"the key ring {path} is open to other users: run `chmod 600 {path}`")
    try:
        content = _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"the key ring {path} is damaged ({type(error).__name__}): restore the file from its backup") from error
    return content, (found.st_ino, found.st_mtime_ns, found.st_size)


def _parse(document: Any) -> _Content:
    if document["format"] != _FORMAT:
        raise ValueError("format")
    keys = {key_id: _Entry(_key(entry), datetime.fromisoformat(entry["created_at"])) for key_id, entry in document["keys"].items()}
    primary, ring_id = document["primary"], document["id"]
    if primary not in keys or not all(_ID.fullmatch(name) for name in (ring_id, *keys)):
        raise ValueError("id")
    return _Content(ring_id, keys, primary, _base64(document["secret"]))


def _key(document: Mapping[str, Any]) -> WrappingKey:
    match document["kind"]:
        case "file":
            secret = _base64(document["secret"])
            if len(secret) != KEY_BYTES:
                raise ValueError("length")
            return FileKey(secret)
        case "kms":
            from storage.kms import KmsKey  # noqa: PLC0415 - boto3 is slow to import, and a ring of file keys needs none

            return KmsKey(str(document["arn"]), region=str(document["region"]), endpoint_url=str(document["endpoint_url"]))
        case _:
            raise ValueError("kind")


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("base64") from error


def _write(path: Path, content: _Content, *, replacing: bool) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(content.document(), indent=2).encode() + b"\n")
                file.flush()
                os.fsync(descriptor)
            if replacing:
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


def _now() -> datetime:
    return datetime.now(UTC)


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
