"""One walk over a stored data set: where each element lies, without loading it.

The archive has checked the framing when the instance came in (`storage.scan`); here it is read again, lazily, through a window, so
that metadata of a large object cost only its header, and in a loop instead of recursion, so that nesting costs no stack.

References
----------
DICOM PS3.5 Section 7 The Data Set, Annex A Transfer Syntax Specifications
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from pydicom.datadict import dictionary_VR

from dicomweb.negotiate import DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN, EXPLICIT_VR_BIG_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN
from storage.errors import InvalidInstance

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> at most `length` bytes; fewer only at the end."""

ITEM, ITEM_DELIMITATION, SEQUENCE_DELIMITATION = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXEL_DATA = 0x7FE00010
BULK_TAGS = frozenset({PIXEL_DATA, 0x7FE00008, 0x7FE00009})
UNDEFINED = 0xFFFFFFFF
LONG_FORM = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
"""VRs with a 32-bit length field in Explicit VR (PS3.5 Table 7.1-1)."""
SHORT_FORM = frozenset(
    {"AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM", "UI", "UL", "US"}
)
_WINDOW = 65_536
_DEPTH = 256


@dataclass(frozen=True, slots=True)
class Element:
    """A data element that is no sequence."""

    tag: int
    vr: str
    """Two letters; or several with ' or ', as the data dictionary has it, in Implicit VR."""
    offset: int
    """Of the value."""
    length: int
    """Of the value; -1 when it is encapsulated in fragments."""
    order: str = "<"
    """Byte order of the value: ``<`` or ``>``."""


@dataclass(frozen=True, slots=True)
class SequenceBegin:
    """A sequence opens."""

    tag: int


@dataclass(frozen=True, slots=True)
class ItemBegin:
    """An item of the innermost sequence opens."""


@dataclass(frozen=True, slots=True)
class ItemEnd:
    """The innermost item closes."""


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """The innermost sequence closes."""


Event = Element | SequenceBegin | ItemBegin | ItemEnd | SequenceEnd


class Inflating:
    """Random reads of a deflated data set, cheap when they go forward; memory stays at one step.

    Parameters
    ----------
    read_at
        Reads the deflated bytes.
    inflate_bytes
        Stop there: the archive never admitted more.
    """

    def __init__(self, read_at: ReadAt, *, inflate_bytes: int) -> None:
        self._read_at = read_at
        self._limit = inflate_bytes
        self._restart()

    def _restart(self) -> None:
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._source = 0
        self._start = 0
        self._buffer = b""

    def read(self, offset: int, length: int) -> bytes:
        """Give the inflated bytes from `offset`; fewer than `length` only at the end."""
        if offset < self._start:
            self._restart()
        pieces: list[bytes] = []
        wanted = length
        while wanted:
            skip = offset - self._start
            piece = self._buffer[skip : skip + wanted]
            pieces.append(piece)
            offset += len(piece)
            wanted -= len(piece)
            if wanted and not self._step():
                break
        return b"".join(pieces)

    def _step(self) -> bool:
        """Replace the buffer by the next inflated bytes."""
        self._start += len(self._buffer)
        self._buffer = b""
        while not self._buffer and not self._inflater.eof:
            fed = self._inflater.unconsumed_tail
            if not fed:
                fed = self._read_at(self._source, _WINDOW)
                self._source += len(fed)
                if not fed:
                    break
            try:
                self._buffer = self._inflater.decompress(fed, _WINDOW)
            except zlib.error as error:
                raise InvalidInstance("the deflated data set is damaged") from error
        if self._start + len(self._buffer) > self._limit:
            raise InvalidInstance(f"the deflated data set is longer than {self._limit} bytes")
        return bool(self._buffer)


@dataclass(slots=True)
class _Frame:
    sequence: bool
    end: int | None
    explicit: bool
    order: str
    fresh: bool = False
    """Of an item: no element has been read yet."""


