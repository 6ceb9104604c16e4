"""What compressed frames say about themselves, read before any decoder sees them.

A decoder allocates what its stream claims, and most of them fill a truncated stream with grey instead of refusing it.
So size, precision, component count, number of scans or tiles and the proper end of a stream are checked here, in plain
Python and without allocation.

References
----------
DICOM PS3.5 Annex A.4 (encapsulation) and Annex G (RLE); ITU-T T.81 Annex B (JPEG), T.87 Annex C (JPEG-LS),
T.800 Annex A (JPEG 2000), ISO 10918-6 (Adobe's APP14).
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from inference.errors import UnsupportedPixels

_ITEM: Final = 0xE000FFFE  # (FFFE,E000) read as one little-endian number
_DELIMITER: Final = 0xE0DDFFFE  # (FFFE,E0DD)

_MAXIMUM_SCANS: Final = 100
"""libjpeg's own progressive script has 10; a stream of 80 000 tiny scans is an attack on the decoder's time."""

_JPEG_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""The end of entropy-coded data: 0xFF followed by neither a stuffed zero, a restart marker nor another fill byte."""

_JPEG_LS_MARKER: Final = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")
"""JPEG-LS stuffs one zero bit after 0xFF: a marker is what has its highest bit set (T.87 C.2)."""

_START_OF_FRAME: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})
JPEG_LOSSLESS: Final = 0xC3
JPEG_LS: Final = 0xF7


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """A JPEG or JPEG-LS stream in words: its frame header, and the application segments that decide the colour."""

    process: int
    """The SOF marker's second byte: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, 0xC3 lossless, 0xF7 JPEG-LS."""
    precision: int
    rows: int
    columns: int
    component_ids: tuple[int, ...]
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) sampling factors by component."""
    jfif: bool
    adobe_transform: int | None
    """Colour transform of APP14: 0 none, 1 YCbCr; None when the stream carries no such segment."""
    icc_profile: bytes
    colour_segments: tuple[int, ...]
    """Where the JFIF and APP14 segments begin."""

    @property
    def subsampled(self) -> bool:
        """Whether any component has fewer samples than another; only chroma ever has."""
        return len(set(self.sampling)) > 1

    @property
    def holds_ybr(self) -> bool | None:
        """What the stream itself says of three components: True luma and chroma, False RGB, None nothing."""
        if self.jfif and self.process != JPEG_LOSSLESS:
            return True  # JFIF knows YCbCr only (ITU-T T.871); not defined for lossless streams, where encoders leave it by habit
        if self.adobe_transform is not None:
            return self.adobe_transform != 0
        if bytes(self.component_ids) in {b"RGB", b"rgb"}:
            return False
        return True if self.subsampled else None


@dataclass(frozen=True, slots=True)
class Jpeg2000Header:
    """The SIZ and COD segments of a JPEG 2000 or HTJ2K codestream."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool
    colour_transform: bool
    """Multiple component transform: the decoder gives RGB."""
    offset: int
    """Where the codestream begins; not 0 in the JP2 wrapping that PS3.5 A.4.4 forbids and some senders write."""


def split_frames(encapsulated: memoryview, frame_count: int, extended_offsets: tuple[int, ...] = ()) -> list[tuple[memoryview, ...]]:
    """Give the fragments of each frame.

    A Basic or Extended Offset Table is believed only when every entry points at the beginning of a fragment;
    otherwise one fragment a frame, or the beginnings of JPEG and JPEG 2000 streams, decide.

    Raises
    ------
    UnsupportedPixels
        The items do not end exactly, or do not make `frame_count` frames.

    References
    ----------
    DICOM PS3.5 Section A.4
    """
    items, starts = _items(encapsulated)
    table, fragments = items[0], items[1:]
    if not fragments:
        raise UnsupportedPixels("The encapsulated Pixel Data holds no fragment.")
    if frame_count == 1:
        return [tuple(fragments)]
    offsets = extended_offsets
    if not offsets and len(table) == 4 * frame_count:
        offsets = struct.unpack(f"<{frame_count}I", table)
    index_of = {start: index for index, start in enumerate(starts)}
    begins = [index_of.get(offset, -1) for offset in offsets]
    if len(begins) != frame_count or begins[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(begins)):
        begins = _guessed_begins(fragments, frame_count)
    return [tuple(fragments[begin:end]) for begin, end in itertools.pairwise([*begins, len(fragments)])]


