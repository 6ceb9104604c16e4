"""Where each frame of an image lies in its stored data set. Nothing is decoded here.

References
----------
DICOM PS3.5 Section 8 and Annex A.4 (fragments, Basic Offset Table), PS3.3 C.7.6.3.1.8 (Extended Offset Table)
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dicomweb.dataset import BULK_TAGS, WORD_BYTES, DataSet, Element, resolve_vr, swap
from dicomweb.errors import NotAcceptable, NotFound
from dicomweb.metadata import integer

_SAMPLES, _FRAMES, _ROWS, _COLUMNS, _BITS = 0x00280002, 0x00280008, 0x00280010, 0x00280011, 0x00280100
_PHOTOMETRIC = 0x00280004
_OFFSETS, _LENGTHS = 0x7FE00001, 0x7FE00002
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")
"""First bytes of a JPEG or JPEG-LS image, a JPEG 2000 codestream, a JP2 file."""
_BITS_OF = {0x7FE00008: 32, 0x7FE00009: 64}
_MAX_TABLE = 16 * 1024**2

Span = tuple[int, int]
"""Offset and length in the stored data set."""


@dataclass(frozen=True, slots=True)
class PixelData:
    """The pixel data element and what is needed to divide it into frames."""

    element: Element
    frames: int
    frame_bits: int
    """Of a native frame."""
    fragments_at: int = 0
    """Where the first fragment's item header stands; encapsulated only."""
    tables: Mapping[int, bytes] = field(default_factory=dict)
    """Offset tables that the object holds."""

    @property
    def encapsulated(self) -> bool:
        """Whether the frames are compressed, in fragments."""
        return self.element.length < 0


def find_pixels(data_set: DataSet) -> PixelData:
    """Find the pixel data of an image.

    Raises
    ------
    NotFound
        The instance has none.
    InvalidInstance
        The framing is broken.
    """
    numbers = {_SAMPLES: 1, _FRAMES: 1, _ROWS: 0, _COLUMNS: 0, _BITS: 0}
    subsampled = False
    tables: dict[int, bytes] = {}
    depth = 0
    for event in data_set.walk():
        if not isinstance(event, Element):
            depth += {"SequenceBegin": 1, "SequenceEnd": -1}.get(type(event).__name__, 0)
            continue
        if depth:
            continue
        if event.tag in numbers and 0 < event.length <= 16:
            numbers[event.tag] = _number(data_set, event, numbers[event.tag])
        elif event.tag == _PHOTOMETRIC and 0 < event.length <= 16:
            subsampled = data_set.read(event.offset, event.length).strip(b" \0").endswith((b"_422", b"_420"))
        elif event.tag in {_OFFSETS, _LENGTHS} and 0 < event.length <= _MAX_TABLE:
            tables[event.tag] = data_set.read(event.offset, event.length)
        elif event.tag in BULK_TAGS:
            bits = _BITS_OF.get(event.tag, numbers[_BITS])
            frames = max(1, numbers[_FRAMES])
            frame_bits = numbers[_ROWS] * numbers[_COLUMNS] * numbers[_SAMPLES] * bits
            if event.length >= 0 and subsampled:
                frame_bits = event.length // frames * 8
            if event.length < 0:
                offset, length = next(data_set.fragments(event.offset), (event.offset, 0))
                if 0 < length <= _MAX_TABLE:
                    tables[0] = data_set.read(offset, length)
                return PixelData(event, frames, frame_bits, offset + length, tables)
            return PixelData(event, frames, frame_bits)
    raise NotFound("the instance has no pixel data")


def _number(data_set: DataSet, element: Element, default: int) -> int:
    raw = data_set.read(element.offset, element.length)
    if element.tag == _FRAMES:
        return integer(raw.decode("latin-1").strip(" \0")) or default
    return int(struct.unpack(element.order + "H", raw[:2])[0]) if len(raw) >= 2 else default


def frame_pieces(data_set: DataSet, pixels: PixelData, number: int) -> Iterator[bytes]:
    """Give the bytes of one native frame, little endian.

    Parameters
    ----------
    number
        From 1, not above ``pixels.frames``.
    """
    element = pixels.element
    start = (number - 1) * pixels.frame_bits
    if pixels.frame_bits % 8:
        # Bit-packed frames follow each other without padding (PS3.5 8.2): shift this one to a byte border.
        raw = data_set.read(element.offset + start // 8, (start % 8 + pixels.frame_bits + 7) // 8)
        bits = int.from_bytes(raw, "little") >> start % 8 & ((1 << pixels.frame_bits) - 1)
        yield bits.to_bytes((pixels.frame_bits + 7) // 8, "little")
        return
    word = WORD_BYTES.get(resolve_vr(element.vr, signed=False), 1) if element.order == ">" else 1
    for piece in data_set.chunks(element.offset + start // 8, pixels.frame_bits // 8):
        yield swap(piece, word) if word > 1 else piece


def compressed_frames(data_set: DataSet, pixels: PixelData, numbers: Sequence[int]) -> list[list[Span]]:
    """Find the fragments of each asked frame, in the order asked.

    Raises
    ------
    NotAcceptable
        The object does not tell where its frames begin.
    InvalidInstance
        The framing is broken.
    """
    starts = _starts(pixels)
    if starts:
        return [_between(data_set, pixels, starts, number) for number in numbers]
    fragments = list(data_set.fragments(pixels.fragments_at))
    groups = _groups(data_set, fragments, pixels.frames)
    return [groups[number - 1] for number in numbers]


def _starts(pixels: PixelData) -> list[int]:
    """Offsets of the frames by the Extended or Basic Offset Table; empty when there is none that fits."""
    for tag, code, size in ((_OFFSETS, "Q", 8), (0, "I", 4)):
        table = pixels.tables.get(tag, b"")
        if len(table) == pixels.frames * size:
            starts = list(struct.unpack(f"<{pixels.frames}{code}", table))
            if starts[0] == 0 and all(one < other for one, other in itertools.pairwise(starts)):
                return starts
    return []


def _between(data_set: DataSet, pixels: PixelData, starts: Sequence[int], number: int) -> list[Span]:
    end = pixels.fragments_at + starts[number] if number < len(starts) else None
    spans: list[Span] = []
    for offset, length in data_set.fragments(pixels.fragments_at + starts[number - 1]):
        if end is not None and offset - 8 >= end:
            break
        spans.append((offset, length))
    return spans


def _groups(data_set: DataSet, fragments: Sequence[Span], frames: int) -> list[list[Span]]:
    """Divide the fragments among the frames without a table."""
    if frames == 1:
        return [list(fragments)]
    if len(fragments) == frames:
        return [[span] for span in fragments]
    groups: list[list[Span]] = []
    for offset, length in fragments:
        if data_set.read(offset, min(length, 8)).startswith(_STARTS) or not groups:
            groups.append([])
        groups[-1].append((offset, length))
    if len(groups) == frames:
        return groups
    if fragments and len(fragments) % frames == 0:
        each = len(fragments) // frames
        return [list(fragments[index : index + each]) for index in range(0, len(fragments), each)]
    raise NotAcceptable("the object does not tell where its frames begin; retrieve the instance with transfer-syntax=*")
