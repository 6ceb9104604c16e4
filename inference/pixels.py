"""Decode the Pixel Data of an instance to sRGB. The only importer of cv2 and of the codecs.

Which decoder runs is decided by what the stream is, not by what the file meta says of it::

    uncompressed, deflated, big endian, encapsulated      numpy
    RLE                                                   inference.codestream
    JPEG, 8 bit, DCT (.50, .51, .53, .55)                 OpenCV (libjpeg-turbo)
    JPEG, 12 bit DCT (.51, .55) and lossless (.57, .70)   GDCM
    JPEG-LS (.80, .81)                                    CharLS
    JPEG 2000 (.90, .91), HTJ2K (.201, .202, .203)        OpenJPEG

Everything that a hostile header can claim is compared with the bytes that are there before anything is allocated. Codecs
are native code all the same: they run in the worker's process, where a crash costs one attempt of one job.

References
----------
DICOM PS3.3 C.7.6.3 Image Pixel Module; PS3.5 Section 8.2 and Annex A
"""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import cv2
import gdcm
import jpeg_ls
import numpy as np
import openjpeg
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset

from inference import codestream, colour
from inference.errors import UnsupportedPixels
from inference.records import Frames

Buffer: TypeAlias = bytes | bytearray | memoryview
Stored: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int8] | NDArray[np.int16]

_PIXEL_DATA: Final = 0x7FE00010
_FLOAT_PIXEL_DATA: Final = (0x7FE00008, 0x7FE00009)

_IMPLICIT_LITTLE: Final = "1.2.840.10008.1.2"
_EXPLICIT_BIG: Final = "1.2.840.10008.1.2.2"
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_NATIVE: Final = frozenset({_IMPLICIT_LITTLE, "1.2.840.10008.1.2.1", _EXPLICIT_BIG, _DEFLATED})
_ENCAPSULATED_UNCOMPRESSED: Final = "1.2.840.10008.1.2.1.98"
_DEFLATED_FRAMES: Final = "1.2.840.10008.1.2.8.1"
_RLE: Final = "1.2.840.10008.1.2.5"
_JPEG: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 57, 70))
_JPEG_LS: Final = frozenset({"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"})
_JPEG_2000: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))

_LOSSLESS: Final = _NATIVE | {_ENCAPSULATED_UNCOMPRESSED, _DEFLATED_FRAMES, _RLE} | {
    f"1.2.840.10008.1.2.4.{number}" for number in (57, 70, 80, 90, 201, 202)
}

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

