"""Pictures drawn by the tests, wrapped as DICOM in every transfer syntax for which an encoder is at hand."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import gdcm
import jpeg_ls
import numpy as np
import openjpeg
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels import convert_color_space, get_encoder
from pydicom.uid import RLELossless

Picture = NDArray[np.uint8]

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.57"
JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.70"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_LS_NEAR = "1.2.840.10008.1.2.4.81"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"
JPEG_2000 = "1.2.840.10008.1.2.4.91"
RLE = "1.2.840.10008.1.2.5"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
NATIVE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN)

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (255, 255, 255), (0, 0, 0), (200, 150, 120))


def patches(rows: int = 48, columns: int = 72) -> Picture:
    """Nine flat patches: red first, skin last; the sides are multiples of 16 so that no lossy block mixes two."""
    picture = np.zeros((rows, columns, 3), np.uint8)
    for number, colour in enumerate(COLOURS):
        row, column = divmod(number, 3)
        picture[row * rows // 3 : (row + 1) * rows // 3, column * columns // 3 : (column + 1) * columns // 3] = colour
    return picture


def gradient(rows: int = 40, columns: int = 52) -> Picture:
    """Smooth colours and a little texture."""
    y, x = np.mgrid[0:rows, 0:columns]
    planes = (x * 255 // columns, y * 255 // rows, (x * 7 + y * 13) % 256)
    return np.stack(planes, axis=2).astype(np.uint8)


def ybr(picture: Picture) -> Picture:
    """Full-range YBR of an RGB picture, by pydicom."""
    return np.asarray(convert_color_space(picture, "RGB", "YBR_FULL"), np.uint8)


def image(frames: NDArray[Any], photometric_interpretation: str = "RGB", **attributes: Any) -> Dataset:
    """Make the header of an image; `frames` of shape (frames, rows, columns) or (frames, rows, columns, 3)."""
    data_set = Dataset()
    data_set.SOPClassUID = SECONDARY_CAPTURE
    data_set.SOPInstanceUID = "2.25.1"
    data_set.StudyInstanceUID = "2.25.2"
    data_set.SeriesInstanceUID = "2.25.3"
    data_set.PatientName = "Canary^Test"
    data_set.Modality = "OT"
    data_set.Rows, data_set.Columns = frames.shape[1:3]
    data_set.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    data_set.PhotometricInterpretation = photometric_interpretation
    if frames.ndim == 4:
        data_set.PlanarConfiguration = 0
    data_set.BitsAllocated = frames.dtype.itemsize * 8
    data_set.BitsStored = data_set.BitsAllocated
    data_set.HighBit = data_set.BitsStored - 1
    data_set.PixelRepresentation = 0
    if len(frames) > 1:
        data_set.NumberOfFrames = len(frames)
    for keyword, value in attributes.items():
        setattr(data_set, keyword, value)
    return data_set


def part10(data_set: Dataset, transfer_syntax_uid: str, pixel_data: bytes) -> bytes:
    """Write a DICOM file; `pixel_data` is the value as it stands in the file."""
    data_set = Dataset(data_set)
    data_set.file_meta = FileMetaDataset()
    # pydicom does not write syntaxes that are newer than itself; this one has the length of another that is written alike
    data_set.file_meta.TransferSyntaxUID = JPEG_BASELINE if transfer_syntax_uid == DEFLATED_FRAMES else transfer_syntax_uid
    data_set.PixelData = pixel_data + b"\0" * (len(pixel_data) % 2)
    encapsulated = transfer_syntax_uid not in NATIVE
    data_set["PixelData"].VR = "OB" if encapsulated or (data_set.BitsAllocated <= 8 and transfer_syntax_uid != BIG_ENDIAN) else "OW"
    data_set["PixelData"].is_undefined_length = encapsulated
    buffer = io.BytesIO()
    data_set.save_as(
        buffer,
        enforce_file_format=True,
        implicit_vr=transfer_syntax_uid == IMPLICIT,
        little_endian=transfer_syntax_uid != BIG_ENDIAN,
    )
    written = buffer.getvalue()
    return (
        written.replace(JPEG_BASELINE.encode(), DEFLATED_FRAMES.encode() + b"\0", 1) if transfer_syntax_uid == DEFLATED_FRAMES else written
    )


def native(frames: NDArray[Any], transfer_syntax_uid: str = EXPLICIT, photometric_interpretation: str = "RGB", **attributes: Any) -> bytes:
    """Wrap stored values without compression."""
    data_set = image(frames, photometric_interpretation, **attributes)
    values = frames.transpose(0, 3, 1, 2) if data_set.get("PlanarConfiguration") == 1 else frames
    if transfer_syntax_uid != BIG_ENDIAN:
        pixel_data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    else:
        pixel_data = values.astype(values.dtype.newbyteorder(">")).tobytes()
        if values.dtype.itemsize == 1:  # OW: the bytes of each word change places
            pixel_data += b"\0" * (len(pixel_data) % 2)
            pixel_data = np.frombuffer(pixel_data, np.uint16).byteswap().tobytes()
    return part10(data_set, transfer_syntax_uid, pixel_data)


def encapsulated(
    streams: Sequence[bytes], frames: NDArray[Any], transfer_syntax_uid: str, photometric_interpretation: str, **attributes: Any
) -> bytes:
    """Wrap one compressed stream a frame, with a Basic Offset Table."""
    data_set = image(frames, photometric_interpretation, **attributes)
    return part10(data_set, transfer_syntax_uid, encapsulate(list(streams)))


def extended(streams: Sequence[bytes], frames: NDArray[Any], transfer_syntax_uid: str, photometric_interpretation: str) -> bytes:
    """Wrap one compressed stream a frame, with an Extended Offset Table."""
    data_set = image(frames, photometric_interpretation)
    pixel_data, data_set.ExtendedOffsetTable, data_set.ExtendedOffsetTableLengths = encapsulate_extended(list(streams))
    return part10(data_set, transfer_syntax_uid, pixel_data)


# --- encoders: one frame to one stream -------------------------------------------------------------------------------


def jpeg(picture: Picture, *, quality: int = 95, subsampling: int = 0, **options: Any) -> bytes:
    """JPEG with a JFIF segment, YCbCr inside (or grey)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=subsampling, **options)
    return buffer.getvalue()


