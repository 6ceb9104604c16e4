"""Instances drawn by the tests themselves: VL Photographic Images of noise, element by element."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
VL_PHOTOGRAPHIC = "1.2.840.10008.5.1.4.1.1.77.1.4"
COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
_LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT")


def new_uid() -> str:
    """Return a fresh UID under 2.25 (PS3.5 B.2)."""
    return f"2.25.{secrets.randbits(120)}"


def element(tag: int, vr: bytes, value: bytes, *, implicit: bool = False) -> bytes:
    """Encode one element in Explicit (or Implicit) VR Little Endian."""
    value += (b"\0" if vr in (b"UI", b"OB", b"OW") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<I", len(value)) + value
    if vr in _LONG:
        return head + vr + struct.pack("<HI", 0, len(value)) + value
    return head + vr + struct.pack("<H", len(value)) + value


@dataclass(frozen=True)
class Sample:
    """A data set with its identity."""

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    data_set: bytes
    transfer_syntax_uid: str = EXPLICIT
    sop_class_uid: str = VL_PHOTOGRAPHIC


def header(
    sop: str,
    study: str,
    series: str,
    *,
    name: str = "Canary^Test",
    patient_id: str = "PID-1",
    rows: int = 16,
    columns: int = 16,
    frames: int = 1,
    implicit: bool = False,
) -> bytes:
    """Encode everything before the Pixel Data of a monochrome 8-bit photograph."""
    elements = (
        (0x00080016, b"UI", VL_PHOTOGRAPHIC.encode()),
        (0x00080018, b"UI", sop.encode()),
        (0x00080020, b"DA", b"20250101"),
        (0x00080060, b"CS", b"XC"),
        (0x00100010, b"PN", name.encode()),
        (0x00100020, b"LO", patient_id.encode()),
        (0x0020000D, b"UI", study.encode()),
        (0x0020000E, b"UI", series.encode()),
        (0x00200013, b"IS", b"1"),
        (0x00280002, b"US", struct.pack("<H", 1)),
        (0x00280004, b"CS", b"MONOCHROME2"),
        (0x00280008, b"IS", str(frames).encode()),
        (0x00280010, b"US", struct.pack("<H", rows)),
        (0x00280011, b"US", struct.pack("<H", columns)),
        (0x00280100, b"US", struct.pack("<H", 8)),
        (0x00280101, b"US", struct.pack("<H", 8)),
        (0x00280102, b"US", struct.pack("<H", 7)),
        (0x00280103, b"US", struct.pack("<H", 0)),
    )
    return b"".join(element(tag, vr, value, implicit=implicit) for tag, vr, value in elements)


def photograph(
    *,
    sop: str = "",
    study: str = "",
    series: str = "",
    pixels: bytes = b"",
    rows: int = 16,
    columns: int = 16,
    implicit: bool = False,
    name: str = "Canary^Test",
    patient_id: str = "PID-1",
) -> Sample:
    """Draw a photograph of noise."""
    sop, study, series = sop or new_uid(), study or new_uid(), series or new_uid()
    pixels = pixels or secrets.token_bytes(rows * columns)
    before = header(sop, study, series, name=name, patient_id=patient_id, rows=rows, columns=columns, implicit=implicit)
    data_set = before + element(0x7FE00010, b"OW" if implicit else b"OB", pixels, implicit=implicit)
    return Sample(sop, study, series, data_set, IMPLICIT if implicit else EXPLICIT)


def chunks_of_video(size: int) -> Iterator[bytes]:
    """Yield a multi-frame photograph of about `size` bytes, one frame of 1 MiB at a time; nothing of it is whole in memory."""
    frames = size >> 20
    yield header(new_uid(), new_uid(), new_uid(), rows=1024, columns=1024, frames=frames)
    yield struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, frames << 20)
    frame = secrets.token_bytes(1 << 20)
    for number in range(frames):
        yield number.to_bytes(8, "big") + frame[8:]


def report(*, source: Sample, sop: str, text: bytes = b"finding", patient_id: str = "PID-1") -> Sample:
    """Write the smallest data set that passes for a Comprehensive 3D SR in its source's study."""
    series = f"{sop}.1"
    item = element(0x0040A160, b"UT", text)
    elements = (
        element(0x00080016, b"UI", COMPREHENSIVE_3D_SR.encode())
        + element(0x00080018, b"UI", sop.encode())
        + element(0x00080060, b"CS", b"SR")
        + element(0x00100010, b"PN", b"Canary^Test")
        + element(0x00100020, b"LO", patient_id.encode())
        + element(0x0020000D, b"UI", source.study_instance_uid.encode())
        + element(0x0020000E, b"UI", series.encode())
        + element(0x0040A730, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item)
    )
    return Sample(sop, source.study_instance_uid, series, elements, EXPLICIT, COMPREHENSIVE_3D_SR)