_CODEC_ERRORS: Final = (cv2.error, AttributeError, RuntimeError, SystemError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """An image instance in words: what its header says of the pixels, and where they are."""

    header: Dataset
    transfer_syntax_uid: str
    pixel_data: memoryview
    pixel_data_vr: str
    rows: int
    columns: int
    frame_count: int
    samples_per_pixel: int
    photometric_interpretation: str
    planar: bool
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def big_endian(self) -> bool:
        return self.transfer_syntax_uid == _EXPLICIT_BIG


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
        count = min(source.frame_count, max_frames)
        if source.rows * source.columns * count > max_pixels:
            raise UnsupportedPixels(
                f"The picture has {source.columns} x {source.rows} pixels in {count} frames, more than the {max_pixels} pixels allowed."
            )
        notes: set[str] = set()
        pixels = np.empty((0, 0, 0, 3), np.uint8)
        for number, (stored, photometric_interpretation, embedded_profile) in enumerate(_stored_frames(source, count)):
            frame = _rendered(source, stored, photometric_interpretation)
            if source.samples_per_pixel == 3 or photometric_interpretation == "PALETTE COLOR":
                frame, note = colour.to_srgb(frame, _icc_profile(source.header) or embedded_profile)
                notes |= {note} - {""}
            if number == 0:
                pixels = np.empty((count, *frame.shape), np.uint8) if count > 1 else frame[None]
            if count > 1:
                pixels[number] = frame
        return Frames(np.require(pixels, requirements=["C", "W"]), _spacing(source.header), tuple(sorted(notes)))


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
    """Tell whether two DICOM files are the same instance, written in two transfer syntaxes.

    True only when both transfer syntaxes are lossless, every attribute that does not depend on the transfer syntax is
    equal, and every stored value of every frame is equal. When in doubt, False.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            first, second = _read(a), _read(b)
            if not {first.transfer_syntax_uid, second.transfer_syntax_uid} <= _LOSSLESS or not _headers_agree(first.header, second.header):
                return False
            if first.frame_count != second.frame_count or first.rows * first.columns * first.frame_count > max_pixels:
                return False
            pairs = zip(_stored_frames(first, first.frame_count), _stored_frames(second, second.frame_count), strict=True)
            return all(one[1] == other[1] and np.array_equal(one[0], other[0]) for one, other in pairs)
        except (UnsupportedPixels, *_PARSE_ERRORS):
            return False


# ---------------------------------------------------------------------------------------------------------------- header


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
        if transfer_syntax_uid == _DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data_set = memoryview(inflate.decompress(data_set, _MAXIMUM_INFLATED))
            if not inflate.eof:
                raise UnsupportedPixels("The deflated data set is cut short, or inflates beyond 2 GiB.")
            stream = io.BytesIO(data_set)
        begin = stream.tell()
        header = read_dataset(
            stream,
            is_implicit_VR=transfer_syntax_uid == _IMPLICIT_LITTLE,
            is_little_endian=transfer_syntax_uid != _EXPLICIT_BIG,
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
        integers = {
            keyword: _integer(header, keyword) for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")
        }
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
    return _Source(
        header=header,
        transfer_syntax_uid=transfer_syntax_uid,
        pixel_data=pixel_data,
        pixel_data_vr=vr,
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
    )


def _integer(header: Dataset, keyword: str, otherwise: int | None = None) -> int:
    value = header.get(keyword)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, int):
        raise UnsupportedPixels(f"{keyword} is missing or is no number.")
    return value


def _pixel_element(data_set: memoryview, position: int, transfer_syntax_uid: str) -> tuple[memoryview, str]:
    """Give value and VR of the Pixel Data; the value of encapsulated Pixel Data reaches to the end of the data set."""
    order = ">" if transfer_syntax_uid == _EXPLICIT_BIG else "<"
    try:
        group, element = struct.unpack_from(f"{order}HH", data_set, position)
        if group << 16 | element in _FLOAT_PIXEL_DATA:
            raise UnsupportedPixels("Floating point Pixel Data are stored, not decoded.")
        if group << 16 | element != _PIXEL_DATA:
            raise UnsupportedPixels("The instance has no Pixel Data.")
        if transfer_syntax_uid == _IMPLICIT_LITTLE:
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
    if (length == 0xFFFFFFFF) != (transfer_syntax_uid not in _NATIVE):
        raise UnsupportedPixels("Pixel Data is encapsulated in an uncompressed transfer syntax, or the other way round.")
    if transfer_syntax_uid in _NATIVE:
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


_SYNTAX_DEPENDENT: Final = frozenset({0x00280004, 0x00280006, 0x7FE00001, 0x7FE00002, 0x7FE00003})
"""Photometric Interpretation (compared after decoding), Planar Configuration, offset tables."""


def _headers_agree(first: Dataset, second: Dataset) -> bool:
    """Compare two data sets, whatever transfer syntaxes they were read from."""
    tags = [
        {tag for tag in header.keys() if tag not in _SYNTAX_DEPENDENT and tag & 0xFFFF != 0} for header in (first, second)  # noqa: SIM118
    ]
    return tags[0] == tags[1] and all(_elements_agree(first, second, tag) for tag in tags[0])


def _elements_agree(first: Dataset, second: Dataset, tag: int) -> bool:
    raw = first.get_item(tag), second.get_item(tag)
    if (
        isinstance(raw[0], RawDataElement)
        and isinstance(raw[1], RawDataElement)
        and raw[0].is_little_endian == raw[1].is_little_endian
        and raw[0].value == raw[1].value
    ):
        return True  # also where one reader knows the VR and the other, implicit one does not
    one, other = first[tag], second[tag]
    if one.VR == "SQ" and other.VR == "SQ":
        return len(one.value) == len(other.value) and all(itertools.starmap(_headers_agree, zip(one.value, other.value, strict=True)))
    return bool(one.VR == other.VR and one.VR != "UN" and one.value == other.value)


# ---------------------------------------------------------------------------------------------------------------- frames


def _stored_frames(source: _Source, count: int) -> Iterator[tuple[Stored, str, bytes]]:
    """Decode the first `count` frames: stored values, their Photometric Interpretation now, and an ICC profile inside the stream.

    The array has shape (rows, columns), or (rows, columns, 3).
    """
    if source.transfer_syntax_uid in _NATIVE:
        yield from ((frame, _full(source.photometric_interpretation), b"") for frame in _native_frames(source, count))
        return
    offsets = _extended_offsets(source.header)
    for fragments in codestream.split_frames(source.pixel_data, source.frame_count, offsets)[:count]:
        stream = bytes(fragments[0]) if len(fragments) == 1 else b"".join(fragments)
        yield _decoded(source, stream)


def _full(photometric_interpretation: str) -> str:
    return "YBR_FULL" if photometric_interpretation == "YBR_FULL_422" else photometric_interpretation


def _extended_offsets(header: Dataset) -> tuple[int, ...]:
    table = header.get("ExtendedOffsetTable")
    return struct.unpack(f"<{len(table) // 8}Q", table[: len(table) // 8 * 8]) if isinstance(table, bytes) else ()


def _native_frames(source: _Source, count: int) -> Iterator[Stored]:
    """Cut uncompressed Pixel Data into frames (PS3.5 Section 8.1); its length has to be that of the frames, and a padding byte."""
    pixels_per_frame = source.rows * source.columns
    bits = pixels_per_frame * source.samples_per_pixel * source.bits_allocated
    subsampled = source.photometric_interpretation == "YBR_FULL_422" and source.bits_allocated == 8 and source.columns % 2 == 0
    length = len(source.pixel_data)
    if subsampled and length not in _lengths(bits * source.frame_count):  # not every sender means what it writes
        bits = pixels_per_frame * 16
    else:
        subsampled = False
    if length not in _lengths(bits * source.frame_count):
        raise UnsupportedPixels(f"Pixel Data has {length} bytes; {source.frame_count} frames of this geometry need {-(-bits * source.frame_count // 8)}.")
    if source.bits_allocated == 1:
        for number in range(count):  # frames follow each other without padding to a byte
            first, last = number * bits, (number + 1) * bits
            unpacked = np.unpackbits(np.frombuffer(source.pixel_data[first // 8 : -(-last // 8)], np.uint8), bitorder="little")
            yield unpacked[first % 8 : first % 8 + bits].reshape(source.rows, source.columns)
        return
    size = bits // 8
    for number in range(count):
        words = np.frombuffer(_in_order(source, number * size, size), _type_of(source))
        if subsampled:
            yield colour.upsampled_422(words, rows=source.rows, columns=source.columns)
        else:
            yield _shaped(source, words)


def _lengths(bits: int) -> tuple[int, int]:
    size = -(-bits // 8)
    return size, size + size % 2


def _in_order(source: _Source, begin: int, size: int) -> Buffer:
    """Bytes of one frame; 8-bit samples in big-endian words (OW) come back in the order of the pixels."""
    if not (source.big_endian and source.pixel_data_vr == "OW" and source.bits_allocated == 8):
        return source.pixel_data[begin : begin + size]
    first, last = begin & ~1, begin + size + (begin + size) % 2
    return np.frombuffer(source.pixel_data[first:last], np.uint16).byteswap().tobytes()[begin - first : begin - first + size]


def _type_of(source: _Source) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    if source.bits_allocated == 16:
        return np.dtype(">u2" if source.big_endian else "<u2")
    return np.dtype(np.uint8)


def _shaped(source: _Source, words: NDArray[np.uint8] | NDArray[np.uint16], *, planar: bool | None = None) -> Stored:
    """Give flat samples the shape of a frame, free of unused bits and with their sign."""
    values = words if words.dtype.isnative else words.astype(words.dtype.newbyteorder("="))
    if source.samples_per_pixel == 1:
        shaped = values.reshape(source.rows, source.columns)
    elif source.planar if planar is None else planar:
        shaped = values.reshape(source.samples_per_pixel, source.rows, source.columns).transpose(1, 2, 0)
    else:
        shaped = values.reshape(source.rows, source.columns, source.samples_per_pixel)
    return _trimmed(shaped, bits=source.bits_stored, high_bit=source.high_bit, signed=source.signed)


def _trimmed(values: NDArray[np.uint8] | NDArray[np.uint16], *, bits: int, high_bit: int, signed: bool) -> Stored:
    """Drop the bits outside the stored ones, which may hold anything (PS3.5 8.1.1), and extend the sign."""
    width = values.dtype.itemsize * 8
    if not signed:
        return values if bits == width else (values >> (high_bit + 1 - bits)) & (2**bits - 1)
    as_signed = values.view(np.int8 if width == 8 else np.int16)
    return as_signed if bits == width else (as_signed << (width - 1 - high_bit)) >> (width - bits)


# ---------------------------------------------------------------------------------------------------------------- codecs


def _decoded(source: _Source, stream: bytes) -> tuple[Stored, str, bytes]:
    """Decode one compressed frame; see `_stored_frames` for what comes back."""
    syntax, bits = source.transfer_syntax_uid, source.bits_allocated
    photometric_interpretation = _full(source.photometric_interpretation)
    if bits == 1 and syntax not in {_ENCAPSULATED_UNCOMPRESSED, _DEFLATED_FRAMES}:
        raise UnsupportedPixels("Compressed pictures of one bit cannot be decoded.")
    try:
        if syntax in {_ENCAPSULATED_UNCOMPRESSED, _DEFLATED_FRAMES}:
            return _uncompressed(source, stream), photometric_interpretation, b""
        if syntax == _RLE:
            planes = codestream.decode_rle(
                memoryview(stream),
                rows=source.rows,
                columns=source.columns,
                samples_per_pixel=source.samples_per_pixel,
                bytes_per_sample=bits // 8,
            )
            words = planes.reshape(-1).view(np.uint8 if bits == 8 else np.dtype("<u2"))
            return _shaped(source, words, planar=True), photometric_interpretation, b""
        if syntax in _JPEG:
            return _jpeg(source, stream)
        if syntax in _JPEG_LS:
            return _jpeg_ls(source, stream), photometric_interpretation, b""
        if syntax in _JPEG_2000:
            return _jpeg_2000(source, stream)
    except _CODEC_ERRORS as error:
        raise UnsupportedPixels(f"The decoder refused the frame ({type(error).__name__}).") from error
    raise UnsupportedPixels("No decoder for this transfer syntax; the instance is archived all the same.")


def _uncompressed(source: _Source, stream: bytes) -> Stored:
    """Give a frame that is one deflated, or one plain, fragment (PS3.5 A.4.11, A.4.12)."""
    bits = source.rows * source.columns * source.samples_per_pixel * source.bits_allocated
    if source.transfer_syntax_uid == _DEFLATED_FRAMES:
        try:
            stream = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, -(-bits // 8) + 2)
        except zlib.error as error:
            raise UnsupportedPixels("A deflated frame is damaged.") from error
    if len(stream) not in _lengths(bits):
        raise UnsupportedPixels(f"A frame has {len(stream)} bytes; this geometry needs {-(-bits // 8)}.")
    if source.bits_allocated == 1:
        return np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:bits].reshape(source.rows, source.columns)
    return _shaped(source, np.frombuffer(stream[: bits // 8], _type_of(source)))


def _agree(source: _Source, *, rows: int, columns: int, components: int, precision: int) -> None:
    """Refuse a stream that is another picture than the header announces, before a decoder allocates for it."""
    if (rows, columns, components) != (source.rows, source.columns, source.samples_per_pixel):
        raise UnsupportedPixels(
            f"The compressed frame is {columns} x {rows} x {components}, the header says "
            f"{source.columns} x {source.rows} x {source.samples_per_pixel}."
        )
    if not 1 <= precision <= source.bits_allocated:
        raise UnsupportedPixels(f"The compressed frame has samples of {precision} bits, the header allocates {source.bits_allocated}.")


def _jpeg(source: _Source, stream: bytes) -> tuple[Stored, str, bytes]:
    header = codestream.jpeg_header(stream)
    components = len(header.component_ids)
    _agree(source, rows=header.rows, columns=header.columns, components=components, precision=header.precision)
    ybr = header.holds_ybr if header.holds_ybr is not None else source.photometric_interpretation.startswith("YBR_FULL")
    if header.precision == 8 and header.process in {0xC0, 0xC1, 0xC2}:
        if header.adobe_transform is None and not header.jfif and components == 3:
            stream = codestream.with_colour_transform(stream, ybr=ybr)
        mode = (cv2.IMREAD_GRAYSCALE if components == 1 else cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
        picture = cv2.imdecode(np.frombuffer(stream, np.uint8), mode)
        if picture is None or picture.shape[:2] != (source.rows, source.columns):
            raise UnsupportedPixels("The decoder could make no picture of the JPEG stream.")
        interpretation = "RGB" if components == 3 else source.photometric_interpretation
        return _signed(source, picture, header.precision), interpretation, header.icc_profile
    if header.process not in {0xC1, 0xC2, codestream.JPEG_LOSSLESS}:
        raise UnsupportedPixels(f"No decoder for this kind of JPEG stream (SOF 0x{header.process:02X}).")
    picture = _gdcm(source, stream, header)
    interpretation = source.photometric_interpretation if components == 1 else "YBR_FULL" if ybr else "RGB"
    return _signed(source, picture, header.precision), interpretation, header.icc_profile


def _gdcm(source: _Source, stream: bytes, header: codestream.JpegHeader) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode with GDCM, which gives the samples as they are, without a change of colour.

    RGB and the precision of the stream are told to it whatever the header says, because GDCM 3 converts, or loses
    bits, where they differ.
    """
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((source.columns, source.rows, 1))
    image.SetDataElement(element)
    components = len(header.component_ids)
    kind = gdcm.PhotometricInterpretation.RGB if components == 3 else gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    syntax = gdcm.TransferSyntax.JPEGLosslessProcess14 if header.process == codestream.JPEG_LOSSLESS else gdcm.TransferSyntax.JPEGExtendedProcess2_4
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    allocated = 8 if header.precision <= 8 else 16
    image.SetPixelFormat(gdcm.PixelFormat(components, allocated, header.precision, header.precision - 1, 0))
    # The wrapper hands bytes over as text with surrogates; pydicom's plug-in undoes it in the same way.
    words = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), np.uint8 if allocated == 8 else np.dtype("<u2"))
    shape = (source.rows, source.columns, 3) if components == 3 else (source.rows, source.columns)
    return words.reshape(shape)


