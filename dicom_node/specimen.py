"""Small test instances of a patient who does not exist, in each transfer syntax that there is an encoder for; `doctor` sends them.

A picture and syntax have always the same bytes and UIDs: however often they are sent, they are stored once. They are grey, so that no
analysis is made of them and no report goes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    VLPhotographicImageStorage,
)

from inference.report.identity import derived_uid
from storage.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, Part10Parser
from storage.records import Limits, Summary
from storage.scan import DataSetScanner

PATIENT_ID: Final = "DICOM-NODE-DOCTOR"
PATIENT_NAME: Final = "Test^Doctor"
SOP_CLASS_UID: Final = str(VLPhotographicImageStorage)
STUDY_INSTANCE_UID: Final = derived_uid("doctor", "study")
SYNTAXES: Final = tuple(
    str(syntax)
    for syntax in (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        JPEGBaseline8Bit,
        JPEGLSLossless,
        JPEG2000Lossless,
        RLELossless,
    )
)
"""What `specimen` can write."""
_SIDE = 64
_EMPTY = ("PatientBirthDate", "PatientSex", "AccessionNumber", "ReferringPhysicianName", "StudyID", "PatientOrientation", "Laterality")


@dataclass(frozen=True, slots=True)
class Specimen:
    """A test instance, ready to be sent by any way."""

    content: bytes
    """A Part 10 file."""
    summary: Summary

    @property
    def sop_instance_uid(self) -> str:
        """SOP Instance UID (0008,0018)."""
        return self.summary.sop_instance_uid

    def part10(self) -> Iterator[bytes]:
        """The file."""
        yield self.content

    def chunks(self) -> Iterator[bytes]:
        """The data set, without preamble and file meta."""
        parser = Part10Parser()
        for piece in parser.feed(self.content):
            yield bytes(piece)
        parser.finish()


def specimen(transfer_syntax_uid: str) -> Specimen:
    """Draw a grey ramp in one of `SYNTAXES`."""
    syntax = UID(transfer_syntax_uid)
    pixels = np.add.outer(np.arange(_SIDE, dtype=np.uint8), np.arange(_SIDE, dtype=np.uint8))
    data_set = _header(syntax)
    if syntax == JPEGBaseline8Bit:
        stream = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        data_set.PixelData = encapsulate([stream])
        data_set.LossyImageCompression = "01"
        data_set.LossyImageCompressionRatio = f"{pixels.size / len(stream):.4g}"
        data_set.LossyImageCompressionMethod = "ISO_10918_1"
    elif syntax.is_encapsulated:
        data_set.PixelData = encapsulate([get_encoder(syntax).encode(pixels, encoding_plugin="", **_described(data_set))])
    else:
        data_set.PixelData = pixels.tobytes()
    data_set["PixelData"].VR = "OB"
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.MediaStorageSOPClassUID = data_set.SOPClassUID
    data_set.file_meta.MediaStorageSOPInstanceUID = data_set.SOPInstanceUID
    data_set.file_meta.TransferSyntaxUID = syntax
    data_set.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    data_set.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    buffer = BytesIO()
    data_set.save_as(buffer, enforce_file_format=True)
    return Specimen(buffer.getvalue(), _scanned(buffer.getvalue()))


def _header(syntax: UID) -> Dataset:
    data_set = Dataset()
    data_set.SpecificCharacterSet = "ISO_IR 192"
    data_set.ImageType = ["ORIGINAL", "PRIMARY"]
    data_set.SOPClassUID = SOP_CLASS_UID
    data_set.SOPInstanceUID = derived_uid("doctor", "instance", syntax, IMPLEMENTATION_VERSION_NAME)
    data_set.StudyInstanceUID = STUDY_INSTANCE_UID
    data_set.SeriesInstanceUID = derived_uid("doctor", "series")
    data_set.StudyDate = data_set.ContentDate = "20260101"
    data_set.StudyTime = data_set.ContentTime = "120000"
    data_set.AcquisitionDateTime = "20260101120000"
    data_set.Modality = "XC"
    data_set.Manufacturer = data_set.ManufacturerModelName = "dicom-node"
    data_set.PatientName, data_set.PatientID = PATIENT_NAME, PATIENT_ID
    for keyword in (
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "ReferringPhysicianName",
        "StudyID",
        "PatientOrientation",
        "Laterality",
    ):
        setattr(data_set, keyword, "")
    data_set.StudyDescription = "test of the connection; may be deleted"
    data_set.SeriesNumber, data_set.InstanceNumber = 1, SYNTAXES.index(syntax) + 1
    data_set.BurnedInAnnotation, data_set.LossyImageCompression = "NO", "00"
    data_set.AcquisitionContextSequence = Sequence()
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation = 1, "MONOCHROME2"
    data_set.Rows = data_set.Columns = _SIDE
    data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit, data_set.PixelRepresentation = 8, 8, 7, 0
    return data_set


def _described(data_set: Dataset) -> dict[str, Any]:
    return {
        "rows": data_set.Rows,
        "columns": data_set.Columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "bits_allocated": 8,
        "bits_stored": 8,
        "pixel_representation": 0,
        "photometric_interpretation": "MONOCHROME2",
    }


def _scanned(content: bytes) -> Summary:
    parser = Part10Parser()
    pieces = [bytes(piece) for piece in parser.feed(content)]
    parser.finish()
    scanner = DataSetScanner(str(parser.transfer_syntax_uid), Limits())
    for piece in pieces:
        scanner.feed(piece)
    return scanner.finish()
