"""From bytes of Pixel Data to stored values. The only importer of cv2 and of the codecs.

Which decoder runs is decided by what the stream is, not by what the file meta says of it::

    uncompressed, deflated, big endian, encapsulated      numpy
    RLE                                                   inference.codestream
    JPEG, 8 bit, DCT (.50, .51, .53, .55)                 OpenCV (libjpeg-turbo 3)
    JPEG, 8 bit, lossless (.57, .70)                      the same
    JPEG, 12 bit DCT (.51, .55), deeper lossless          GDCM, in a process of its own
    JPEG-LS (.80, .81)                                    CharLS
    JPEG 2000 (.90, .91), HTJ2K (.201, .202, .203)        OpenJPEG

A stream that announces another picture than the header never reaches a decoder. Codecs are native code all the same: in the
worker's process a crash costs one attempt of one job.

References
----------
DICOM PS3.3 C.7.6.3 Image Pixel Module; PS3.5 Section 8 and Annex A
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import cv2
import jpeg_ls
import numpy as np
import openjpeg
from numpy.typing import NDArray

from inference import codestream, colour, gdcm_process
from inference.errors import UnsupportedPixels

Buffer: TypeAlias = bytes | bytearray | memoryview
Stored: TypeAlias = NDArray[np.integer[Any]]

IMPLICIT_LITTLE: Final = "1.2.840.10008.1.2"
EXPLICIT_BIG: Final = "1.2.840.10008.1.2.2"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
NATIVE: Final = frozenset({IMPLICIT_LITTLE, "1.2.840.10008.1.2.1", EXPLICIT_BIG, DEFLATED})
_ENCAPSULATED_UNCOMPRESSED: Final = "1.2.840.10008.1.2.1.98"
_DEFLATED_FRAMES: Final = "1.2.840.10008.1.2.8.1"
_RLE: Final = "1.2.840.10008.1.2.5"
_JPEG: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 57, 70))
_JPEG_LS: Final = frozenset({"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"})
_JPEG_2000: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))

LOSSLESS: Final = frozenset(
    {
        *NATIVE,
        _ENCAPSULATED_UNCOMPRESSED,
        _DEFLATED_FRAMES,
        _RLE,
        *(f"1.2.840.10008.1.2.4.{number}" for number in (57, 70, 80, 90, 201, 202)),
    }
)
"""Transfer syntaxes that cannot change a stored value."""

_CODEC_ERRORS: Final = (cv2.error, gdcm_process.DecoderDied, RuntimeError, SystemError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class ImagePixel:
    """The Image Pixel module of one instance, checked: what one frame looks like, and how it is written (PS3.3 C.7.6.3)."""

    transfer_syntax_uid: str
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
    vr: str
    """Of the Pixel Data element: OB, OW or UN."""

    @property
    def big_endian(self) -> bool:
        """Whether words are big-endian."""
        return self.transfer_syntax_uid == EXPLICIT_BIG


class Decoded(NamedTuple):
    """One frame out of its transfer syntax."""

    stored: Stored
    """Shape (rows, columns), or (rows, columns, 3)."""
    photometric_interpretation: str
    """Of the array: a decoder may have made RGB of what was YBR in the stream."""
    icc_profile: bytes = b""
    """Found inside the stream; counts only where the header has none."""


def native_frames(image: ImagePixel, pixel_data: memoryview, count: int) -> Iterator[Decoded]:
    """Cut uncompressed Pixel Data into frames (PS3.5 Section 8.1).

    Raises
    ------
    UnsupportedPixels
        The length is not that of the frames, or one padding byte more.
    """
    frame_bits = image.rows * image.columns * image.samples_per_pixel * image.bits_allocated
    subsampled = image.photometric_interpretation == "YBR_FULL_422" and image.bits_allocated == 8 and image.columns % 2 == 0
    if subsampled and len(pixel_data) not in _lengths(frame_bits * image.frame_count):  # not every sender means what it writes
        frame_bits = image.rows * image.columns * 16
    else:
        subsampled = False
    if len(pixel_data) not in _lengths(frame_bits * image.frame_count):
        needed = -(-frame_bits * image.frame_count // 8)
        raise UnsupportedPixels(f"Pixel Data has {len(pixel_data)} bytes; {image.frame_count} frames of this geometry need {needed}.")
    interpretation = _full(image.photometric_interpretation)
    for number in range(count):
        first, last = number * frame_bits, (number + 1) * frame_bits
        if image.bits_allocated == 1:  # frames follow each other without padding to a byte
            bits = np.unpackbits(np.frombuffer(pixel_data[first // 8 : -(-last // 8)], np.uint8), bitorder="little")
            yield Decoded(bits[first % 8 : first % 8 + frame_bits].reshape(image.rows, image.columns), interpretation)
            continue
        words = np.frombuffer(_in_order(image, pixel_data, first // 8, last // 8), _type_of(image))
        if subsampled:
            yield Decoded(colour.upsampled_422(words.view(np.uint8), rows=image.rows, columns=image.columns), interpretation)
        else:
            yield Decoded(_shaped(image, words), interpretation)


def decode_stream(image: ImagePixel, stream: bytes) -> Decoded:
    """Decode one encapsulated frame.

    Raises
    ------
    UnsupportedPixels
        No decoder, a damaged stream, or the stream of another picture than `image`.
    """
    syntax = image.transfer_syntax_uid
    try:
        if syntax in {_ENCAPSULATED_UNCOMPRESSED, _DEFLATED_FRAMES}:
            return _uncompressed(image, stream)
        if image.bits_allocated == 1:
            raise UnsupportedPixels("Compressed pictures of one bit cannot be decoded.")
        if syntax == _RLE:
            return _rle(image, stream)
        if syntax in _JPEG:
            return _jpeg(image, stream)
        if syntax in _JPEG_LS:
            return _jpeg_ls(image, stream)
        if syntax in _JPEG_2000:
            return _jpeg_2000(image, stream)
    except _CODEC_ERRORS as error:
        raise UnsupportedPixels(f"The decoder refused the frame ({type(error).__name__}).") from error
    raise UnsupportedPixels("No decoder for this transfer syntax; the instance is archived all the same.")


def _full(photometric_interpretation: str) -> str:
    return "YBR_FULL" if photometric_interpretation == "YBR_FULL_422" else photometric_interpretation


def _lengths(bits: int) -> tuple[int, int]:
    size = -(-bits // 8)
    return size, size + size % 2


def _in_order(image: ImagePixel, pixel_data: memoryview, begin: int, end: int) -> Buffer:
    """Bytes of one frame; 8-bit samples in big-endian words (OW) come back in the order of the pixels."""
    if not (image.big_endian and image.vr == "OW" and image.bits_allocated == 8):
        return pixel_data[begin:end]
    first, last = begin & ~1, end + end % 2
    return np.frombuffer(pixel_data[first:last], np.uint16).byteswap().tobytes()[begin - first : end - first]


def _little(buffer: Buffer, bits: int) -> Stored:
    """Samples as codecs give them: one byte up to 8 bits, else two, little-endian."""
    return np.frombuffer(buffer, np.uint8) if bits <= 8 else np.frombuffer(buffer, np.dtype("<u2")).astype(np.uint16, copy=False)


def _type_of(image: ImagePixel) -> np.dtype[np.integer[Any]]:
    if image.bits_allocated == 16:
        return np.dtype(">u2" if image.big_endian else "<u2")
    return np.dtype(np.uint8)


def _shaped(image: ImagePixel, words: Stored, *, planar: bool | None = None) -> Stored:
    """Give flat samples the shape of a frame, free of unused bits and with their sign."""
    values = words if words.dtype.isnative else words.astype(words.dtype.newbyteorder("="))
    shaped: Stored
    if image.samples_per_pixel == 1:
        shaped = values.reshape(image.rows, image.columns)
    elif image.planar if planar is None else planar:
        shaped = values.reshape(image.samples_per_pixel, image.rows, image.columns).transpose(1, 2, 0)
    else:
        shaped = values.reshape(image.rows, image.columns, image.samples_per_pixel)
    return _trimmed(shaped, bits=image.bits_stored, high_bit=image.high_bit, signed=image.signed)


def _trimmed(values: Stored, *, bits: int, high_bit: int, signed: bool) -> Stored:
    """Drop the bits outside the stored ones, which may hold anything (PS3.5 8.1.1), and extend the sign."""
    width = values.dtype.itemsize * 8
    if not signed:
        return values if bits == width else (values >> (high_bit + 1 - bits)) & (2**bits - 1)
    as_signed: Stored = values.view(np.int8 if width == 8 else np.int16)
    return as_signed if bits == width else (as_signed << (width - 1 - high_bit)) >> (width - bits)


def _signed(image: ImagePixel, values: Stored, precision: int) -> Stored:
    """Read the sign as the header says; most streams cannot say it, and those that can are often wrong."""
    return _trimmed(values, bits=precision, high_bit=precision - 1, signed=True) if image.signed else values


def _uncompressed(image: ImagePixel, stream: bytes) -> Decoded:
    """Give a frame that is one deflated, or one plain, fragment (PS3.5 A.4.11, A.4.12)."""
    bits = image.rows * image.columns * image.samples_per_pixel * image.bits_allocated
    if image.transfer_syntax_uid == _DEFLATED_FRAMES:
        try:
            stream = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, -(-bits // 8) + 2)
        except zlib.error as error:
            raise UnsupportedPixels("A deflated frame is damaged.") from error
    if len(stream) not in _lengths(bits):
        raise UnsupportedPixels(f"A frame has {len(stream)} bytes; this geometry needs {-(-bits // 8)}.")
    interpretation = _full(image.photometric_interpretation)
    if image.bits_allocated == 1:
        unpacked = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:bits]
        return Decoded(unpacked.reshape(image.rows, image.columns), interpretation)
    return Decoded(_shaped(image, np.frombuffer(stream[: bits // 8], _type_of(image))), interpretation)


def _rle(image: ImagePixel, stream: bytes) -> Decoded:
    planes = codestream.decode_rle(
        memoryview(stream),
        rows=image.rows,
        columns=image.columns,
        samples_per_pixel=image.samples_per_pixel,
        bytes_per_sample=image.bits_allocated // 8,
    )
    return Decoded(_shaped(image, _little(planes.data, image.bits_allocated), planar=True), _full(image.photometric_interpretation))


def _agree(image: ImagePixel, *, rows: int, columns: int, components: int, precision: int) -> None:
    """Refuse a stream that is another picture than the header announces, before a decoder allocates for it."""
    if (rows, columns, components) != (image.rows, image.columns, image.samples_per_pixel):
        raise UnsupportedPixels(
            f"The compressed frame is {columns} x {rows} x {components}, the header says "
            f"{image.columns} x {image.rows} x {image.samples_per_pixel}."
        )
    if not 1 <= precision <= image.bits_allocated:
        raise UnsupportedPixels(f"The compressed frame has samples of {precision} bits, the header allocates {image.bits_allocated}.")


def _jpeg(image: ImagePixel, stream: bytes) -> Decoded:
    header = codestream.jpeg_header(stream)
    components = len(header.component_ids)
    _agree(image, rows=header.rows, columns=header.columns, components=components, precision=header.precision)
    lossless = header.process == codestream.JPEG_LOSSLESS
    ybr = header.holds_ybr if header.holds_ybr is not None else image.photometric_interpretation.startswith("YBR_FULL")
    interpretation = image.photometric_interpretation if components == 1 else "RGB"
    values: Stored
    if header.precision == 8 and (lossless or header.process in {0xC0, 0xC1, 0xC2}):
        if components == 3:  # libjpeg converts what it takes for YBR, except in lossless streams
            stream = codestream.with_colour_transform(stream, header, ybr=ybr and not lossless)
        mode = (cv2.IMREAD_GRAYSCALE if components == 1 else cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
        picture = cv2.imdecode(np.frombuffer(stream, np.uint8), mode)
        if picture is None or picture.shape[:2] != (image.rows, image.columns):
            raise UnsupportedPixels("The decoder could make no picture of the JPEG stream.")
        values = np.asarray(picture, np.uint8)
    elif lossless or (header.process in {0xC1, 0xC2} and header.precision == 12):
        values = _gdcm(image, stream, header)
    else:
        raise UnsupportedPixels(f"No decoder for this kind of JPEG stream (SOF 0x{header.process:02X}, {header.precision} bits).")
    if components == 3 and ybr and (lossless or header.precision > 8):
        interpretation = "YBR_FULL"
    return Decoded(_signed(image, values, header.precision), interpretation, header.icc_profile)


def _gdcm(image: ImagePixel, stream: bytes, header: codestream.JpegHeader) -> Stored:
    """Decode in a process of its own; the samples come as they are, without a change of colour."""
    syntaxes = {codestream.JPEG_LOSSLESS: "JPEGLosslessProcess14", codestream.JPEG_LS: "JPEGLSLossless"}
    samples = gdcm_process.decode(
        stream,
        syntax=syntaxes.get(header.process, "JPEGExtendedProcess2_4"),
        rows=image.rows,
        columns=image.columns,
        samples=image.samples_per_pixel,
        precision=header.precision,
    )
    return _little(samples, header.precision).reshape(
        (image.rows, image.columns, 3) if image.samples_per_pixel == 3 else (image.rows, image.columns)
    )


def _jpeg_ls(image: ImagePixel, stream: bytes) -> Decoded:
    header = codestream.jpeg_header(stream)
    if header.process != codestream.JPEG_LS:
        raise UnsupportedPixels("The frame is no JPEG-LS stream.")
    components = len(header.component_ids)
    _agree(image, rows=header.rows, columns=header.columns, components=components, precision=header.precision)
    values: Stored
    try:
        buffer, info = jpeg_ls.decode_pixel_data(stream)
    except RuntimeError:  # CharLS 2 refuses how some old encoders end a scan; the version inside GDCM does not
        values = _gdcm(image, stream, header)
    else:
        words = _little(buffer, header.precision)
        if components == 1:
            values = words.reshape(image.rows, image.columns)
        elif info["interleave_mode"] == 0:
            values = words.reshape(components, image.rows, image.columns).transpose(1, 2, 0)
        else:
            values = words.reshape(image.rows, image.columns, components)
    return Decoded(_signed(image, values, header.precision), _full(image.photometric_interpretation))


def _jpeg_2000(image: ImagePixel, stream: bytes) -> Decoded:
    header = codestream.jpeg_2000_header(stream)
    _agree(image, rows=header.rows, columns=header.columns, components=header.components, precision=header.precision)
    picture = openjpeg.utils.decode(stream[header.offset :], j2k_format=0)
    if picture.shape[:2] != (image.rows, image.columns):
        raise UnsupportedPixels("The decoder gave a picture of another size than its stream announces.")
    # YBR_ICT and YBR_RCT describe the stream; the decoder gives the RGB that they were made from.
    interpretation = image.photometric_interpretation
    if image.samples_per_pixel == 3:
        interpretation = "YBR_FULL" if interpretation.startswith("YBR_FULL") and not header.colour_transform else "RGB"
    unsigned: Stored = picture.view(np.uint8 if picture.dtype.itemsize == 1 else np.uint16)
    return Decoded(_signed(image, unsigned, header.precision), interpretation)
