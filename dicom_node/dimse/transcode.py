"""A stored instance in the two transfer syntaxes that every receiver has, for those that lack its own: as a stream, losing nothing.

Uncompressed data sets are re-encoded element by element. Compressed ones are decoded frame by frame in a process of its own
(:mod:`dicom_node.dimse.decoder`): codecs are native code, and what they crash over must not take the associations of all others along.
Attributes that speak of the encoding of the pixels follow them; those of lossy compression stay, since what was lost does not come back.

References
----------
DICOM PS3.5 Section 7.1, 8.2, Annex A.1, A.2 and A.4; PS3.3 C.7.6.3.1 (Image Pixel), C.7.6.1.1.5 (Lossy Image Compression)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dicom_node.dimse.decoder import Decoder
from dicom_node.dimse.identifier import EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN, write_element
from dicomweb.dataset import (
    LONG_FORM,
    PIXEL_DATA,
    WORD_BYTES,
    DataSet,
    Element,
    ItemBegin,
    ItemEnd,
    SequenceBegin,
    resolve_vr,
    swap,
)
from dicomweb.errors import NotAcceptable, NotFound
from dicomweb.frames import compressed_frames, find_pixels
from storage.errors import UnsupportedInstance
from storage.iod import TRANSFER_SYNTAXES

if TYPE_CHECKING:
    from storage.stored import StoredInstance

PLAIN: Final = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)

_ROOT = "1.2.840.10008.1.2"
_DECODABLE = frozenset(
    (
        f"{_ROOT}.5",
        f"{_ROOT}.8.1",
        f"{_ROOT}.1.98",
        *(f"{_ROOT}.4.{number}" for number in (50, 51, 53, 55, 57, 70, 80, 81, 90, 91, 201, 202, 203)),
    )
)
_LOSSY = frozenset(f"{_ROOT}.4.{number}" for number in (50, 51, 53, 55, 81))
"""Always; of JPEG 2000 the header knows."""

_PLAIN_SOURCES = frozenset((*PLAIN, f"{_ROOT}.2", f"{_ROOT}.1.99"))
_PIXEL_REPRESENTATION = 0x00280103
_ICON_IMAGE_SEQUENCE = 0x00880200
_OFFSET_TABLES = frozenset({0x7FE00001, 0x7FE00002, 0x7FE00003})
_PHOTOMETRIC_INTERPRETATION, _PLANAR_CONFIGURATION, _HIGH_BIT, _LOSSY_IMAGE_COMPRESSION = 0x00280004, 0x00280006, 0x00280102, 0x00282110
_NUMBERS: Mapping[int, str] = {
    0x00280002: "samples_per_pixel",
    0x00280006: "planar",
    0x00280010: "rows",
    0x00280011: "columns",
    0x00280100: "bits_allocated",
    0x00280101: "bits_stored",
    _HIGH_BIT: "high_bit",
    _PIXEL_REPRESENTATION: "signed",
}
_MAXIMUM = 0xFFFFFFFE
_FRAME_BYTES = 512 * 1024**2

_UNDEFINED = 0xFFFFFFFF
_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, _UNDEFINED)
_ITEM_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
_SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def alternatives(transfer_syntax_uid: str) -> tuple[str, ...]:
    """Return the transfer syntaxes that an instance stored in this one can be had in besides, the best first."""
    if transfer_syntax_uid in _PLAIN_SOURCES or transfer_syntax_uid in _DECODABLE:
        return tuple(syntax for syntax in PLAIN if syntax != transfer_syntax_uid)
    return ()


def in_order_of_use(syntaxes: Sequence[str]) -> list[str]:
    """Order what is proposed for a context that instances go out in, of which one syntax is accepted: a plain one first.

    Everything can be had in that. A compressed one, accepted, would leave out whatever is stored in another; who wants instances as
    they are stored proposes their syntax in a context of its own. What cannot be decoded, a video's syntax, keeps its place.
    """
    if not syntaxes or not alternatives(syntaxes[0]):
        return list(syntaxes)
    return [*(syntax for syntax in PLAIN if syntax in syntaxes), *(syntax for syntax in syntaxes if syntax not in PLAIN)]


def transcoded(stored: StoredInstance, transfer_syntax_uid: str, turn: AbstractContextManager[None] | None = None) -> Iterator[bytes]:
    """Give the data set of an instance in one of its `alternatives`, in pieces. To be closed by who does not take all of them.

    Parameters
    ----------
    turn
        Held while a process of its own decodes; None: at once.

    Raises
    ------
    UnsupportedInstance
        The pixels cannot be decoded.
    StorageError
        It cannot be read, or its framing is broken.
    """
    source = stored.record.summary.transfer_syntax_uid
    explicit = transfer_syntax_uid == EXPLICIT_VR_LITTLE_ENDIAN
    data_set = DataSet(stored.read, source)
    if TRANSFER_SYNTAXES[source].encapsulated and stored.record.summary.has_pixel_data:
        yield from _decoded(data_set, source, turn or nullcontext(), explicit=explicit)
    else:
        yield from _gathered(_written(data_set, explicit=explicit))


def _gathered(pieces: Iterator[bytes], size: int = 262_144) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= size:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What becomes of the top level of a data set whose pixels were decoded."""

    values: Mapping[int, tuple[str, bytes]]
    """Tag -> VR and value of what is written instead, or in addition."""
    pixels: Iterator[bytes]
    pixel_vr: str
    pixel_bytes: int


