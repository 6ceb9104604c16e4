"""Draws sources and analyses for the report tests: no picture of anybody, no file from elsewhere."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from inference.records import (
    Algorithm,
    Category,
    Code,
    Diagnosis,
    Domain,
    FrameAnalysis,
    ImageAnalysis,
    Indicator,
    Lesion,
    Quality,
    Report,
    ReportContext,
    Segmentation,
)
from inference.report import NodeIdentity

VL_PHOTOGRAPHIC = "1.2.840.10008.5.1.4.1.1.77.1.4"
DERMOSCOPIC = "1.2.840.10008.5.1.4.1.1.77.1.7"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
MULTI_FRAME_TRUE_COLOUR = "1.2.840.10008.5.1.4.1.1.7.4"

NODE = NodeIdentity(manufacturer="Derm Node makers", model_name="dicom-node", software_version="0.1.0", serial_number="inst-1")

MELANOMA = Code("2C30", "99ICD11", "Melanoma of skin")
NAEVUS = Code("2F20", "99ICD11", "Melanocytic naevus")
KERATOSIS = Code("2F21.0", "99ICD11", "Seborrhoeic keratosis")


def algorithm(name: str = "icd-classifier", version: str = "1.2.0") -> Algorithm:
    """Make an algorithm with a digest that follows from its name."""
    return Algorithm(name, version, f"{sum(name.encode()):064x}", "temperature 1.3")


def context(**changes: object) -> ReportContext:
    """Make the frozen part of a job."""
    values: dict[str, object] = {
        "analysed_at": "2026-03-04T05:06:07.250000+01:00",
        "profile": "dermatology",
        "configuration_digest": "c" * 64,
        "installation_uid": "2.25.314159265358979",
    }
    return ReportContext(**(values | changes))  # type: ignore[arg-type]


def source(sop_class_uid: str = VL_PHOTOGRAPHIC, *, rows: int = 120, columns: int = 160, frames: int = 1, bare: bool = False) -> Dataset:
    """Draw the header of a colour picture; `bare`: nothing that an image can do without."""
    ds = Dataset()
    ds.SOPClassUID = sop_class_uid
    ds.SOPInstanceUID = "1.2.826.0.1.3680043.10.99.1.1.1"
    ds.StudyInstanceUID = "1.2.826.0.1.3680043.10.99.1"
    ds.SeriesInstanceUID = "1.2.826.0.1.3680043.10.99.1.1"
    ds.Modality = {DERMOSCOPIC: "DMS", SECONDARY_CAPTURE: "OT"}.get(sop_class_uid, "XC")
    ds.SamplesPerPixel = 3
    ds.PhotometricInterpretation = "RGB"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelRepresentation = ds.PlanarConfiguration = 0
    if frames > 1:
        ds.NumberOfFrames = frames
    if bare:
        return ds
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.PatientName = "Müller^Änne"
    ds.PatientID = "P-0042"
    ds.PatientBirthDate = "19610203"
    ds.PatientSex = "F"
    ds.StudyDate = "20260304"
    ds.StudyTime = "050000"
    ds.StudyID = "S1"
    ds.AccessionNumber = "A-77"
    ds.ReferringPhysicianName = "Roe^Rick"
    ds.ImageLaterality = "L"
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "14975008", "SCT", "Forearm"
    ds.AnatomicRegionSequence = [region]
    return ds


def reread(ds: Dataset) -> Dataset:
    """Write a data set and read it back, so that its elements are as raw as an archive's."""
    buffer = BytesIO()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