def jpeg_rgb(picture: Picture, *, quality: int = 95) -> bytes:
    """JPEG whose components are red, green and blue, and say so: APP14 without a transform, component ids R, G and B."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, keep_rgb=True)
    return buffer.getvalue()


def without_markers(stream: bytes) -> bytes:
    """Take every APPn segment out of a JPEG stream and number its components 1, 2, 3: nothing tells its colours any more."""
    kept, position = [stream[:2]], 2
    while stream[position + 1] != 0xDA:
        length = struct.unpack_from(">H", stream, position + 2)[0]
        segment = bytearray(stream[position : position + 2 + length])
        position += 2 + length
        if segment[1] in {0xC0, 0xC1, 0xC2, 0xC3}:
            for number in range(segment[9]):
                segment[10 + 3 * number] = number + 1
        if not 0xE0 <= segment[1] <= 0xEF:
            kept.append(bytes(segment))
    scan = bytearray(stream[position:])
    for number in range(scan[4]):
        scan[5 + 2 * number] = number + 1
    return b"".join([*kept, bytes(scan)])


def with_app14(stream: bytes, *, transform: int) -> bytes:
    """Put Adobe's segment behind SOI: 0 says RGB, 1 says YCbCr."""
    return stream[:2] + struct.pack(">HH5sHHHB", 0xFFEE, 14, b"Adobe", 100, 0, 0, transform) + stream[2:]