def _written(data_set: DataSet, *, explicit: bool, changes: _Changes | None = None) -> Iterator[bytes]:
    """Write every element anew, Little Endian."""
    signed = False
    depth = 0
    skipping = False
    waiting = sorted(changes.values.items()) if changes is not None else []
    for event in data_set.walk():
        if isinstance(event, Element | SequenceBegin) and not depth:
            while waiting and waiting[0][0] <= event.tag:
                tag, (vr, value) = waiting.pop(0)
                yield write_element(tag, vr, value, explicit=explicit)
        match event:
            case SequenceBegin(tag=tag):
                skipping = skipping or (changes is not None and not depth and tag == _ICON_IMAGE_SEQUENCE)
                depth += 1
                if not skipping:
                    yield _header(tag, "SQ", _UNDEFINED, explicit=explicit)
            case Element(tag=tag) if skipping or (changes is not None and not depth and (tag in changes.values or tag in _OFFSET_TABLES)):
                pass
            case Element(tag=tag, length=-1) if changes is None or depth or tag != PIXEL_DATA:
                raise UnsupportedInstance("compressed data outside of the Pixel Data cannot be written in an uncompressed transfer syntax")
            case Element(length=-1) if changes is not None:
                yield _header(PIXEL_DATA, changes.pixel_vr, changes.pixel_bytes + changes.pixel_bytes % 2, explicit=explicit)
                yield from changes.pixels
                yield b"\0" * (changes.pixel_bytes % 2)
            case Element():
                if event.tag == _PIXEL_REPRESENTATION and event.length == 2:
                    signed = data_set.read(event.offset, 2) in {b"\0\1", b"\1\0"}
                yield from _element(data_set, event, resolve_vr(event.vr, signed=signed), explicit=explicit)
            case ItemBegin():
                yield b"" if skipping else _ITEM
            case ItemEnd():
                yield b"" if skipping else _ITEM_END
            case _:
                depth -= 1
                yield b"" if skipping else _SEQUENCE_END
                skipping = skipping and depth > 0
    for tag, (vr, value) in waiting:
        yield write_element(tag, vr, value, explicit=explicit)


def _header(tag: int, vr: str, length: int, *, explicit: bool) -> bytes:
    if not explicit:
        return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, length)
    if vr in LONG_FORM or length > 0xFFFF:
        # A value too long for the 16-bit length of its VR is UN (PS3.5 6.2.2).
        code = vr if vr in LONG_FORM else "UN"
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, code.encode("ascii"), 0, length)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode("ascii"), length)


def _element(data_set: DataSet, element: Element, vr: str, *, explicit: bool) -> Iterator[bytes]:
    yield _header(element.tag, vr, element.length, explicit=explicit)
    word = 1 if element.order == "<" else WORD_BYTES.get(vr, 1)
    for piece in data_set.chunks(element.offset, element.length):
        yield swap(piece, word) if word > 1 else piece