def part10(report: Report) -> BytesIO:
    """Put a report into a file with preamble and file meta information."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = report.sop_class_uid
    meta.MediaStorageSOPInstanceUID = report.sop_instance_uid
    meta.TransferSyntaxUID = report.transfer_syntax_uid
    meta.ImplementationClassUID = "1.2.826.0.1.3680043.10.99.9"
    buffer = BytesIO()
    buffer.write(b"\0" * 128 + b"DICM")
    pydicom.filewriter.write_file_meta_info(buffer, meta)
    buffer.write(report.data_set)
    buffer.seek(0)
    return buffer


def quality(score: float = 72.5, *, acceptable: bool = True) -> Quality:
    """Make a quality result."""
    return Quality(score, "good" if acceptable else "bad", acceptable, 41, algorithm("quality"))


def domain(*, dermatological: bool = True, confidence: float = 0.98765) -> Domain:
    """Make a domain result."""
    return Domain(dermatological, confidence, "dermoscopic" if dermatological else None, 0.5, algorithm("domain"))


def diagnosis() -> Diagnosis:
    """Make a distribution of three categories."""
    categories = (
        Category("naevus", NAEVUS, 0.812345),
        Category("melanoma", MELANOMA, 0.1),
        Category("keratosis", KERATOSIS, 0.087655),
    )
    return Diagnosis(categories, 0.5512, algorithm())


def indicators() -> tuple[Indicator, ...]:
    """Make all five indicators of the matrix."""
    rows = (
        ("malignancy", 0.1, 0.2),
        ("urgent_referral", 0.31, 0.3),
        ("high_priority_referral", 0.1, 0.3),
        ("pigmented_lesion", 0.912345, 0.5),
        ("dermatological_condition", 1.0, 0.5),
    )
    return tuple(Indicator(key, value, threshold, value >= threshold, algorithm()) for key, value, threshold in rows)


def disc(rows: int, columns: int, row: float, column: float, radius: float) -> NDArray[np.bool_]:
    """Draw a disc; shape (rows, columns)."""
    y, x = np.ogrid[:rows, :columns]
    return np.asarray((y + 0.5 - row) ** 2 + (x + 0.5 - column) ** 2 < radius**2)


def ring(row: float, column: float, radius: float, vertices: int = 40) -> NDArray[np.float32]:
    """Draw the outline of a disc; closed, shape (vertices + 1, 2)."""
    angle = np.linspace(0, 2 * np.pi, vertices + 1)
    points = np.column_stack([column + radius * np.cos(angle), row + radius * np.sin(angle)])
    points[-1] = points[0]
    return points.astype(np.float32)


def segmentation(discs: list[tuple[float, float, float]], *, rows: int = 120, columns: int = 160) -> Segmentation:
    """Draw a segmentation of discs (row, column, radius); largest first, as lesions come."""
    mask = np.zeros((rows, columns), dtype=bool)
    lesions = []
    for number, (row, column, radius) in enumerate(sorted(discs, key=lambda one: -one[2]), start=1):
        own = disc(rows, columns, row, column, radius)
        mask |= own
        polygon = np.clip(ring(row, column, radius), 0, (columns, rows)).astype(np.float32)
        share = 100 * float(own.sum()) / (rows * columns)
        lesions.append(Lesion(f"lesion-{number}", polygon, float(own.sum()), share, 0.01 * float(own.sum()), 0.91))
    return Segmentation(mask, tuple(lesions), algorithm("lesion-segmenter"))


def frame(number: int = 1, *, discs: list[tuple[float, float, float]] | None = None, rows: int = 120, columns: int = 160) -> FrameAnalysis:
    """Make a frame that passed the gates; `discs`: None for no segmentation."""
    return FrameAnalysis(
        frame_number=number,
        rows=rows,
        columns=columns,
        quality=quality(),
        domain=domain(),
        diagnosis=diagnosis(),
        indicators=indicators(),
        segmentation=None if discs is None else segmentation(discs, rows=rows, columns=columns),
    )


def analysis(*frames: FrameAnalysis, count: int | None = None) -> ImageAnalysis:
    """Make an analysis of frames; by default one frame with two discs."""
    frames = frames or (frame(discs=[(40, 50, 25), (90, 120, 12)]),)
    return ImageAnalysis(frames=frames, frame_count=len(frames) if count is None else count)
