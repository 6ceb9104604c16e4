"""The data sets of Storage Commitment: a Transaction UID and lists of references, read and written without a library's data set.

A reference takes a hundred bytes; a library makes thousands of them. What a stranger sends here is bounded by its bytes, its number of
references and its depth, and nothing of it is kept but the four attributes that are asked for.

References
----------
DICOM PS3.4 Tables J.3-1 and J.3-2; PS3.5 Section 7.1 (data elements), 7.5 (sequences), Annex A.1 and A.2
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from storage.commitments import Reference
from storage.scan import valid_uid

SOP_CLASS_UID, SOP_INSTANCE_UID = 0x00081150, 0x00081155
TRANSACTION_UID, FAILURE_REASON = 0x00081195, 0x00081197
FAILED_SEQUENCE, REFERENCED_SEQUENCE = 0x00081198, 0x00081199
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS: Final = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_DEPTH = 16


class UnreadableReferences(Exception):
    """The data set is not what Storage Commitment sends; the message says why, without the peer's words."""


class TooManyReferences(Exception):
    """There are more references than are taken at once."""


@dataclass(frozen=True, slots=True)
class CommitmentInformation:
    """Action or Event Information."""

    transaction_uid: str
    referenced: tuple[Reference, ...] = ()
    failed: tuple[tuple[Reference, int], ...] = ()
    """With the Failure Reason (0008,1197)."""


def read_information(data: bytes, *, implicit: bool, limit: int) -> CommitmentInformation:
    """Read Action or Event Information, little endian.

    Parameters
    ----------
    implicit
        Implicit VR; else Explicit VR.
    limit
        Most references.

    Raises
    ------
    UnreadableReferences, TooManyReferences
        It cannot be read, or holds more.
    """
    try:
        return _Reader(data, implicit=implicit, limit=limit).information()
    except struct.error as error:
        raise UnreadableReferences("the data set ends within an element") from error


