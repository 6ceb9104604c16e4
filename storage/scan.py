"""One pass over the bytes of a data set, as they stream by.

The scanner keeps counters, a stack of open sequences and the few values that the index wants; everything else is skipped by
counting. So an instance of any size costs constant memory, and bulk bytes cost a SHA-256 and a subtraction.

Rules where the standard leaves room, or real files do not keep to it:

* Tags ascend strictly at every level (PS3.5 7.1). A repeated or out-of-order tag is refused, because readers disagree on which of
  two values holds. Groups below 0004 and FFFE are no data elements and are refused.
* A VR that this edition does not know has the 32-bit length form (PS3.5 7.1.2). One that is no pair of capital letters is refused,
  but for the first element of an item: such an item is read as Implicit VR Little Endian, which some senders put into explicit
  data sets.
* UN of undefined length is a sequence in Implicit VR Little Endian (CP-246); so is everything inside. Any other VR of undefined
  length that is neither SQ nor encapsulated pixel data is refused.
* Pixel Data is encapsulated where the transfer syntax says so, and native elsewhere (PS3.5 A.4); what is in it is not looked at.
* In Implicit VR a sequence of defined length is known by the data dictionary; a private one is opaque.
* Odd lengths are accepted: they are wrong, but leave no doubt where the element ends.
* A deflated data set is raw deflate, complete, followed by nothing but one NUL that makes its length even (PS3.5 A.5), or by the
  trailer of gzip (RFC 1952: CRC-32 and length), which some writers leave there and which must then be right.

References
----------
DICOM PS3.5 Sections 7, 8, 9.1 and Annex A
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from functools import cache
from typing import TYPE_CHECKING, Final, NoReturn

from storage.charset import decode
from storage.errors import InvalidInstance, UnsupportedInstance
from storage.iod import (
    BIG,
    CONCEPT_NAME_CODE_SEQUENCE,
    DOUBLE_FLOAT_PIXEL_DATA,
    FLOAT_PIXEL_DATA,
    IMPLICIT,
    LITTLE,
    PIXEL_DATA,
    TRANSFER_SYNTAXES,
    Geometry,
    missing,
    sequence_tags,
    witnesses,
)
from storage.records import INDEXED, Limits, Summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

VALUE_LIMIT: Final = 65_536
"""Longest value that is kept, in bytes; an indexed attribute that is longer is refused (their VRs allow 64 characters a value)."""

_UNDEFINED = 0xFFFFFFFF
_ITEM = 0xFFFEE000
_ITEM_END = 0xFFFEE00D
_SEQUENCE_END = 0xFFFEE0DD
_FIRST_TAG = 0x0003FFFF
"""Below every tag that a data set may hold: groups 0000 and 0002 belong to commands and file meta information."""

_ELEMENTS, _ITEMS, _FRAGMENTS = range(3)
_SHORT, _LONG, _SEQUENCE, _UNKNOWN = range(1, 5)
_FORMS: Mapping[bytes, int] = {
    **dict.fromkeys((b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO"), _SHORT),
    **dict.fromkeys((b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"), _SHORT),
    **dict.fromkeys((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SV", b"UC", b"UR", b"UT", b"UV"), _LONG),
    b"SQ": _SEQUENCE,
    b"UN": _UNKNOWN,
}

_EXPLICIT_LITTLE = struct.Struct("<HH2sH").unpack_from
_EXPLICIT_BIG = struct.Struct(">HH2sH").unpack_from
_PLAIN_LITTLE = struct.Struct("<HHI").unpack_from
_PLAIN_BIG = struct.Struct(">HHI").unpack_from
_LENGTH_LITTLE = struct.Struct("<I").unpack_from
_LENGTH_BIG = struct.Struct(">I").unpack_from

_CHARACTER_SET = 0x00080005
_MANUFACTURER_MODEL_NAME = 0x00081090
_SOFTWARE_VERSIONS = 0x00181020
_CODE_VALUES = frozenset({0x00080100, 0x00080119, 0x00080120})
_WIDTHS: Mapping[bytes, int] = {b"US": 2, b"UL": 4}
"""VR of whole numbers -> bytes of one."""
_PIXELS = frozenset({PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_FLOAT_PIXEL_DATA})

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*\Z", re.ASCII)
_WHOLE_NUMBER = re.compile(r"\+?[0-9]{1,10}", re.ASCII)
_GZIP_TRAILER = struct.Struct("<II")
_INFLATE_STEP = 262_144
_INFLATE_FLOOR = 1_048_576
"""The ratio is judged only beyond this many inflated bytes: small blank pictures deflate by a thousand and hurt nobody."""


def valid_uid(text: str) -> bool:
    """Tell whether `text` may serve as a UID: 1 to 64 characters, components of digits, parted by single dots.

    PS3.5 9.1 also forbids leading zeros in a component. Devices in the field write them, nothing here reads a component as a
    number, and refusing them would lose pictures: they are accepted, and told apart from the same number without the zero.
    """
    return len(text) <= 64 and _UID.match(text) is not None


@cache
def _keywords() -> Mapping[int, str]:
    from pydicom.datadict import tag_for_keyword  # noqa: PLC0415 - once, not at import

    return {int(tag): keyword for keyword in INDEXED if (tag := tag_for_keyword(keyword)) is not None}


@cache
def _wanted() -> Mapping[int, bool]:
    """Top-level tags of interest -> whether the value is kept (else only that it is there)."""
    kept = {*_keywords(), _CHARACTER_SET, _MANUFACTURER_MODEL_NAME, _SOFTWARE_VERSIONS}
    return {tag: tag in kept for tag in kept | witnesses() | _PIXELS}


class DataSetScanner:
    """Framing check, limits, digest and index attributes of one data set, fed chunk by chunk.

    Not to be used again after it raised.

    Parameters
    ----------
    transfer_syntax_uid : str
        Of the data set to come.
    limits : Limits
        Hard limits; going beyond any of them is an :class:`InvalidInstance`.

    Raises
    ------
    UnsupportedInstance
        The transfer syntax is unknown, so nobody can tell where an element ends.

    References
    ----------
    DICOM PS3.5 Section 7, Annex A
    """

    def __init__(self, transfer_syntax_uid: str, limits: Limits) -> None:
        syntax = TRANSFER_SYNTAXES.get(transfer_syntax_uid)
        if syntax is None:
            raise UnsupportedInstance("the transfer syntax is unknown here; send the instance in one of the conformance statement")
        self._syntax = syntax
        self._transfer_syntax_uid = transfer_syntax_uid
        self._limits = limits
        self._digest = hashlib.sha256()
        self._byte_count = 0
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS) if syntax.deflated else None
        self._inflated = 0
        self._checksum = 0
        # where the parser stands
        self._at = 0
        self._rest = b""
        self._skip = 0
        self._value = bytearray()
        self._value_left = 0
        self._value_of = (0, b"")
        self._budget = limits.elements
        self._stack: list[tuple[int, int, bool, int, int]] = []
        cap = limits.inflate_bytes if syntax.deflated else limits.object_bytes
        self._context = (_ELEMENTS, cap + 1, False, syntax.encoding, _FIRST_TAG)
        # what it has learnt
        self._values: dict[int, tuple[bytes, bytes]] = {}
        self._present: set[int] = set()
        self._pixels_at = -1
        self._pixels_encapsulated = False
        self._fragments = 0
        self._title = ""

    def feed(self, chunk: Buffer) -> None:
        """Take the next bytes of the data set, as received.

        Raises
        ------
        InvalidInstance
            As soon as it is known that these bytes can be no valid instance; names tag, byte offset and fault.
        """
        view = memoryview(chunk)
        self._digest.update(view)
        self._byte_count += len(view)
        if self._byte_count > self._limits.object_bytes:
            raise InvalidInstance(
                f"the instance is longer than the limit of {self._limits.object_bytes} bytes; raise the limit to accept it"
            )
        if self._inflater is None:
            self._scan(view)
        else:
            self._inflate(view)

    def finish(self) -> Summary:
        """Say what the data set was, after its last byte.

        Raises
        ------
        InvalidInstance
            It ends in the middle, lacks a UID or an attribute that its SOP class cannot do without, or its pixel data does not fit.
        """
        if self._inflater is not None:
            if not self._inflater.eof:
                raise InvalidInstance(f"the deflated data set ends at byte {self._byte_count} in the middle of the compressed stream")
            trailer = _GZIP_TRAILER.pack(self._checksum, self._inflated & 0xFFFFFFFF)
            if self._inflater.unused_data not in (b"", b"\0", trailer, trailer + b"\0"):
                raise InvalidInstance("bytes follow the end of the compressed stream; only one NUL may (PS3.5 A.5)")
        self._check_end()
        sop_class_uid = self._uid(0x00080016, "SOP Class UID")
        sop_instance_uid = self._uid(0x00080018, "SOP Instance UID")
        study_instance_uid = self._uid(0x0020000D, "Study Instance UID")
        series_instance_uid = self._uid(0x0020000E, "Series Instance UID")
        lacking = missing(sop_class_uid, self._present)
        if lacking:
            names = " or ".join(f"({tag >> 16:04X},{tag & 0xFFFF:04X})" for tag in lacking)
            raise InvalidInstance(
                f"the data set ends at byte {self._byte_count} without {names}, which its SOP class cannot do without; it may be cut short"
            )
        if self._pixels_encapsulated:
            self._check_fragments()
        return Summary(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
            transfer_syntax_uid=self._transfer_syntax_uid,
            byte_count=self._byte_count,
            sha256=self._digest.hexdigest(),
            attributes={keyword: self._texts(tag) for tag, keyword in _keywords().items() if tag in self._values},
            specific_character_set=self._character_set(),
            has_pixel_data=self._pixels_at >= 0,
            pixel_data_offset=-1 if self._syntax.deflated else self._pixels_at,
            document_title_code=self._title,
            manufacturer_model_name="\\".join(self._texts(_MANUFACTURER_MODEL_NAME)),
            software_versions="\\".join(self._texts(_SOFTWARE_VERSIONS)),
        )

    # --- the bytes ---------------------------------------------------------------------------------------------------------------

    def _inflate(self, view: memoryview) -> None:
        inflater = self._inflater
        assert inflater is not None  # noqa: S101 - narrows the type
        limits = self._limits
        data: bytes | memoryview = view
        full = True
        try:
            if inflater.eof:
                inflater.decompress(data)  # which appends what follows the stream to unused_data
            while not inflater.eof and (len(data) or full):
                piece = inflater.decompress(data, _INFLATE_STEP)
                data = inflater.unconsumed_tail
                full = len(piece) == _INFLATE_STEP
                self._inflated += len(piece)
                self._checksum = zlib.crc32(piece, self._checksum)
                if self._inflated > limits.inflate_bytes:
                    raise InvalidInstance(f"the data set inflates beyond the limit of {limits.inflate_bytes} bytes")
                if self._inflated > max(_INFLATE_FLOOR, limits.inflate_ratio * self._byte_count):
                    raise InvalidInstance(f"the data set inflates by more than the limit of {limits.inflate_ratio}:1")
                self._scan(piece)
        except zlib.error as error:
            raise InvalidInstance(f"the compressed stream is no raw deflate near byte {self._byte_count} (PS3.5 A.5)") from error
        if len(inflater.unused_data) > _GZIP_TRAILER.size + 1:
            raise InvalidInstance("bytes follow the end of the compressed stream; only one NUL may (PS3.5 A.5)")

    def _scan(self, data: bytes | memoryview) -> None:
        """Walk the elements in `data`, which begins where the last call ended."""
        end = len(data)
        pos = 0
        if self._skip:
            if self._skip > end:
                self._skip -= end
                self._at += end
                return
            pos = self._skip
            self._skip = 0
        elif self._value_left:
            pos = min(self._value_left, end)
            self._value += data[:pos]
            self._value_left -= pos
            if self._value_left:
                self._at += end
                return
            self._keep(*self._value_of, bytes(self._value))
        elif self._rest:
            data = b"".join((self._rest, data))
            self._at -= len(self._rest)
            self._rest = b""
            end = len(data)

        base = self._at
        budget = self._budget
        stack = self._stack
        wanted = _wanted()
        sequences = sequence_tags()
        kind, limit, closed, encoding, last = self._context

        while True:
            here = base + pos
            while here == limit:
                if not closed:
                    self._refuse(last, here, "the enclosing element ends before the delimiter of the sequence or item inside")
                kind, limit, closed, encoding, last = stack.pop()
            if end - pos < 8:
                break

            if kind == _ELEMENTS:
                if encoding == LITTLE:
                    group, element, vr, length = _EXPLICIT_LITTLE(data, pos)
                elif encoding == IMPLICIT:
                    group, element, length = _PLAIN_LITTLE(data, pos)
                    vr = b""
                else:
                    group, element, vr, length = _EXPLICIT_BIG(data, pos)
                tag = group << 16 | element
                if tag <= last:
                    self._refuse_order(tag, last, here)
                if group == 0xFFFE:
                    length = _LENGTH_BIG(data, pos + 4)[0] if encoding == BIG else _LENGTH_LITTLE(data, pos + 4)[0]
                    if tag != _ITEM_END or closed or not stack or length:
                        self._refuse(tag, here, "an item or delimiter stands where a data element is expected")
                    budget -= 1
                    kind, limit, closed, encoding, last = stack.pop()
                    pos += 8
                    continue
                header = 8
                if encoding == IMPLICIT:
                    form = _SEQUENCE if length == _UNDEFINED or tag in sequences else _LONG
                else:
                    form = _FORMS.get(vr, 0)
                    if form != _SHORT:
                        if not form and not (vr.isalpha() and vr.isupper()):
                            if last == _FIRST_TAG and stack and encoding == LITTLE:
                                encoding = IMPLICIT
                                continue
                            self._refuse(tag, here, "the value representation is no pair of capital letters")
                        if end - pos < 12:
                            break
                        header = 12
                        length = _LENGTH_BIG(data, pos + 8)[0] if encoding == BIG else _LENGTH_LITTLE(data, pos + 8)[0]
                last = tag
                budget -= 1
                if budget < 0:
                    self._refuse(tag, here, f"the limit of {self._limits.elements} elements and items is exceeded")

                if length == _UNDEFINED:
                    if not stack and tag in wanted:
                        self._present.add(tag)
                    if tag == PIXEL_DATA and encoding == LITTLE and vr in (b"OB", b"OW"):
                        if not stack:
                            if not self._syntax.encapsulated:
                                self._refuse(tag, here, "Pixel Data of undefined length in a transfer syntax that does not encapsulate")
                            self._note_pixels(tag, here, None)
                        inner = _FRAGMENTS
                    elif form in (_SEQUENCE, _UNKNOWN) and tag not in _PIXELS:
                        inner = _ITEMS
                    else:
                        self._refuse(tag, here, "an undefined length stands where the value representation allows none")
                    if len(stack) >= 2 * self._limits.depth:
                        self._refuse(tag, here, f"sequences are nested deeper than the limit of {self._limits.depth}")
                    stack.append((kind, limit, closed, encoding, last))
                    kind, closed = inner, False
                    if form == _UNKNOWN:
                        encoding = IMPLICIT
                    pos += header
                    continue

                value_end = here + header + length
                if value_end > limit:
                    self._refuse_length(tag, here, length)
                if form == _SEQUENCE:
                    if tag in _PIXELS:
                        self._refuse(tag, here, "pixel data is no sequence")
                    if not stack and tag in wanted:
                        self._present.add(tag)
                    if len(stack) >= 2 * self._limits.depth:
                        self._refuse(tag, here, f"sequences are nested deeper than the limit of {self._limits.depth}")
                    stack.append((kind, limit, closed, encoding, last))
                    kind, limit, closed = _ITEMS, value_end, True
                    pos += header
                    continue

                pos += header
                if not stack:
                    keep = wanted.get(tag)
                    if keep is not None:
                        self._present.add(tag)
                        if tag in _PIXELS:
                            self._note_pixels(tag, here, length)
                else:
                    keep = tag in _CODE_VALUES and len(stack) == 2 and stack[0][4] == CONCEPT_NAME_CODE_SEQUENCE
                if keep:
                    if length > VALUE_LIMIT:
                        self._refuse(tag, here, f"the value is {length} bytes long; for an indexed attribute the limit is {VALUE_LIMIT}")
                    if end - pos < length:
                        self._value_of = (tag, vr)
                        self._value = bytearray(data[pos:end])
                        self._value_left = length - (end - pos)
                        pos = end
                        break
                    self._keep(tag, vr, bytes(data[pos : pos + length]))

            else:
                group, element, length = _PLAIN_BIG(data, pos) if encoding == BIG else _PLAIN_LITTLE(data, pos)
                tag = group << 16 | element
                budget -= 1
                if budget < 0:
                    self._refuse(tag, here, f"the limit of {self._limits.elements} elements and items is exceeded")
                pos += 8
                if tag == _SEQUENCE_END and not closed and not length:
                    kind, limit, closed, encoding, last = stack.pop()
                    continue
                if tag != _ITEM:
                    self._refuse(tag, here, "an item or the end of the sequence is expected here")
                if length == _UNDEFINED:
                    if kind == _FRAGMENTS:
                        self._refuse(tag, here, "a fragment of pixel data has an undefined length")
                    stack.append((kind, limit, closed, encoding, last))
                    kind, closed, last = _ELEMENTS, False, _FIRST_TAG
                    continue
                if here + 8 + length > limit:
                    self._refuse_length(tag, here, length)
                if kind == _ITEMS:
                    stack.append((kind, limit, closed, encoding, last))
                    kind, limit, closed, last = _ELEMENTS, here + 8 + length, True, _FIRST_TAG
                    continue
                if len(stack) == 1:
                    if not self._fragments and length % 4:
                        self._refuse(tag, here, "the Basic Offset Table is no multiple of 4 bytes long")
                    self._fragments += 1

            pos += length
            if pos > end:
                self._skip = pos - end
                pos = end
                break

        self._context = (kind, limit, closed, encoding, last)
        self._budget = budget
        self._rest = bytes(data[pos:end])
        self._at = base + end

    # --- the values --------------------------------------------------------------------------------------------------------------

    def _keep(self, tag: int, vr: bytes, value: bytes) -> None:
        if self._stack:
            self._title = self._title or decode(value, ()).strip(" \0")
        else:
            self._values[tag] = (vr, value)

    def _character_set(self) -> tuple[str, ...]:
        value = self._values.get(_CHARACTER_SET, (b"", b""))[1]
        return tuple(term.strip(" \0") for term in value.decode("ascii", "replace").split("\\")) if value.strip(b" \0") else ()

    def _texts(self, tag: int) -> tuple[str, ...]:
        """Return the values of a kept element as text, without padding; none when it is absent or empty."""
        vr, value = self._values.get(tag, (b"", b""))
        if not value:
            return ()
        width = _WIDTHS.get(vr, 0)
        if not width and vr in (b"", b"UN"):
            keyword = _keywords().get(tag)
            width = 2 if keyword is not None and INDEXED[keyword][1] == "US" else 0
        if width:
            # an implicit sequence within big endian is little endian, but never at the top
            order = ">" if self._syntax.encoding == BIG and vr != b"UN" else "<"
            count = len(value) // width
            return tuple(map(str, struct.unpack_from(f"{order}{count}{'H' if width == 2 else 'I'}", value)))
        text = value.decode("ascii") if value.isascii() and b"\x1b" not in value else decode(value, self._character_set())
        if "\\" not in text:
            text = text.strip(" \0")
            return (text,) if text else ()
        values = tuple(single.strip(" \0") for single in text.split("\\"))
        return () if values == ("",) else values

    def _uid(self, tag: int, name: str) -> str:
        if tag not in self._values:
            raise InvalidInstance(f"{name} ({tag >> 16:04X},{tag & 0xFFFF:04X}) is missing")
        values = self._texts(tag)
        if len(values) != 1 or not valid_uid(values[0]):
            raise InvalidInstance(
                f"{name} ({tag >> 16:04X},{tag & 0xFFFF:04X}) is no UID: 1 to 64 characters, digits parted by single dots (PS3.5 9.1)"
            )
        return values[0]

    # --- the pixel data ----------------------------------------------------------------------------------------------------------

    def _note_pixels(self, tag: int, here: int, length: int | None) -> None:
        """Judge the pixel data at its header: everything that says how large it must be has gone by, since tags ascend."""
        if self._pixels_at >= 0:
            self._refuse(tag, here, "a second kind of pixel data in one data set")
        if tag == PIXEL_DATA and length is not None and self._syntax.encapsulated:
            remedy = "send it in Explicit VR Little Endian, or compressed as announced (PS3.5 A.4)"
            self._refuse(tag, here, f"native Pixel Data in an encapsulated transfer syntax; {remedy}")
        self._pixels_at = here
        self._pixels_encapsulated = length is None
        geometry = self._geometry(here)
        if length is None:
            return
        sizes = geometry.native_sizes(tag)
        if not any(length in (size, size + size % 2) for size in sizes):
            self._refuse(tag, here, f"the pixel data is {length} bytes long, rows, columns, samples, bits and frames make it {sizes[0]}")

    def _geometry(self, here: int) -> Geometry:
        names = {0x00280002: "Samples per Pixel", 0x00280010: "Rows", 0x00280011: "Columns", 0x00280100: "Bits Allocated"}
        numbers = {tag: self._number(tag, name, here) for tag, name in names.items()}
        frames = self._number(0x00280008, "Number of Frames", here) if self._texts(0x00280008) else 1
        photometric_interpretation = self._texts(0x00280004)
        geometry = Geometry(
            rows=numbers[0x00280010],
            columns=numbers[0x00280011],
            samples_per_pixel=numbers[0x00280002],
            bits_allocated=numbers[0x00280100],
            number_of_frames=frames,
            photometric_interpretation=photometric_interpretation[0] if photometric_interpretation else "",
        )
        fault = geometry.fault()
        if fault:
            self._refuse(PIXEL_DATA, here, fault)
        return geometry

    def _number(self, tag: int, name: str, here: int) -> int:
        values = self._texts(tag)
        if len(values) != 1 or not _WHOLE_NUMBER.fullmatch(values[0]):
            self._refuse(tag, here, f"{name} is not one whole number, which the pixel data that begins here needs")
        return int(values[0])

    def _check_fragments(self) -> None:
        frames = 1 if self._syntax.video else self._geometry(self._pixels_at).number_of_frames
        fragments = self._fragments - 1  # the first item is the Basic Offset Table
        if fragments < frames:
            self._refuse(PIXEL_DATA, self._pixels_at, f"{max(fragments, 0)} fragments of pixel data for {frames} frames")

    # --- refusals ----------------------------------------------------------------------------------------------------------------

    def _check_end(self) -> None:
        kind, _, _, _, last = self._context
        if self._skip or self._value_left:
            lacking = self._skip or self._value_left
            tag = self._value_of[0] if self._value_left else last
            self._refuse(tag, self._at, f"the data set ends {lacking} bytes before the end of this value")
        if self._rest:
            self._refuse(last, self._at, "the data set ends in the middle of the header of the element after this one")
        if self._stack:
            what = {_ELEMENTS: "an item", _ITEMS: "a sequence", _FRAGMENTS: "encapsulated pixel data"}[kind]
            self._refuse(self._stack[-1][4] if last == _FIRST_TAG else last, self._at, f"the data set ends inside {what}")

    def _refuse(self, tag: int, offset: int, what: str) -> NoReturn:
        where = " of the inflated data set" if self._syntax.deflated else ""
        raise InvalidInstance(f"({tag >> 16:04X},{tag & 0xFFFF:04X}) at byte {offset}{where}: {what}")

    def _refuse_length(self, tag: int, offset: int, length: int) -> NoReturn:
        around = "the enclosing sequence or item" if self._stack else "the limit on the instance's size"
        self._refuse(tag, offset, f"the length of {length} bytes runs past {around}")

    def _refuse_order(self, tag: int, last: int, offset: int) -> NoReturn:
        if tag <= _FIRST_TAG:
            self._refuse(tag, offset, "this group belongs to commands or file meta information, not to a data set")
        if tag == last:
            self._refuse(tag, offset, "the element stands there twice")
        self._refuse(tag, offset, f"tags must ascend, but ({last >> 16:04X},{last & 0xFFFF:04X}) came before")
