"""Pictures become DICOM photographs: pixels right, places and people of the camera left out, one command one instance."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from dicom_node.demo import draw_skin_picture
from dicom_node.photograph import PhotographOptions, UnreadablePicture, wrap_picture, wrap_pixels

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """A drawn picture, wider than high."""
    return draw_skin_picture(seed=1, rows=120, columns=200)


def jpeg(pixels: NDArray[np.uint8], *flags: int) -> bytes:
    """Encode sRGB pixels as JPEG."""
    done, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95, *flags])
    assert done
    return encoded.tobytes()


def with_exif(stream: bytes, orientation: int) -> bytes:
    """Put an Exif segment with ``orientation`` and a canary behind SOI."""
    body = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0) + b"GPS-CANARY"
    return stream[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + stream[2:]


def wrapped(tmp_path: Path, content: bytes, options: PhotographOptions | None = None) -> pydicom.Dataset:
    """Wrap ``content`` and read the result."""
    path = tmp_path / "picture"
    path.write_bytes(content)
    return pydicom.dcmread(BytesIO(wrap_picture(path, options or PhotographOptions(), now=NOW)))


def test_baseline_jpeg_keeps_its_stream_without_application_segments(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    """The compressed picture is not decoded and encoded again; what the camera wrote beside it is gone."""
    stream = jpeg(picture)
    data_set = wrapped(tmp_path, with_exif(stream, 1))
    assert data_set.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit
    assert b"CANARY" not in data_set.PixelData
    scan = stream[stream.index(b"\xff\xda") :]
    assert scan in data_set.PixelData
    decoded = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    again = next(pydicom.encaps.generate_frames(data_set.PixelData, number_of_frames=1))
    assert np.array_equal(cv2.imdecode(np.frombuffer(again, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], decoded)
    assert data_set.LossyImageCompression == "01"


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_camera_orientation_is_applied(tmp_path: Path, picture: NDArray[np.uint8], orientation: int) -> None:
    """DICOM has no orientation tag of the camera's kind: the pixels are turned."""
    data_set = wrapped(tmp_path, with_exif(jpeg(picture), orientation))
    turned = np.rot90(picture, {3: 2, 6: -1, 8: 1}[orientation])
    assert data_set.pixel_array.shape == turned.shape
    assert np.abs(data_set.pixel_array.astype(int) - turned).mean() < 3


def test_progressive_jpeg_and_png_become_native(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    """What Process 1 cannot hold is stored as native RGB."""
    progressive = wrapped(tmp_path, jpeg(picture, cv2.IMWRITE_JPEG_PROGRESSIVE, 1))
    assert progressive.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    png = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    assert np.array_equal(wrapped(tmp_path, png).pixel_array, picture)


def test_header_says_what_was_asked(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    """Site, side and patient are coded; the dermoscopic class has its own attributes."""
    options = PhotographOptions(dermoscopic=True, patient_id="P1", patient_name="山田^太郎", body_site="back", laterality="left")
    data_set = wrapped(tmp_path, jpeg(picture), options)
    assert data_set.SOPClassUID == pydicom.uid.DermoscopicPhotographyImageStorage
    assert (data_set.PatientID, str(data_set.PatientName), data_set.ImageLaterality) == ("P1", "山田^太郎", "L")
    assert data_set.AnatomicRegionSequence[0].CodeValue == "77568009"


def test_same_command_same_instance(picture: NDArray[np.uint8]) -> None:
    """Sending again after a lost answer is a duplicate, not a second picture; another patient is another instance."""
    options = PhotographOptions()
    assert wrap_pixels(picture, options, now=NOW) == wrap_pixels(picture, options, now=NOW)
    assert wrap_pixels(picture, options, now=NOW) != wrap_pixels(picture, PhotographOptions(patient_id="2"), now=NOW)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff\xe0\0", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    """Empty, foreign and cut files are refused with their name."""
    with pytest.raises(UnreadablePicture, match="picture"):
        wrapped(tmp_path, content)


def test_every_cut_of_a_jpeg_is_survived(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    """A cut picture is refused or read as far as it goes, never a traceback."""
    stream = with_exif(jpeg(picture), 6)
    for end in range(3, len(stream), 997):
        try:
            wrapped(tmp_path, stream[:end])
        except UnreadablePicture:
            continue