class _Reader:
    """Walks over one data set, by offsets."""

    def __init__(self, data: bytes, *, implicit: bool, limit: int) -> None:
        self._data = data
        self._implicit = implicit
        self._left = limit

    def information(self) -> CommitmentInformation:
        transaction_uid = ""
        referenced: tuple[Reference, ...] = ()
        failed: tuple[tuple[Reference, int], ...] = ()
        for tag, start, end in self._elements(0, len(self._data), 0):
            if tag == TRANSACTION_UID:
                transaction_uid = self._uid(start, end)
            elif tag == REFERENCED_SEQUENCE:
                referenced = tuple(reference for reference, _ in self._references(start, end))
            elif tag == FAILED_SEQUENCE:
                failed = tuple(self._references(start, end))
        if not transaction_uid:
            raise UnreadableReferences("there is no Transaction UID (0008,1195)")
        return CommitmentInformation(transaction_uid, referenced, failed)

    def _references(self, start: int, end: int) -> Iterator[tuple[Reference, int]]:
        for item_start, item_end in self._items(start, end, 1):
            self._left -= 1
            if self._left < 0:
                raise TooManyReferences
            found = {SOP_CLASS_UID: "", SOP_INSTANCE_UID: ""}
            reason = 0
            for tag, value_start, value_end in self._elements(item_start, item_end, 2):
                if tag in found:
                    found[tag] = self._uid(value_start, value_end)
                elif tag == FAILURE_REASON:
                    if value_end - value_start != 2:
                        raise UnreadableReferences("a Failure Reason (0008,1197) is no US of one value")
                    (reason,) = struct.unpack_from("<H", self._data, value_start)
            if not all(found.values()):
                raise UnreadableReferences("an item lacks its Referenced SOP Class UID (0008,1150) or Instance UID (0008,1155)")
            yield Reference(found[SOP_CLASS_UID], found[SOP_INSTANCE_UID]), reason

    def _uid(self, start: int, end: int) -> str:
        value = self._data[start : min(end, start + 66)].rstrip(b"\0 ").decode("latin-1")
        if end - start > 66 or not valid_uid(value):
            raise UnreadableReferences("a UID is none")
        return value

    def _elements(self, position: int, end: int, depth: int) -> Iterator[tuple[int, int, int]]:
        """Give tag, start and end of the value of each element between two offsets; an item's end mark ends it, too."""
        while position < end:
            tag, start, length = self._header(position, end)
            if tag == _ITEM_END:
                return
            if length == _UNDEFINED:
                value_end, position = self._undefined(start, end, depth + 1)
            else:
                value_end = position = start + length
            if value_end > end:
                raise UnreadableReferences("an element is longer than what holds it")
            yield tag, start, value_end

    def _items(self, position: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
        """Give start and end of each item of a sequence's value."""
        while position < end:
            tag, start, length = self._header(position, end)
            if tag == _SEQUENCE_END:
                return
            if tag != _ITEM:
                raise UnreadableReferences("a sequence holds something other than items")
            item_end, position = self._item_end(start, end, depth) if length == _UNDEFINED else (start + length, start + length)
            if item_end > end:
                raise UnreadableReferences("an item is longer than its sequence")
            yield start, item_end

    def _undefined(self, start: int, end: int, depth: int) -> tuple[int, int]:
        """Return where the value of a sequence of undefined length ends, and what follows it begins."""
        if depth > _DEPTH:
            raise UnreadableReferences("sequences are nested too deep")
        position = start
        while True:
            tag, value, length = self._header(position, end)
            if tag == _SEQUENCE_END:
                return position, value
            if tag != _ITEM:
                raise UnreadableReferences("a sequence holds something other than items")
            position = self._item_end(value, end, depth)[1] if length == _UNDEFINED else value + length

    def _item_end(self, start: int, end: int, depth: int) -> tuple[int, int]:
        """Return where the elements of an item of undefined length end, and what follows it begins."""
        position = start
        while True:
            tag, value, length = self._header(position, end)
            if tag == _ITEM_END:
                return position, value
            position = self._undefined(value, end, depth + 1)[1] if length == _UNDEFINED else value + length

    def _header(self, position: int, end: int) -> tuple[int, int, int]:
        """Return tag, start of the value, and its length."""
        if position + 8 > end:
            raise UnreadableReferences("the data set ends within an element")
        group, element = struct.unpack_from("<HH", self._data, position)
        tag = group << 16 | element
        if self._implicit or group == 0xFFFE:
            return tag, position + 8, int(struct.unpack_from("<L", self._data, position + 4)[0])
        vr = self._data[position + 4 : position + 6]
        if vr not in _LONG_VRS:
            return tag, position + 8, int(struct.unpack_from("<H", self._data, position + 6)[0])
        (length,) = struct.unpack_from("<L", self._data, position + 8)
        if vr != b"SQ" and length == _UNDEFINED:
            raise UnreadableReferences("an element other than a sequence has no length")
        return tag, position + 12, int(length)


def write_information(
    transaction_uid: str,
    referenced: Sequence[Reference],
    failed: Sequence[tuple[Reference, int]] = (),
    *,
    implicit: bool,
) -> bytes:
    """Write Action or Event Information, little endian. An empty list leaves its sequence out."""
    parts = [_element(TRANSACTION_UID, b"UI", _ui(transaction_uid), implicit=implicit)]
    if failed:
        items = (_item(reference, implicit=implicit, reason=reason) for reference, reason in failed)
        parts.append(_element(FAILED_SEQUENCE, b"SQ", b"".join(items), implicit=implicit))
    if referenced:
        items = (_item(reference, implicit=implicit) for reference in referenced)
        parts.append(_element(REFERENCED_SEQUENCE, b"SQ", b"".join(items), implicit=implicit))
    return b"".join(parts)


def _item(reference: Reference, *, implicit: bool, reason: int | None = None) -> bytes:
    body = _element(SOP_CLASS_UID, b"UI", _ui(reference.sop_class_uid), implicit=implicit)
    body += _element(SOP_INSTANCE_UID, b"UI", _ui(reference.sop_instance_uid), implicit=implicit)
    if reason is not None:
        body += _element(FAILURE_REASON, b"US", struct.pack("<H", reason), implicit=implicit)
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(body)) + body


def _ui(uid: str) -> bytes:
    return uid.encode("ascii") + b"\0" * (len(uid) % 2)


def _element(tag: int, vr: bytes, value: bytes, *, implicit: bool) -> bytes:
    if implicit:
        return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
    if vr in _LONG_VRS:
        return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value
