"""Sealed objects: what an instance looks like at rest.

An object is five parts, one after the other::

    header    "DNSEALED" · version u16 · object key: u16 length + bytes
    body      Tink streaming AEAD, AES256-GCM-HKDF, segments of 1 MiB: 40 bytes (40, salt 32, nonce prefix 7), then the segments
    footer    AES-256-GCM: the record of the instance as JSON
    capsule   study key id: u16 length + bytes · wrapped data key: u16 length + bytes
    trailer   body length u64 · footer length u32 · capsule length u16 · "DNFOOTER"

Numbers are big-endian. The data key is fresh for each object and wrapped by a key of its study (AES-KW, RFC 3394), which is only known
once the data set has been read: so the capsule comes late. The header is the body's associated data, so version and object key cannot be
exchanged; the footer is bound to the header and to the body's length. A capsule that was changed, or is another object's, gives no data
key or one that opens nothing here. Header, capsule and trailer have one encoding only, and sizes must add up to the size of the object:
no byte is free to change.

Anybody with the data key opens the body with Tink itself: a raw AES256_GCM_HKDF_1MB key whose material is the data key, and the header
as associated data.

References
----------
Tink, "AES-GCM-HKDF Streaming AEAD"; RFC 3394 AES Key Wrap; RFC 5869 HKDF; NIST SP 800-38D
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from typing import TYPE_CHECKING, Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.errors import IntegrityError
from storage.keys import KEY_BYTES, derive_key
from storage.records import SealedObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Buffer

    from storage.study_keys import StudyKey, StudyKeys

VERSION: Final = 2
SEGMENT: Final = 1_048_576
"""Ciphertext bytes of a full segment, tag included."""
FOOTER_LIMIT: Final = 16_777_216
"""Most bytes of an encrypted footer."""

_MAGIC = b"DNSEALED"
_TRAILER = struct.Struct(">QIH8s")
_TRAILER_MAGIC = b"DNFOOTER"
_TAG = 16
_PREFIX = 7
_SALT = 32
_BODY_HEADER = 1 + _SALT + _PREFIX
_FULL = SEGMENT - _TAG
"""Plaintext bytes of a full segment; the first has the body header less."""
_FOOTER_PURPOSE = b"dicom-node object footer 2"
_HEAD_READ = 4096
_TAIL_READ = 16_384
_CAPSULE_LIMIT = 1024
_SMALL = 65_536
_footer_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True).encode


def _fields(*fields: bytes) -> bytes:
    return b"".join(struct.pack(">H", len(field)) + field for field in fields)


def _header(object_key: str) -> bytes:
    return _MAGIC + struct.pack(">H", VERSION) + _fields(object_key.encode("ascii"))


def _nonce(prefix: bytes, segment: int, *, last: bool) -> bytes:
    return prefix + struct.pack(">IB", segment, last)


class Segments:
    """Memory for segments, used again and again: new memory costs the kernel a quarter of what sealing costs.

    Parameters
    ----------
    kept
        How many pieces of a megabyte are kept for the next one.
    """

    def __init__(self, kept: int = 16) -> None:
        self._kept = kept
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """Return memory for a segment; what it holds is nobody's business."""
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(SEGMENT)

    def give(self, memory: bytearray) -> None:
        """Give back what was taken; what was not is dropped."""
        if len(memory) == SEGMENT and len(self._free) < self._kept:
            self._free.append(memory)


