"""Decode the Pixel Data of an instance to sRGB.

Everything that a hostile header can claim is compared with the bytes that are there before anything is allocated.

References
----------
DICOM PS3.3 C.7.6.3 Image Pixel Module; PS3.5 Section 8.2 and Annex A
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset

from inference import codecs, codestream, colour
from inference.codecs import Buffer, Decoded, ImagePixel
from inference.errors import UnsupportedPixels
from inference.records import Frames

_PIXEL_DATA: Final = 0x7FE00010
_FLOAT_PIXEL_DATA: Final = (0x7FE00008, 0x7FE00009)

_SAMPLES: Final = {
    "MONOCHROME1": 1,
    "MONOCHROME2": 1,
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}

_MAXIMUM_INFLATED: Final = 2 * 1024**3

_PARSE_ERRORS: Final = (
    # What pydicom was seen to raise on damaged headers; most are no DICOM error of its own.
    BytesLengthException,
    InvalidDicomError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class _Source(NamedTuple):
    """An image instance: its header, what that says of the pixels, and the value of its Pixel Data."""

    header: Dataset
    image: ImagePixel
    pixel_data: memoryview


def decode_frames(part10: Buffer, *, max_pixels: int, max_frames: int = 2**31) -> Frames:
    """Decode the frames of an image instance to sRGB.

    Parameters
    ----------
    part10
        A whole DICOM file: preamble, file meta information, data set.
    max_pixels
        Budget: rows * columns * (frames to decode); compared before anything is decoded.
    max_frames
        Frames behind this many are left out; the header's Number of Frames tells how many there are.

    Returns
    -------
    Frames
        ``pixels``: uint8, shape (frames, rows, columns, 3), sRGB, in the orientation of the stored image;
        ``spacing_mm``: (between rows, between columns), None when not stated.

    Raises
    ------
    UnsupportedPixels
        No Pixel Data, no decoder for its form, damaged, contradicting its header, or beyond the budget.

    References
    ----------
    DICOM PS3.3 C.7.6.3 Image Pixel Module, C.11.15 ICC Profile Module; PS3.5 Section 8.2
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom and the codecs put values of the header into their warnings
        source = _read(part10)
        header, image = source.header, source.image
        count = min(image.frame_count, max_frames)
        if image.rows * image.columns * count > max_pixels:
            raise UnsupportedPixels(
                f"The picture has {image.columns} x {image.rows} pixels in {count} frames, more than the {max_pixels} pixels allowed."
            )
        profile, notes = _icc_profile(header), set[str]()
        pixels = np.empty((0, 0, 0, 3), np.uint8)
        for number, decoded in enumerate(_decoded(source, count)):
            frame = _rendered(header, image, decoded)
            if image.samples_per_pixel == 3 or decoded.photometric_interpretation == "PALETTE COLOR":
                frame, note = colour.to_srgb(frame, profile or decoded.icc_profile)
                notes |= {note} - {""}
            if number == 0:
                pixels = np.empty((count, *frame.shape), np.uint8) if count > 1 else frame[None]
            if count > 1:
                pixels[number] = frame
        return Frames(np.require(pixels, requirements=["C", "W"]), _spacing(header), tuple(sorted(notes)))