def _jpeg_ls(source: _Source, stream: bytes) -> Stored:
    header = codestream.jpeg_header(stream)
    if header.process != codestream.JPEG_LS:
        raise UnsupportedPixels("The frame is no JPEG-LS stream.")
    components = len(header.component_ids)
    _agree(source, rows=header.rows, columns=header.columns, components=components, precision=header.precision)
    buffer, info = jpeg_ls.decode_pixel_data(stream)
    words = np.frombuffer(buffer, np.uint8 if header.precision <= 8 else np.dtype("<u2"))
    if components > 1 and info["interleave_mode"] == 0:
        picture = words.reshape(components, source.rows, source.columns).transpose(1, 2, 0)
    else:
        picture = words.reshape((source.rows, source.columns, components) if components > 1 else (source.rows, source.columns))
    return _signed(source, picture, header.precision)


def _jpeg_2000(source: _Source, stream: bytes) -> tuple[Stored, str, bytes]:
    header = codestream.jpeg_2000_header(stream)
    _agree(source, rows=header.rows, columns=header.columns, components=header.components, precision=header.precision)
    picture = openjpeg.decode(stream[header.offset :], j2k_format=0)
    if picture.shape[:2] != (source.rows, source.columns):
        raise UnsupportedPixels("The decoder gave a picture of another size than its stream announces.")
    # YBR_ICT and YBR_RCT describe the stream; the decoder gives the RGB that they were made from.
    interpretation = source.photometric_interpretation
    if source.samples_per_pixel == 3:
        interpretation = "YBR_FULL" if interpretation.startswith("YBR_FULL") and not header.colour_transform else "RGB"
    unsigned = picture.view(np.uint8 if picture.dtype.itemsize == 1 else np.uint16)
    return _signed(source, unsigned, header.precision), interpretation, b""