# -- compressed ----------------------------------------------------------------------------------------------------------------------


def _decoded(data_set: DataSet, source: str, turn: AbstractContextManager[None], *, explicit: bool) -> Iterator[bytes]:
    """Write a data set with its frames decoded; the first one before anything is written, so that a failure is known in time."""
    numbers, interpretation = _image(data_set)
    try:
        pixels = find_pixels(data_set)
        spans = compressed_frames(data_set, pixels, range(1, pixels.frames + 1))
    except (NotAcceptable, NotFound) as error:
        raise UnsupportedInstance("the compressed data do not tell where their frames begin") from error
    samples, allocated = numbers.get("samples_per_pixel", 1), numbers.get("bits_allocated", 0)
    frame_bytes = numbers.get("rows", 0) * numbers.get("columns", 0) * samples * allocated // 8
    if allocated not in {8, 16} or not 0 < frame_bytes <= _FRAME_BYTES or frame_bytes * pixels.frames > _MAXIMUM:
        raise UnsupportedInstance("decoded, the pixels would be too many, or of a size that is not supported")
    stored_bits = numbers.get("bits_stored", allocated)
    image = {
        **{name: numbers.get(name, 0) for name in ("rows", "columns")},
        "transfer_syntax_uid": source,
        "frame_count": pixels.frames,
        "samples_per_pixel": samples,
        "photometric_interpretation": interpretation,
        "planar": numbers.get("planar", 0) == 1,
        "bits_allocated": allocated,
        "bits_stored": stored_bits,
        "high_bit": numbers.get("high_bit", stored_bits - 1),
        "signed": numbers.get("signed", 0) == 1,
        "vr": "OW" if allocated > 8 else "OB",
    }
    with turn, Decoder(image, frame_bytes=frame_bytes) as decoder:

        def frame(number: int) -> tuple[bytes, str]:
            size = sum(length for _, length in spans[number])
            if size > _FRAME_BYTES:
                raise UnsupportedInstance("a compressed frame is too long")
            return decoder.decode(b"".join(data_set.read(*span) for span in spans[number] if span[1]))

        first, became = frame(0)

        def frames() -> Iterator[bytes]:
            yield first
            for number in range(1, pixels.frames):
                values, interpreted = frame(number)
                if interpreted != became:
                    raise UnsupportedInstance("the frames are of different colour spaces")
                yield values

        values: dict[int, tuple[str, bytes]] = {
            _PHOTOMETRIC_INTERPRETATION: ("CS", became.encode("ascii")),
            _HIGH_BIT: ("US", struct.pack("<H", stored_bits - 1)),
        }
        if samples > 1:
            values[_PLANAR_CONFIGURATION] = ("US", struct.pack("<H", 0))
        if source in _LOSSY:
            values[_LOSSY_IMAGE_COMPRESSION] = ("CS", b"01")
        changes = _Changes(values, frames(), "OW" if allocated > 8 else "OB", frame_bytes * pixels.frames)
        yield from _gathered(_written(data_set, explicit=explicit, changes=changes))


def _image(data_set: DataSet) -> tuple[dict[str, int], str]:
    """Read the numbers of the Image Pixel module, and the photometric interpretation."""
    numbers: dict[str, int] = {}
    interpretation = ""
    depth = 0
    for event in data_set.walk():
        match event:
            case SequenceBegin():
                depth += 1
            case Element(tag=tag, offset=offset, length=length) if not depth:
                if tag in _NUMBERS and length == 2:
                    numbers[_NUMBERS[tag]] = int.from_bytes(data_set.read(offset, 2), "little")
                elif tag == _PHOTOMETRIC_INTERPRETATION and 0 < length <= 16:
                    interpretation = data_set.read(offset, length).decode("ascii", "replace").strip(" \0")
                elif tag >= PIXEL_DATA:
                    break
            case Element() | ItemBegin() | ItemEnd():
                pass
            case _:
                depth -= 1
    return numbers, interpretation