def source_header(part10: Buffer) -> Dataset:
    """Everything in front of the Pixel Data (and of the offset tables), as a pydicom data set.

    Raises
    ------
    UnsupportedPixels
        The bytes are no DICOM file that pydicom can read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _parsed(part10)[0]


def pixels_equal(a: bytes, b: bytes, *, max_pixels: int = 2**28) -> bool:
    """Tell whether two DICOM files hold the same stored values, written in two lossless transfer syntaxes.

    When in doubt, False. The headers are not compared: whoever asks has done so (`storage.comparison.same_picture`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            first, second = _read(a), _read(b)
            if not {first.image.transfer_syntax_uid, second.image.transfer_syntax_uid} <= codecs.LOSSLESS:
                return False
            count = first.image.frame_count
            if count != second.image.frame_count or first.image.rows * first.image.columns * count > max_pixels:
                return False
            return all(
                one.photometric_interpretation == other.photometric_interpretation and np.array_equal(one.stored, other.stored)
                for one, other in zip(_decoded(first, count), _decoded(second, count), strict=True)
            )
        except UnsupportedPixels:
            return False


def _parsed(part10: Buffer) -> tuple[Dataset, str, memoryview, int]:
    """Header, transfer syntax, the data set's bytes (inflated), and where the Pixel Data begins in them."""
    if bytes(part10[128:132]) != b"DICM":
        raise UnsupportedPixels("The bytes are no DICOM file: the preamble with DICM is missing.")
    view = memoryview(part10)
    try:
        stream = io.BytesIO(view)
        stream.seek(132)
        meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
        transfer_syntax_uid = str(meta.get("TransferSyntaxUID", ""))
        data_set = view[stream.tell() :]
        if transfer_syntax_uid == codecs.DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data_set = memoryview(inflate.decompress(data_set, _MAXIMUM_INFLATED))
            if not inflate.eof:
                raise UnsupportedPixels("The deflated data set is cut short, or inflates beyond 2 GiB.")
            stream = io.BytesIO(data_set)
        begin = stream.tell()
        header = read_dataset(
            stream,
            is_implicit_VR=transfer_syntax_uid == codecs.IMPLICIT_LITTLE,
            is_little_endian=transfer_syntax_uid != codecs.EXPLICIT_BIG,
            stop_when=lambda tag, _vr, _length: tag >> 16 == 0x7FE0 and tag >= _FLOAT_PIXEL_DATA[0],
        )
    except _PARSE_ERRORS as error:
        raise UnsupportedPixels(f"The header cannot be read ({type(error).__name__}).") from error
    return header, transfer_syntax_uid, data_set, stream.tell() - begin


def _read(part10: Buffer) -> _Source:
    """Read the Image Pixel module and refuse what no picture can be."""
    header, transfer_syntax_uid, data_set, position = _parsed(part10)
    pixel_data, vr = _pixel_element(data_set, position, transfer_syntax_uid)
    try:
        photometric_interpretation = str(header.get("PhotometricInterpretation", "") or "").strip()
        frame_count = int(header.get("NumberOfFrames", 1) or 1)
        integers = {keyword: _integer(header, keyword) for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")}
        high_bit = _integer(header, "HighBit", integers["BitsStored"] - 1)
        signed, planar = _integer(header, "PixelRepresentation", 0), _integer(header, "PlanarConfiguration", 0)
    except _PARSE_ERRORS as error:
        raise UnsupportedPixels(f"The Image Pixel module cannot be read ({type(error).__name__}).") from error
    samples, allocated, stored = integers["SamplesPerPixel"], integers["BitsAllocated"], integers["BitsStored"]
    if photometric_interpretation not in _SAMPLES or samples != _SAMPLES[photometric_interpretation]:
        raise UnsupportedPixels(f"{samples} samples per pixel of this Photometric Interpretation cannot be shown.")
    if not (0 < integers["Rows"] < 2**16 and 0 < integers["Columns"] < 2**16 and frame_count > 0):
        raise UnsupportedPixels("Rows, Columns or Number of Frames is not possible.")
    if allocated not in {1, 8, 16} or not 1 <= stored <= allocated or not stored - 1 <= high_bit < allocated:
        raise UnsupportedPixels(f"{stored} bits stored in {allocated} with high bit {high_bit} cannot be read; only 1, 8 and 16 are.")
    if signed not in {0, 1} or planar not in {0, 1} or (signed and photometric_interpretation not in {"MONOCHROME1", "MONOCHROME2"}):
        raise UnsupportedPixels("Pixel Representation or Planar Configuration is not possible for this picture.")
    image = ImagePixel(
        transfer_syntax_uid=transfer_syntax_uid,
        rows=integers["Rows"],
        columns=integers["Columns"],
        frame_count=frame_count,
        samples_per_pixel=samples,
        photometric_interpretation=photometric_interpretation,
        planar=planar == 1,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit,
        signed=signed == 1,
        vr=vr,
    )
    return _Source(header, image, pixel_data)


def _integer(header: Dataset, keyword: str, otherwise: int | None = None) -> int:
    value = header.get(keyword)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, int):
        raise UnsupportedPixels(f"{keyword} is missing or is no number.")
    return value


def _pixel_element(data_set: memoryview, position: int, transfer_syntax_uid: str) -> tuple[memoryview, str]:
    """Give value and VR of the Pixel Data; the value of encapsulated Pixel Data reaches to the end of the data set."""
    order = ">" if transfer_syntax_uid == codecs.EXPLICIT_BIG else "<"
    try:
        group, element = struct.unpack_from(f"{order}HH", data_set, position)
        if group << 16 | element in _FLOAT_PIXEL_DATA:
            raise UnsupportedPixels("Floating point Pixel Data are stored, not decoded.")
        if group << 16 | element != _PIXEL_DATA:
            raise UnsupportedPixels("The instance has no Pixel Data.")
        if transfer_syntax_uid == codecs.IMPLICIT_LITTLE:
            vr, header_length = "OW", 8
        else:
            vr = bytes(data_set[position + 4 : position + 6]).decode("latin-1")
            header_length = 12
        (length,) = struct.unpack_from(f"{order}I", data_set, position + header_length - 4)
    except struct.error:
        raise UnsupportedPixels("The instance has no Pixel Data.") from None
    if vr not in {"OB", "OW", "UN"}:
        raise UnsupportedPixels("Pixel Data has a VR that it cannot have.")
    value = data_set[position + header_length :]
    if (length == 0xFFFFFFFF) != (transfer_syntax_uid not in codecs.NATIVE):
        raise UnsupportedPixels("Pixel Data is encapsulated in an uncompressed transfer syntax, or the other way round.")
    if transfer_syntax_uid in codecs.NATIVE:
        if length > len(value):
            raise UnsupportedPixels("Pixel Data is cut short.")
        value = value[:length]
    return value, vr


def _spacing(header: Dataset) -> tuple[float, float] | None:
    """Pixel Spacing in millimetres, when it is two positive finite numbers."""
    try:
        row_spacing, column_spacing = (float(value) for value in header.get("PixelSpacing") or ())
    except _PARSE_ERRORS:
        return None
    return (row_spacing, column_spacing) if 0 < row_spacing < 1e6 and 0 < column_spacing < 1e6 else None


def _icc_profile(header: Dataset) -> bytes:
    """ICC Profile (0028,2000) of the instance, or of its first optical path."""
    try:
        profile = header.get("ICCProfile") or next((path.get("ICCProfile") for path in header.get("OpticalPathSequence") or ()), None)
    except _PARSE_ERRORS:
        return b""
    return profile if isinstance(profile, bytes) else b""


def _decoded(source: _Source, count: int) -> Iterator[Decoded]:
    """Decode the first `count` frames to stored values."""
    header, image, pixel_data = source
    if image.transfer_syntax_uid in codecs.NATIVE:
        yield from codecs.native_frames(image, pixel_data, count)
        return
    table = header.get("ExtendedOffsetTable")
    offsets = struct.unpack(f"<{len(table) // 8}Q", table[: len(table) // 8 * 8]) if isinstance(table, bytes) else ()
    for fragments in codestream.split_frames(pixel_data, image.frame_count, offsets)[:count]:
        yield codecs.decode_stream(image, bytes(fragments[0]) if len(fragments) == 1 else b"".join(fragments))


def _rendered(header: Dataset, image: ImagePixel, decoded: Decoded) -> NDArray[np.uint8]:
    """Turn stored values into RGB, uint8, shape (rows, columns, 3)."""
    stored, interpretation = decoded.stored, decoded.photometric_interpretation
    try:
        if interpretation in {"MONOCHROME1", "MONOCHROME2"}:
            inverted = interpretation == "MONOCHROME1"
            table = colour.grey_table(header, stored, bits_stored=image.bits_stored, inverted=inverted, big_endian=image.big_endian)
            return np.repeat(table[stored.astype(np.int32) - int(stored.min())][:, :, None], 3, axis=2)
        if interpretation == "PALETTE COLOR":
            entries = 2 ** (8 * stored.dtype.itemsize)
            rgb: NDArray[np.uint8] = colour.palette_table(header, entries=entries, big_endian=image.big_endian)[stored]
            return rgb
    except _PARSE_ERRORS as error:
        raise UnsupportedPixels(f"The picture's lookup tables or windows cannot be read ({type(error).__name__}).") from error
    if stored.dtype == np.uint8 and image.bits_stored == 8:
        rgb = stored.view(np.uint8)
    else:
        rgb = colour.scaled_to_8_bits(stored.astype(np.uint16), image.bits_stored)
    return colour.ybr_to_rgb(rgb) if interpretation == "YBR_FULL" else rgb
