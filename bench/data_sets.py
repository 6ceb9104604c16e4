"""Data sets of the sizes of performance.md; any number of instances from one drawing, by giving it other UIDs of the same length."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from inference.drawing import draw_skin_picture
from storage.part10 import part10_prefix

KINDS = ("tiny", "small", "jpeg")
PER_STUDY, PER_SERIES = 20, 10
"""What a sender sends: instances of a study, and of a series of it."""
_DIGITS = 36


def picture(kind: str, number: int) -> Dataset:
    """Draw one instance: tiny 64x128 8 bit, small 512x512 16 bit, jpeg 4000x3000 baseline, raw the same as native RGB."""
    data_set = Dataset()
    data_set.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data_set.SOPInstanceUID = pydicom.uid.generate_uid()
    data_set.StudyInstanceUID = data_set.SeriesInstanceUID = f"1.2.{time.time_ns()}.{number}"
    data_set.PatientName, data_set.PatientID, data_set.Modality = "Bench^Mark", "bench", "OT"
    for keyword in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"):
        setattr(data_set, keyword, "")
    data_set.SeriesNumber = data_set.InstanceNumber = "1"
    data_set.ConversionType = "WSD"
    syntax = pydicom.uid.ExplicitVRLittleEndian
    if kind in ("jpeg", "raw"):
        rows, columns, bits, samples = 3000, 4000, 8, 3
        pixels = cv2.resize(draw_skin_picture(seed=number % 4, rows=750, columns=1000), (columns, rows))
        data_set.PlanarConfiguration = 0
        if kind == "raw":
            data_set.PixelData, data_set.PhotometricInterpretation = pixels.tobytes(), "RGB"
        else:
            stream = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
            data_set.PixelData, syntax = encapsulate([stream]), pydicom.uid.JPEGBaseline8Bit
            data_set["PixelData"].is_undefined_length = True
            data_set.PhotometricInterpretation = "YBR_FULL_422"
    else:
        rows, columns, bits, samples = (64, 128, 8, 1) if kind == "tiny" else (512, 512, 16, 1)
        data_set.PixelData = np.random.default_rng(number).bytes(rows * columns * bits // 8)
        data_set.PhotometricInterpretation = "MONOCHROME2"
    data_set["PixelData"].VR = "OB" if bits == 8 else "OW"
    data_set.Rows, data_set.Columns, data_set.SamplesPerPixel = rows, columns, samples
    data_set.BitsAllocated = data_set.BitsStored = bits
    data_set.HighBit, data_set.PixelRepresentation = bits - 1, 0
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = syntax
    return data_set


@dataclass(frozen=True)
class Pattern:
    """One drawn data set, without preamble and meta information, split where its UIDs stand."""

    kind: str
    transfer_syntax_uid: str
    parts: tuple[bytes, bytes, bytes, bytes]

    @classmethod
    def drawn(cls, kind: str) -> Pattern:
        """Draw the data set of a kind."""
        data_set = picture(kind, 1)
        sop, study, series = (f"2.25.{os.getpid()}{secrets.randbelow(10**40):040}"[: 5 + _DIGITS] for _ in range(3))
        data_set.SOPInstanceUID, data_set.StudyInstanceUID, data_set.SeriesInstanceUID = sop, study, series
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_dataset(buffer, data_set)
        before, rest = buffer.getvalue().split(sop.encode(), 1)
        middle, rest = rest.split(study.encode(), 1)
        between, after = rest.split(series.encode(), 1)
        return cls(kind, str(data_set.file_meta.TransferSyntaxUID), (before, middle, between, after))

    @property
    def byte_count(self) -> int:
        """Bytes of an instance."""
        return sum(map(len, self.parts)) + 3 * _DIGITS

    def new_uid(self) -> str:
        """Return a new UID of the length that fits."""
        return f"2.25.{secrets.randbelow(9 * 10 ** (_DIGITS - 1)) + 10 ** (_DIGITS - 1)}"

    def chunks(self, sop: str, study: str, series: str) -> list[bytes]:
        """Return the bytes of an instance, in pieces as an association brings them."""
        before, middle, between, after = self.parts
        head = before + sop.encode() + middle + study.encode() + between + series.encode()
        size = 128 << 10
        return [head + after[: size - len(head)], *(after[start : start + size] for start in range(size - len(head), len(after), size))]

    def write_files(self, folder: Path, count: int, *, per_study: int = PER_STUDY, per_series: int = PER_SERIES) -> None:
        """Write files of `count` new instances, in studies and series of so many."""
        study = series = ""
        sop_class = str(pydicom.uid.SecondaryCaptureImageStorage)
        for number in range(count):
            if number % per_study == 0:
                study = self.new_uid()
            if number % min(per_series, per_study) == 0:
                series = self.new_uid()
            sop = self.new_uid()
            prefix = part10_prefix(sop_class_uid=sop_class, sop_instance_uid=sop, transfer_syntax_uid=self.transfer_syntax_uid)
            with (folder / f"{number:05}.dcm").open("xb") as file:
                file.writelines((prefix, *self.chunks(sop, study, series)))
