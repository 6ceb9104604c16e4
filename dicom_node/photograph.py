"""A JPEG or PNG becomes a DICOM photograph (VL Photographic or Dermoscopic Photography), for `dicom-node send`.

A baseline JPEG keeps its compressed stream as it is, less its application segments (they may name places and people); everything
else is stored as native RGB. Orientation of the camera is applied to the pixels, since DICOM knows no such tag.

References
----------
DICOM PS3.3 A.32.4 VL Photographic Image IOD, A.32.11 Dermoscopic Photography Image IOD, C.8.12.1 VL Image Module
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DermoscopicPhotographyImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    VLPhotographicImageStorage,
)

from inference.report.identity import derived_uid
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

BODY_SITES: Mapping[str, tuple[str, str]] = {
    # Anatomic Region Sequence, SNOMED CT; items.md section 2, CID 4029 and CID 4031.
    "head": ("69536005", "Head"),
    "neck": ("45048000", "Neck"),
    "face": ("89545001", "Face"),
    "scalp": ("41695006", "Scalp"),
    "upper-limb": ("53120007", "Upper limb"),
    "forearm": ("14975008", "Forearm"),
    "hand": ("85562004", "Hand"),
    "trunk": ("22943007", "Trunk"),
    "chest": ("816094009", "Chest"),
    "abdomen": ("818981001", "Abdomen"),
    "back": ("77568009", "Back"),
    "lower-limb": ("61685007", "Lower limb"),
    "thigh": ("68367000", "Thigh"),
    "foot": ("56459004", "Foot"),
    "buttock": ("46862004", "Buttock"),
}
LATERALITIES: Mapping[str, tuple[str, str, str]] = {
    # option: (Image Laterality, code, meaning), CID 244
    "left": ("L", "7771000", "Left"),
    "right": ("R", "24028007", "Right"),
    "both": ("B", "51440002", "Right and left"),
    "none": ("U", "", ""),
}
MAXIMUM_FILE_BYTES = 512 * 1024**2


class UnreadablePicture(Exception):
    """The file is no picture we can wrap; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PhotographOptions:
    """What the header says; empty means unknown."""

    dermoscopic: bool = False
    patient_id: str = ""
    patient_name: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    accession_number: str = ""
    study_description: str = ""
    study_instance_uid: str = ""
    body_site: str = ""
    laterality: str = ""


def wrap_picture(path: Path, options: PhotographOptions, *, now: datetime) -> bytes:
    """Make a Part 10 file of a JPEG or PNG.

    Raises
    ------
    UnreadablePicture
        No such file, not a JPEG or PNG, damaged, or larger than 512 MiB.
    """
    try:
        if path.stat().st_size > MAXIMUM_FILE_BYTES:
            raise UnreadablePicture(f"{path}: larger than {MAXIMUM_FILE_BYTES // 1024**2} MiB; send a smaller picture")
        raw = path.read_bytes()
    except OSError as error:
        raise UnreadablePicture(f"{path}: cannot be read ({error.strerror}); check the name and its permissions") from error
    if not raw.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        raise UnreadablePicture(f"{path}: neither DICOM, JPEG nor PNG; convert the picture first")
    content = _jpeg_as_it_is(raw) or _native(raw)
    if content is None:
        raise UnreadablePicture(f"{path}: the picture is damaged; take it from its source again")
    return _part10(content, options, now=now, seed=hashlib.sha256(raw).hexdigest())


def wrap_pixels(pixels: NDArray[np.uint8], options: PhotographOptions, *, now: datetime) -> bytes:
    """Make a Part 10 file of ``pixels``: uint8, shape (rows, columns, 3), sRGB."""
    rows, columns, _ = pixels.shape
    content = _Content(rows, columns, pixels.tobytes(), ExplicitVRLittleEndian, "RGB", b"", 0.0)
    return _part10(content, options, now=now, seed=hashlib.sha256(content.data).hexdigest())