def _items(encapsulated: memoryview) -> tuple[list[memoryview], list[int]]:
    """All items, the offset table first; and where each fragment's item tag lies, counted from the first fragment's."""
    items: list[memoryview] = []
    positions: list[int] = []
    position, end = 0, len(encapsulated)
    while position + 8 <= end:
        tag, length = struct.unpack_from("<II", encapsulated, position)
        if tag == _DELIMITER:
            if not items:
                raise UnsupportedPixels("The encapsulated Pixel Data holds no offset table item.")
            return items, [start - positions[1] for start in positions[1:]]
        if tag != _ITEM or position + 8 + length > end:
            raise UnsupportedPixels("The encapsulated Pixel Data is damaged: an item is no item, or ends behind the end.")
        items.append(encapsulated[position + 8 : position + 8 + length])
        positions.append(position)
        position += 8 + length
    raise UnsupportedPixels("The encapsulated Pixel Data ends without its Sequence Delimitation Item.")


def _guessed_begins(fragments: Sequence[memoryview], frame_count: int) -> list[int]:
    """Index of the first fragment of each frame, without an offset table that can be believed."""
    if len(fragments) == frame_count:
        return list(range(frame_count))
    begins = [index for index, fragment in enumerate(fragments) if bytes(fragment[:3]) in {b"\xff\xd8\xff", b"\xff\x4f\xff"}]
    if len(begins) != frame_count or begins[0] != 0:
        raise UnsupportedPixels(f"{len(fragments)} fragments of Pixel Data cannot be divided into {frame_count} frames.")
    return begins