class Sealer:
    """Seals one instance as it streams by; memory is two segments whatever its size.

    Parameters
    ----------
    object_key : str
        ASCII; the object opens under this key only.
    sink : callable
        Takes the sealed bytes in order. It must be done with a buffer when it returns: the next segment is written over it.
    segments : Segments
        Memory that is shared with others, from many threads; None: its own.
    """

    def __init__(self, object_key: str, sink: Callable[[Buffer], object], segments: Segments | None = None) -> None:
        self._segments = segments or Segments()
        drawn = os.urandom(KEY_BYTES + _SALT + _PREFIX)
        self._data_key = data_key = drawn[:KEY_BYTES]
        self._object_key = object_key
        self._sink = sink
        self._header = _header(object_key)
        salt = drawn[KEY_BYTES:-_PREFIX]
        self._prefix = drawn[-_PREFIX:]
        self._cipher = AESGCM(derive_key(data_key, salt=salt, info=self._header))
        self._footer_cipher = AESGCM(derive_key(data_key, salt=None, info=_FOOTER_PURPOSE))
        self._digest = hashlib.sha256()
        self._byte_count = 0
        self._segment = 0
        self._room = _FULL - _BODY_HEADER
        # a whole segment only on demand: most instances are far smaller
        self._plain = bytearray()
        self._held = 0
        self._sealed = bytearray()
        self._ahead = self._header + bytes((_BODY_HEADER,)) + salt + self._prefix  # goes with the first segment

    def update(self, chunk: Buffer) -> None:
        """Seal the next bytes of plaintext."""
        view = memoryview(chunk)
        at = 0
        size = len(view)
        # a segment is sealed when a byte beyond it is known: the last one carries a mark of its own, and must not be empty
        while size - at > self._room - self._held:
            take = self._room - self._held
            if self._held:
                self._hold(view[at : at + take])
                self._seal_held(last=False)
            else:
                self._seal(view[at : at + take], last=False)
            at += take
        self._hold(view[at:])

    def finish(self, footer: Mapping[str, Any], study_key: StudyKey, study_keys: StudyKeys) -> SealedObject:
        """Seal what is left, and the record; return what was written.

        Parameters
        ----------
        footer : mapping
            JSON values only. Whoever holds the object and its study's key can rebuild the index from it.
        study_key : StudyKey
            Of the study that the instance belongs to.
        study_keys : StudyKeys
            Wraps the data key with it.

        Raises
        ------
        ValueError
            The footer is longer than :data:`FOOTER_LIMIT`.
        """
        self._seal_held(last=True)
        body = self._byte_count - len(self._header)
        text = _footer_text(footer).encode()
        if len(text) + _TAG > FOOTER_LIMIT:
            raise ValueError(f"the record is longer than {FOOTER_LIMIT - _TAG} bytes")
        # the key serves this one message, so a constant nonce repeats nothing
        sealed = self._footer_cipher.encrypt(bytes(12), text, self._header + struct.pack(">Q", body))
        capsule = _fields(study_key.id.encode("ascii"), study_keys.wrap_data_key(study_key, self._data_key))
        self._emit(sealed + capsule + _TRAILER.pack(body, len(sealed), len(capsule), _TRAILER_MAGIC))
        for memory in (self._plain, self._sealed):
            self._segments.give(memory)
        self._plain = self._sealed = bytearray()
        return SealedObject(self._object_key, self._byte_count, self._digest.hexdigest(), study_key.id)

    def _hold(self, piece: memoryview) -> None:
        end = self._held + len(piece)
        if end > len(self._plain):
            larger = self._segments.take() if end > _SMALL else bytearray(_SMALL)
            larger[: self._held] = memoryview(self._plain)[: self._held]
            self._plain = larger
        memoryview(self._plain)[self._held : end] = piece
        self._held = end

    def _seal_held(self, *, last: bool) -> None:
        self._seal(memoryview(self._plain)[: self._held], last=last)
        self._held = 0

    def _seal(self, plain: memoryview, *, last: bool) -> None:
        ahead, self._ahead = self._ahead, b""
        size = len(ahead) + len(plain) + _TAG
        if ahead and size > _SMALL:
            self._emit(ahead)
            ahead, size = b"", size - len(ahead)
        if len(self._sealed) < size:
            self._sealed = self._segments.take() if size > _SMALL else bytearray(size)
        sealed = memoryview(self._sealed)[:size]
        sealed[: len(ahead)] = ahead
        self._cipher.encrypt_into(_nonce(self._prefix, self._segment, last=last), plain, None, sealed[len(ahead) :])
        self._emit(sealed)
        self._segment += 1
        self._room = _FULL

    def _emit(self, sealed: Buffer) -> None:
        self._digest.update(sealed)
        self._byte_count += len(memoryview(sealed))
        self._sink(sealed)


class DataKeys(Protocol):
    """What opens the data key of an object: `storage.study_keys.StudyKeys`, or documents in the store (`storage.testimony`)."""

    def unwrap(self, study_key_id: str, wrapped: bytes) -> bytes:
        """Return the data key. Raises IntegrityError or Unavailable."""
        ...