def jpeg_lossless(values: NDArray[Any], *, selection_value_1: bool, folder: Path) -> bytes:
    """JPEG lossless, by GDCM; whatever the samples mean."""
    (folder / "in.dcm").write_bytes(native(values[None], photometric_interpretation="RGB" if values.ndim == 3 else "MONOCHROME2"))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(folder / "in.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    syntax = gdcm.TransferSyntax.JPEGLosslessProcess14_1 if selection_value_1 else gdcm.TransferSyntax.JPEGLosslessProcess14
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(folder / "out.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return next(generate_frames(dcmread(folder / "out.dcm").PixelData, number_of_frames=1))


def charls(values: NDArray[Any], *, lossy_error: int = 0, interleave_mode: int = 2) -> bytes:
    """JPEG-LS, by CharLS."""
    if values.ndim == 2:
        interleave_mode = 0
    ordered = np.ascontiguousarray(values.transpose(2, 0, 1)) if values.ndim == 3 and interleave_mode == 0 else values
    return bytes(jpeg_ls.encode_array(ordered, lossy_error=lossy_error, interleave_mode=interleave_mode))


def jpeg_2000(values: NDArray[Any], *, transform: bool, ratio: float | None = None, codec_format: int = 0) -> bytes:
    """JPEG 2000, by OpenJPEG; with `transform` the components are decorrelated as YBR_RCT or YBR_ICT."""
    return openjpeg.utils.encode_array(
        values,
        photometric_interpretation=1 if values.ndim == 3 else 2,
        use_mct=transform,
        compression_ratios=[ratio] if ratio else None,
        codec_format=codec_format,
    )


def rle(values: NDArray[Any]) -> bytes:
    """RLE, by pydicom."""
    encode: Callable[..., bytes] = get_encoder(RLELossless).encode
    return encode(
        values,
        rows=values.shape[0],
        columns=values.shape[1],
        number_of_frames=1,
        samples_per_pixel=3 if values.ndim == 3 else 1,
        bits_allocated=values.dtype.itemsize * 8,
        bits_stored=values.dtype.itemsize * 8,
        pixel_representation=0,
        photometric_interpretation="RGB" if values.ndim == 3 else "MONOCHROME2",
        planar_configuration=0,
        encoding_plugin="pydicom",
    )


def jpeg_of_opencv(picture: Picture) -> bytes:
    """JPEG by another encoder, chroma at half the resolution."""
    return cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


# --- colour profiles -------------------------------------------------------------------------------------------------

SRGB_PRIMARIES = ((0.4360747, 0.2225045, 0.0139322), (0.3850649, 0.7168786, 0.0971045), (0.1430804, 0.0606169, 0.7141733))
"""XYZ (D50) of red, green and blue of sRGB, Bradford-adapted."""


def icc_profile(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    """Make an ICC v2 display profile of three primaries and one gamma (ICC.1:2001-04)."""

    def xyz(values: Sequence[float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    described += b"\0" * (-len(described) % 4)
    tags = [
        (b"desc", described),
        (b"cprt", b"text\0\0\0\0none\0\0\0\0"),
        (b"wtpt", xyz((0.9642, 1.0, 0.8249))),
        *((name, xyz(values)) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)),
        *((name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")),
    ]
    table, body, begin = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += name + struct.pack(">II", begin + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", begin + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += b"".join(struct.pack(">i", round(value * 65536)) for value in (0.9642, 1.0, 0.8249)) + b"\0" * 48
    return head + table + body


def through_profile(picture: Picture, primaries: Sequence[Sequence[float]], gamma: float) -> Picture:
    """Convert to sRGB what was made for such a profile: the textbook formula, without a library."""
    to_xyz = np.array(primaries).T
    linear = np.clip((picture / 255.0) ** gamma @ to_xyz.T @ np.linalg.inv(np.array(SRGB_PRIMARIES).T).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(encoded * 255), np.uint8)