def jpeg_header(stream: bytes) -> JpegHeader:
    """Walk a JPEG or JPEG-LS stream from SOI to EOI.

    Raises
    ------
    UnsupportedPixels
        No such stream, cut short, or with an absurd number of scans.
    """
    if stream[:2] != b"\xff\xd8":
        raise UnsupportedPixels("The frame is no JPEG stream: it does not begin with SOI.")
    frame: tuple[int, bytes] | None = None
    jfif, adobe_transform, scans = False, None, 0
    profile_chunks: dict[int, bytes] = {}
    colour_segments: list[int] = []
    position = 2
    while position + 2 <= len(stream):
        if stream[position] != 0xFF:
            raise UnsupportedPixels("The JPEG stream is damaged: a marker is missing between two segments.")
        marker = stream[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xD9:
            if frame is None or not scans:
                raise UnsupportedPixels("The JPEG stream holds no picture.")
            return _described(frame, jfif, adobe_transform, _joined(profile_chunks), tuple(colour_segments))
        length = int.from_bytes(stream[position + 2 : position + 4], "big")
        segment = stream[position + 4 : position + 2 + length]
        if length < 2 or position + 2 + length > len(stream):
            break
        if marker in {0xE0, 0xEE}:
            colour_segments.append(position)
        position += 2 + length
        if marker in _START_OF_FRAME:
            if frame is not None:
                raise UnsupportedPixels("The JPEG stream has two frame headers (hierarchical mode); no decoder here reads that.")
            frame = marker, segment
        elif marker == 0xE0 and segment.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xE2 and segment.startswith(b"ICC_PROFILE\0") and len(segment) > 14:
            profile_chunks[segment[12]] = segment[14:]
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            adobe_transform = segment[11]
        elif marker == 0xDA:
            scans += 1
            if scans > _MAXIMUM_SCANS:
                raise UnsupportedPixels(f"The JPEG stream has more than {_MAXIMUM_SCANS} scans.")
            following = (_JPEG_LS_MARKER if frame and frame[0] == JPEG_LS else _JPEG_MARKER).search(stream, position)
            if following is None:
                break
            position = following.start()
    raise UnsupportedPixels("The JPEG stream is cut short: it ends before EOI.")


def _joined(chunks: dict[int, bytes]) -> bytes:
    """The ICC profile from its APP2 chunks, numbered from 1 (ICC.1 Annex B.4)."""
    return b"".join(chunks[number] for number in sorted(chunks))


def _described(
    frame: tuple[int, bytes], jfif: bool, adobe_transform: int | None, icc_profile: bytes, colour_segments: tuple[int, ...]
) -> JpegHeader:
    process, segment = frame
    count = segment[5] if len(segment) > 5 else 0
    if not 1 <= count <= 4 or len(segment) < 6 + 3 * count:
        raise UnsupportedPixels("The JPEG frame header is damaged.")
    precision, rows, columns = struct.unpack_from(">BHH", segment)
    components = [segment[6 + 3 * number : 9 + 3 * number] for number in range(count)]
    return JpegHeader(
        process=process,
        precision=precision,
        rows=rows,
        columns=columns,
        component_ids=tuple(component[0] for component in components),
        sampling=tuple((component[1] >> 4, component[1] & 15) for component in components),
        jfif=jfif,
        adobe_transform=adobe_transform,
        icc_profile=icc_profile,
        colour_segments=colour_segments,
    )


def with_colour_transform(stream: bytes, header: JpegHeader, *, ybr: bool) -> bytes:
    """Let a stream of three components say what they are in the one way that every decoder understands: a single APP14 segment."""
    unmarked = bytearray(stream)
    for position in header.colour_segments:
        unmarked[position + 1] = 0xEF  # APP15 means nothing to anybody
    return bytes(unmarked[:2]) + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([ybr]) + bytes(unmarked[2:])


def jpeg_2000_header(stream: bytes) -> Jpeg2000Header:
    """Read SIZ and COD and follow the tile-parts to the end of the codestream.

    Raises
    ------
    UnsupportedPixels
        No such stream, cut short, or of more tiles than it has bytes for.
    """
    offset = 0 if stream[:4] == b"\xff\x4f\xff\x51" else stream.find(b"\xff\x4f\xff\x51")
    if offset < 0 or (offset > 0 and stream[4:8] != b"jP  "):
        raise UnsupportedPixels("The frame is no JPEG 2000 codestream: it does not begin with SOC and SIZ.")
    try:
        return _jpeg_2000_header(stream, offset)
    except (struct.error, IndexError):
        raise UnsupportedPixels("The JPEG 2000 codestream is cut short.") from None


def _jpeg_2000_header(stream: bytes, offset: int) -> Jpeg2000Header:
    x_size, y_size, x_offset, y_offset, x_tile, y_tile, x_tile_offset, y_tile_offset, components = struct.unpack_from(
        ">8IH", stream, offset + 8
    )
    depths = {struct.unpack_from(">B", stream, offset + 42 + 3 * number)[0] for number in range(min(components, 4))}
    if not 1 <= components <= 4 or len(depths) != 1:
        raise UnsupportedPixels(f"The JPEG 2000 codestream has {components} components or components of different depth.")
    if not (x_tile and y_tile and x_size > x_offset and y_size > y_offset):
        raise UnsupportedPixels("The JPEG 2000 codestream has tiles or a picture of no size.")
    tiles = -(-(x_size - x_tile_offset) // x_tile) * -(-(y_size - y_tile_offset) // y_tile)
    if tiles * 14 > len(stream):  # a tile-part has at least SOT (12 bytes) and SOD (2)
        raise UnsupportedPixels(f"The JPEG 2000 codestream claims {tiles} tiles and has no bytes for them.")
    depth = depths.pop()
    position, colour_transform = offset + 4 + struct.unpack_from(">H", stream, offset + 4)[0], False
    while (marker := struct.unpack_from(">H", stream, position)[0]) != 0xFF90:  # SOT ends the main header
        if marker < 0xFF30 or marker == 0xFFD9:
            raise UnsupportedPixels("The main header of the JPEG 2000 codestream is damaged.")
        if marker == 0xFF52:
            colour_transform = stream[position + 8] == 1
        position += 2 + max(struct.unpack_from(">H", stream, position + 2)[0], 2)
    while (marker := struct.unpack_from(">H", stream, position)[0]) == 0xFF90:
        length = struct.unpack_from(">I", stream, position + 6)[0]
        if length == 0:  # the last tile-part reaches to the end of the codestream
            position = stream.rfind(b"\xff\xd9")
            marker = 0xFFD9 if position >= 0 else 0
            break
        position += max(length, 14)
    if marker != 0xFFD9:
        raise UnsupportedPixels("The JPEG 2000 codestream is cut short: it ends before EOC.")
    return Jpeg2000Header(
        rows=y_size - y_offset,
        columns=x_size - x_offset,
        components=components,
        precision=(depth & 0x7F) + 1,
        signed=depth >> 7 == 1,
        colour_transform=colour_transform and components >= 3,
        offset=offset,
    )


def decode_rle(stream: memoryview, *, rows: int, columns: int, samples_per_pixel: int, bytes_per_sample: int) -> NDArray[np.uint8]:
    """Expand one RLE frame.

    Returns
    -------
    numpy.ndarray
        uint8, shape (samples_per_pixel, rows, columns, bytes_per_sample), bytes of a sample little-endian.

    Raises
    ------
    UnsupportedPixels
        Wrong number of segments, offsets outside the frame, or a segment that is not exactly a plane.

    References
    ----------
    DICOM PS3.5 Annex G
    """
    if len(stream) < 64:
        raise UnsupportedPixels("The RLE frame is cut short: its header has 64 bytes.")
    count, *offsets = struct.unpack_from("<16I", stream)
    if count != samples_per_pixel * bytes_per_sample:
        raise UnsupportedPixels(f"The RLE frame has {count} segments instead of {samples_per_pixel * bytes_per_sample}.")
    bounds = [*offsets[:count], len(stream)]
    if bounds[0] != 64 or any(later <= earlier for earlier, later in itertools.pairwise(bounds)):
        raise UnsupportedPixels("The segment offsets of the RLE frame are not ascending inside the frame.")
    planes = np.empty((samples_per_pixel, rows, columns, bytes_per_sample), np.uint8)
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        sample, byte = divmod(number, bytes_per_sample)
        plane = np.frombuffer(_unpacked(bytes(stream[begin:end]), rows * columns), np.uint8)
        planes[sample, :, :, bytes_per_sample - 1 - byte] = plane.reshape(rows, columns)  # most significant byte first
    return planes


def _unpacked(segment: bytes, size: int) -> bytes:
    """PackBits (PS3.5 G.3.2): exactly `size` bytes; what follows them is padding."""
    parts: list[bytes] = []
    position, produced, end = 0, 0, len(segment)
    while produced < size:
        if position + 1 >= end:
            raise UnsupportedPixels("An RLE segment is shorter than a plane of the picture.")
        control = segment[position]
        if control < 128:
            part = segment[position + 1 : position + 2 + control]
            position += 2 + control
            if position > end:
                raise UnsupportedPixels("An RLE segment ends inside a literal run.")
        elif control > 128:
            part = segment[position + 1 : position + 2] * (257 - control)
            position += 2
        else:
            position += 1
            continue
        parts.append(part)
        produced += len(part)
    if produced != size:
        raise UnsupportedPixels("An RLE segment is longer than a plane of the picture.")
    return b"".join(parts)