class Opener:
    """Opens one sealed object and reads ranges of its plaintext; every byte that it returns is authenticated.

    Not for several threads at a time: it keeps the segment read last.

    Parameters
    ----------
    study_keys : DataKeys
        Unwraps the data key.
    object_key : str
        Under which the object was asked for.
    read_at : callable
        ``read_at(offset, length)`` returns that many sealed bytes. Opening calls it twice, a read once for each segment it touches.
    size : int
        Of the sealed object in bytes.

    Attributes
    ----------
    plaintext_size : int
        Bytes of plaintext.
    key_id : str
        Of the study key that wrapped the data key.

    Raises
    ------
    IntegrityError
        Some byte is not what was sealed, the object is cut, or it is another one. So does every method.
    Unavailable
        The study key cannot be had now.
    """

    def __init__(self, study_keys: DataKeys, object_key: str, read_at: Callable[[int, int], bytes], size: int) -> None:
        self._read_at = read_at
        self._size = size
        head = self._fetch(0, min(size, _HEAD_READ))
        header = self._parse_header(head, object_key)
        tail_at = max(size - _TAIL_READ, 0)
        tail = head if size <= _HEAD_READ else self._fetch(tail_at, size - tail_at)
        body, footer, capsule = self._parse_trailer(tail, len(header))
        self.key_id, wrapped = self._parse_capsule(tail[-_TRAILER.size - capsule : -_TRAILER.size])
        data_key = study_keys.unwrap(self.key_id, wrapped)
        start = len(header)
        self._body_at = start
        self._body = body
        behind = _TRAILER.size + capsule
        sealed = tail[-behind - footer : -behind]
        if len(sealed) < footer:
            sealed = self._fetch(size - behind - footer, footer)
        self._footer = self._open_footer(data_key, sealed, header)
        begin = head[start : start + _BODY_HEADER]
        if begin[:1] != bytes((_BODY_HEADER,)):
            raise IntegrityError("the header of the object's body is damaged")
        self._prefix = begin[1 + _SALT :]
        self._cipher = AESGCM(derive_key(data_key, salt=begin[1 : 1 + _SALT], info=header))
        self._segments = max(-(-body // SEGMENT), 1)
        self.plaintext_size = body - _BODY_HEADER - self._segments * _TAG
        self._cached = -1
        self._cache = b""

    def read(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes of plaintext from `offset`; fewer only at the end."""
        if offset < 0 or length < 0:
            raise ValueError("offset and length must not be negative")
        end = min(offset + length, self.plaintext_size)
        pieces = []
        while offset < end:
            # counted as if the body header were plaintext of the first segment, every segment holds the same
            segment, at = divmod(offset + _BODY_HEADER, _FULL)
            if not segment:
                at -= _BODY_HEADER
            plain = self._open(segment)
            take = min(end - offset, len(plain) - at)
            pieces.append(plain if take == len(plain) else plain[at : at + take])
            offset += take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def chunks(self) -> Iterator[bytes]:
        """Yield the whole plaintext, a segment at a time."""
        for segment in range(self._segments):
            plain = self._open(segment)
            if plain:
                yield plain

    def footer(self) -> dict[str, Any]:
        """Return the record, a fresh copy."""
        record: dict[str, Any] = json.loads(self._footer)
        return record

    def verify_all(self) -> None:
        """Open every segment; header, footer and trailer were proved at the opening."""
        for _ in self.chunks():
            pass

    def _open(self, segment: int) -> bytes:
        if segment != self._cached:
            start = segment * SEGMENT if segment else _BODY_HEADER
            end = min((segment + 1) * SEGMENT, self._body)
            sealed = self._fetch(self._body_at + start, end - start)
            try:
                plain = self._cipher.decrypt(_nonce(self._prefix, segment, last=segment == self._segments - 1), sealed, None)
            except InvalidTag as error:
                raise IntegrityError(f"segment {segment} of the object is damaged or out of place; restore it from another copy") from error
            self._cached, self._cache = segment, plain
        return self._cache

    def _fetch(self, offset: int, length: int) -> bytes:
        data = self._read_at(offset, length)
        if len(data) != length:
            raise IntegrityError(f"the object is cut: {len(data)} bytes instead of {length} at offset {offset}")
        return data

    def _parse_header(self, head: bytes, object_key: str) -> bytes:
        if head[: len(_MAGIC)] != _MAGIC:
            raise IntegrityError("no sealed object: it does not begin as one")
        at = len(_MAGIC) + 2
        if head[len(_MAGIC) : at] != struct.pack(">H", VERSION):
            raise IntegrityError(f"the object's format is not version {VERSION}; it is damaged, or a newer release wrote it")
        header = _header(object_key)
        if head[: len(header)] != header:
            raise IntegrityError("the object in this place is another one: sealed under a different object key, or its header is damaged")
        if len(header) + _BODY_HEADER > len(head):
            raise IntegrityError("the object is cut: it ends in its header")
        return header

    def _parse_trailer(self, tail: bytes, header: int) -> tuple[int, int, int]:
        if len(tail) < _TRAILER.size:
            raise IntegrityError("the object is cut: it has no trailer")
        body, footer, capsule, magic = _TRAILER.unpack(tail[-_TRAILER.size :])
        if magic != _TRAILER_MAGIC or header + body + footer + capsule + _TRAILER.size != self._size:
            raise IntegrityError("the object is cut or its trailer damaged")
        last = (body - 1) % SEGMENT + 1 if body else 0
        if body < _BODY_HEADER + _TAG or last < _TAG or not _TAG <= footer <= FOOTER_LIMIT or capsule > _CAPSULE_LIMIT:
            raise IntegrityError("the lengths in the object's trailer are impossible")
        return body, footer, capsule

    def _parse_capsule(self, capsule: bytes) -> tuple[str, bytes]:
        fields = []
        at = 0
        for _ in range(2):
            length = int.from_bytes(capsule[at : at + 2], "big")
            fields.append(capsule[at + 2 : at + 2 + length])
            at += 2 + length
        if at != len(capsule) or not fields[0].isascii():
            raise IntegrityError("the object's data key is damaged; restore the object from another copy")
        return fields[0].decode("ascii"), fields[1]

    def _open_footer(self, data_key: bytes, sealed: bytes, header: bytes) -> bytes:
        cipher = AESGCM(derive_key(data_key, salt=None, info=_FOOTER_PURPOSE))
        try:
            return cipher.decrypt(bytes(12), sealed, header + struct.pack(">Q", self._body))
        except InvalidTag as error:
            raise IntegrityError("the object's header or record is damaged; restore it from another copy") from error