def _signed(source: _Source, picture: NDArray[np.uint8] | NDArray[np.uint16], precision: int) -> Stored:
    """Read the sign as the header says; most streams cannot say it, and those that can are often wrong."""
    if not source.signed:
        return picture
    return _trimmed(picture, bits=precision, high_bit=precision - 1, signed=True)


# ------------------------------------------------------------------------------------------------------------- rendering


def _rendered(source: _Source, stored: Stored, photometric_interpretation: str) -> NDArray[np.uint8]:
    """Turn stored values into RGB, uint8, shape (rows, columns, 3)."""
    try:
        if photometric_interpretation in {"MONOCHROME1", "MONOCHROME2"}:
            table = colour.grey_table(
                source.header,
                stored,
                bits_stored=source.bits_stored,
                inverted=photometric_interpretation == "MONOCHROME1",
                big_endian=source.big_endian,
            )
            grey = table[stored.astype(np.int32) - int(stored.min())]
            return np.repeat(grey[:, :, None], 3, axis=2)
        if photometric_interpretation == "PALETTE COLOR":
            entries = 2 ** (8 * stored.dtype.itemsize)
            palette: NDArray[np.uint8] = colour.palette_table(source.header, entries=entries, big_endian=source.big_endian)[stored]
            return palette
        rgb = stored if stored.dtype == np.uint8 and source.bits_stored == 8 else colour.scaled_to_8_bits(stored.astype(np.uint16), source.bits_stored)
        eight_bits = rgb.astype(np.uint8, copy=False)
    except _PARSE_ERRORS as error:
        raise UnsupportedPixels(f"The picture's lookup tables or windows cannot be read ({type(error).__name__}).") from error
    return colour.ybr_to_rgb(eight_bits) if photometric_interpretation == "YBR_FULL" else eight_bits