@dataclass(frozen=True, slots=True)
class _Content:
    rows: int
    columns: int
    data: bytes
    transfer_syntax_uid: UID
    photometric_interpretation: str
    icc_profile: bytes
    compression_ratio: float
    """0: never lossily compressed, as far as the file tells."""


def _jpeg_as_it_is(raw: bytes) -> _Content | None:
    """A baseline 8-bit colour JPEG in upright orientation, its application segments dropped; None for everything else."""
    kept = [b"\xff\xd8"]
    profile: dict[int, bytes] = {}
    geometry: tuple[int, int, int] | None = None
    adobe_transform = None
    position = 2
    while position + 4 <= len(raw):
        if raw[position] != 0xFF:
            return None
        marker = raw[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        (length,) = struct.unpack_from(">H", raw, position + 2)
        body = raw[position + 4 : position + 2 + length]
        if length < 2 or position + 2 + length > len(raw):
            return None
        if marker == 0xC0:
            precision, rows, columns, components = struct.unpack_from(">BHHB", body)
            if precision != 8 or components != 3 or not rows or not columns:
                return None
            chroma = body[7]  # sampling factors of the first component: horizontal * 16 + vertical
            geometry = (rows, columns, chroma)
        elif marker in {0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}:
            return None  # extended, progressive, lossless, arithmetic: not Process 1
        if marker == 0xE1 and body.startswith(b"Exif\0\0") and _exif_orientation(body[6:]) not in {0, 1}:
            return None
        if marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            profile[body[12]] = body[14:]
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe_transform = body[11]
        if marker == 0xDA:
            break
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(raw[position : position + 2 + length])
        position += 2 + length
    else:
        return None
    end = raw.rfind(b"\xff\xd9")
    if geometry is None or end < position or adobe_transform == 0:  # transform 0: components are RGB, which needs its Adobe segment
        return None
    if cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_REDUCED_COLOR_8) is None:
        return None
    rows, columns, chroma = geometry
    stream = b"".join(kept) + raw[position : end + 2]
    ratio = rows * columns * 3 / len(stream)
    interpretation = "YBR_FULL_422" if chroma >> 4 == 2 else "YBR_FULL"
    return _Content(rows, columns, stream, JPEGBaseline8Bit, interpretation, b"".join(profile[part] for part in sorted(profile)), ratio)