class DataSet:
    """A stored data set, read through a window.

    Parameters
    ----------
    read_at
        Reads the stored bytes of the data set.
    transfer_syntax_uid
        As stored; decides explicit or implicit VR, byte order and deflation.
    inflate_bytes
        Limit of a deflated data set.
    """

    def __init__(self, read_at: ReadAt, transfer_syntax_uid: str, *, inflate_bytes: int = 2 * 1024**3) -> None:
        if transfer_syntax_uid == DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN:
            read_at = Inflating(read_at, inflate_bytes=inflate_bytes).read
        self._read_at = read_at
        self.explicit = transfer_syntax_uid != IMPLICIT_VR_LITTLE_ENDIAN
        self.order = ">" if transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN else "<"
        self._at, self._block = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes.

        Raises
        ------
        InvalidInstance
            The data set ends before.
        """
        data = self._take(offset, length)
        if len(data) != length:
            raise InvalidInstance("the data set ends inside an element")
        return data

    def _take(self, offset: int, length: int) -> bytes:
        start = offset - self._at
        if start < 0 or start + length > len(self._block):
            if length > _WINDOW:
                return self._read_at(offset, length)
            self._at, self._block, start = offset, self._read_at(offset, _WINDOW), 0
        return self._block[start : start + length]

    def chunks(self, offset: int, length: int, size: int = 1024**2) -> Iterator[bytes]:
        """Give a value piece by piece; `size` is even, so that no word is cut."""
        while length:
            piece = self.read(offset, min(size, length))
            yield piece
            offset += len(piece)
            length -= len(piece)

    def walk(self) -> Iterator[Event]:
        """Give every element in order, sequences opened; group lengths and group 0002 are left out.

        The walk may be given up at any event: what was not asked for is not read.

        Raises
        ------
        InvalidInstance
            The framing is broken, or nested deeper than 256.
        """
        position = 0
        stack = [_Frame(sequence=False, end=None, explicit=self.explicit, order=self.order)]
        while True:
            frame = stack[-1]
            if frame.end is not None and position >= frame.end:
                if position > frame.end:
                    raise InvalidInstance("an element reaches beyond the item or sequence that holds it")
                stack.pop()
                yield SequenceEnd() if frame.sequence else ItemEnd()
                continue
            if len(stack) == 1 and not self._take(position, 1):
                return
            if frame.fresh:
                # Some senders put Implicit VR items into explicit data sets; the archive takes and tells them by the first VR.
                frame.fresh = False
                if frame.explicit and frame.order == "<" and not _named(self.read(position, 8)):
                    frame.explicit = False
            tag, vr, length, position = self._header(position, frame.order, explicit=frame.explicit and not frame.sequence)
            if frame.sequence:
                if tag == SEQUENCE_DELIMITATION and frame.end is None:
                    stack.pop()
                    yield SequenceEnd()
                elif tag == ITEM:
                    end = None if length == UNDEFINED else position + length
                    stack.append(_Frame(sequence=False, end=end, explicit=frame.explicit, order=frame.order, fresh=length > 0))
                    yield ItemBegin()
                else:
                    raise InvalidInstance("a sequence holds something that is no item")
            elif tag == ITEM_DELIMITATION and frame.end is None and len(stack) > 1:
                stack.pop()
                yield ItemEnd()
            elif vr == "SQ" or (length == UNDEFINED and vr not in {"OB", "OW", "OB or OW"}):
                if len(stack) > _DEPTH:
                    raise InvalidInstance(f"sequences are nested deeper than {_DEPTH // 2}")
                # A sequence of VR UN is encoded in Implicit VR Little Endian inside (PS3.5 6.2.2).
                end = None if length == UNDEFINED else position + length
                known = vr == "SQ"
                stack.append(_Frame(sequence=True, end=end, explicit=frame.explicit and known, order=frame.order if known else "<"))
                yield SequenceBegin(tag)
            else:
                encapsulated = length == UNDEFINED
                if tag & 0xFFFF and tag >> 16 != 0x0002:
                    yield Element(tag, vr, position, -1 if encapsulated else length, frame.order)
                if encapsulated:
                    for offset, size in self.fragments(position):
                        position = offset + size
                    position += 8  # the sequence delimitation item
                else:
                    position += length

    def fragments(self, position: int) -> Iterator[tuple[int, int]]:
        """Give (offset, length) of each fragment of an encapsulated value; the first one is the Basic Offset Table (PS3.5 A.4)."""
        while True:
            tag, _, length, position = self._header(position, "<", explicit=False)
            if tag == SEQUENCE_DELIMITATION:
                return
            if tag != ITEM or length == UNDEFINED:
                raise InvalidInstance("encapsulated pixel data hold something that is no fragment")
            yield position, length
            position += length

    def _header(self, position: int, order: str, *, explicit: bool) -> tuple[int, str, int, int]:
        """Tag, VR, length and offset of the value of the element at `position`."""
        head = self.read(position, 8)
        group, element = struct.unpack_from(order + "HH", head)
        tag = group << 16 | element
        if group == 0xFFFE or not explicit:
            (length,) = struct.unpack_from(order + "I", head, 4)
            return tag, "" if group == 0xFFFE else dictionary_vr(tag), length, position + 8
        vr = head[4:6].decode("latin-1")
        if vr in SHORT_FORM:
            return tag, vr, struct.unpack_from(order + "H", head, 6)[0], position + 8
        (length,) = struct.unpack(order + "I", self.read(position + 8, 4))
        return tag, vr if vr in LONG_FORM else "UN", length, position + 12


def _named(head: bytes) -> bool:
    """Whether an element header has a VR, or is an item delimiter."""
    return head[:2] == b"\xfe\xff" or (head[4:6].isalpha() and head[4:6].isupper())


@lru_cache(maxsize=4096)
def dictionary_vr(tag: int) -> str:
    """VR of the data dictionary, LO for a private creator, UN for what is not known (PS3.6, PS3.5 7.8.1)."""
    if tag >> 16 & 1:
        return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
    try:
        return str(dictionary_VR(tag))
    except KeyError:
        return "UN"


def resolve_vr(vr: str, *, signed: bool) -> str:
    """Choose among the VRs that the dictionary leaves open (PS3.5 A.1: words in Implicit VR; sign by Pixel Representation)."""
    if " or " not in vr:
        return vr if len(vr) == 2 else "UN"
    if "OW" in vr:
        return "OW"
    return "SS" if signed else "US"


WORD_BYTES = {"AT": 2, "FD": 8, "FL": 4, "OD": 8, "OF": 4, "OL": 4, "OV": 8, "OW": 2, "SL": 4, "SS": 2, "SV": 8, "UL": 4, "US": 2, "UV": 8}
"""Size of the words of a VR whose bytes are swapped between the byte orders."""


def swap(data: bytes, word: int) -> bytes:
    """Reverse the bytes of each word; a rest shorter than a word stays."""
    whole = len(data) - len(data) % word
    swapped = bytearray(data)
    for index in range(word):
        swapped[index:whole:word] = data[word - 1 - index : whole : word]
    return bytes(swapped)