def _exif_orientation(tiff: bytes) -> int:
    """Orientation (1 to 8), or 0 when the block does not say."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 0
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    if offset + 2 > len(tiff):
        return 0
    (count,) = struct.unpack_from(order + "H", tiff, offset)
    for entry in range(offset + 2, min(offset + 2 + 12 * count, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == 0x0112:
            return int(value)
    return 0


def _native(raw: bytes) -> _Content | None:
    decoded = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)  # applies the camera's orientation
    if decoded is None:
        return None
    pixels = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    ratio = pixels.size / len(raw) if raw.startswith(b"\xff\xd8") else 0.0
    return _Content(pixels.shape[0], pixels.shape[1], pixels.tobytes(), ExplicitVRLittleEndian, "RGB", b"", ratio)


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item


def _part10(content: _Content, options: PhotographOptions, *, now: datetime, seed: str) -> bytes:
    """Write the object; UIDs follow from picture, options and time, so that one command sent twice is one instance."""
    now = now.astimezone(UTC)
    entropy = [seed, repr(options), now.isoformat()]
    data_set = Dataset()
    data_set.SpecificCharacterSet = "ISO_IR 192"
    data_set.ImageType = ["ORIGINAL", "PRIMARY"]
    sop_class_uid = DermoscopicPhotographyImageStorage if options.dermoscopic else VLPhotographicImageStorage
    data_set.SOPClassUID = sop_class_uid
    data_set.SOPInstanceUID = derived_uid(*entropy, "instance")
    data_set.StudyDate = data_set.SeriesDate = data_set.ContentDate = now.strftime("%Y%m%d")
    data_set.StudyTime = data_set.SeriesTime = data_set.ContentTime = now.strftime("%H%M%S")
    data_set.AcquisitionDateTime = now.strftime("%Y%m%d%H%M%S+0000")
    data_set.TimezoneOffsetFromUTC = "+0000"
    data_set.AccessionNumber = options.accession_number
    data_set.Modality = "DMS" if options.dermoscopic else "XC"
    data_set.Manufacturer = "dicom-node"
    data_set.ManufacturerModelName = "dicom-node send"
    data_set.DeviceSerialNumber = "none"
    data_set.SoftwareVersions = IMPLEMENTATION_VERSION_NAME
    data_set.ReferringPhysicianName = ""
    if options.study_description:
        data_set.StudyDescription = options.study_description
    data_set.PatientName = options.patient_name
    data_set.PatientID = options.patient_id
    data_set.PatientBirthDate = options.patient_birth_date
    data_set.PatientSex = options.patient_sex
    data_set.StudyInstanceUID = options.study_instance_uid or derived_uid(*entropy, "study")
    data_set.SeriesInstanceUID = derived_uid(*entropy, "series")
    data_set.StudyID = ""
    data_set.SeriesNumber = 1
    data_set.InstanceNumber = 1
    data_set.PatientOrientation = ""
    data_set.BurnedInAnnotation = "NO"
    data_set.AcquisitionContextSequence = Sequence()
    _site(data_set, options)
    if options.dermoscopic:
        _dermoscopy(data_set, derived_uid(*entropy, "frame of reference"))
    data_set.SamplesPerPixel = 3
    data_set.PhotometricInterpretation = content.photometric_interpretation
    data_set.PlanarConfiguration = 0
    data_set.Rows, data_set.Columns = content.rows, content.columns
    data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit, data_set.PixelRepresentation = 8, 8, 7, 0
    data_set.LossyImageCompression = "01" if content.compression_ratio else "00"
    if content.compression_ratio:
        data_set.LossyImageCompressionRatio = f"{content.compression_ratio:.4g}"
        data_set.LossyImageCompressionMethod = "ISO_10918_1"
    if content.icc_profile:
        data_set.ICCProfile = content.icc_profile
    if content.transfer_syntax_uid.is_compressed:
        data_set.PixelData = encapsulate([content.data])
        data_set["PixelData"].VR = "OB"
    else:
        data_set.PixelData = content.data + b"\0" * (len(content.data) % 2)
        data_set["PixelData"].VR = "OB"
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.MediaStorageSOPClassUID = sop_class_uid
    data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
    data_set.file_meta.TransferSyntaxUID = content.transfer_syntax_uid
    data_set.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    data_set.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    buffer = BytesIO()
    data_set.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _site(data_set: Dataset, options: PhotographOptions) -> None:
    letter, code, meaning = LATERALITIES[options.laterality or "none"]
    if options.body_site:
        site = _code(*BODY_SITES[options.body_site])
        if code:
            site.AnatomicRegionModifierSequence = Sequence([_code(code, meaning)])
        data_set.AnatomicRegionSequence = Sequence([site])
    if options.laterality or options.dermoscopic:
        data_set.ImageLaterality = letter
    else:
        data_set.Laterality = ""


def _dermoscopy(data_set: Dataset, frame_of_reference_uid: str) -> None:
    """Attributes that only Dermoscopic Photography has (PS3.3 C.8.12.15 and following); a picture file tells none of them."""
    data_set.FrameOfReferenceUID = frame_of_reference_uid
    data_set.PositionReferenceIndicator = ""
    data_set.RecognizableVisualFeatures = "NO"
    data_set.LightSourcePolarization = None
    data_set.EmitterColorTemperature = None
    data_set.ContactMethod = None
    data_set.OpticalMagnificationFactor = None
