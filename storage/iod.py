"""What the standard demands of an instance as a whole: transfer syntaxes, indispensable attributes, size of the pixel data.

A cut exactly between two top-level elements leaves a well-framed data set. What betrays it is an attribute that the SOP class
cannot do without and that stands near the end; :data:`INDISPENSABLE` names it. Only attributes of type 1 in a mandatory module are
named, so that no conformant instance is refused.

References
----------
DICOM PS3.3 Annex A, PS3.4 Table B.5-1, PS3.5 Sections 8.1.1, 8.2, 10 and Annex A, PS3.6 Annex A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

IMPLICIT: Final = 0
LITTLE: Final = 1
BIG: Final = 2

PIXEL_DATA: Final = 0x7FE00010
FLOAT_PIXEL_DATA: Final = 0x7FE00008
DOUBLE_FLOAT_PIXEL_DATA: Final = 0x7FE00009
PIXEL_DATA_PROVIDER_URL: Final = 0x00287FE0
CONCEPT_NAME_CODE_SEQUENCE: Final = 0x0040A043


@dataclass(frozen=True, slots=True)
class TransferSyntax:
    """How a data set is encoded."""

    encoding: int = LITTLE
    deflated: bool = False
    encapsulated: bool = False
    video: bool = False
    """One fragment may hold all frames (PS3.5 8.2.5 to 8.2.13)."""


_ROOT = "1.2.840.10008.1.2"
_JPEG = TransferSyntax(encapsulated=True)
_VIDEO = TransferSyntax(encapsulated=True, video=True)

TRANSFER_SYNTAXES: Mapping[str, TransferSyntax] = {
    _ROOT: TransferSyntax(encoding=IMPLICIT),
    f"{_ROOT}.1": TransferSyntax(),
    f"{_ROOT}.2": TransferSyntax(encoding=BIG),
    f"{_ROOT}.1.98": _JPEG,
    f"{_ROOT}.1.99": TransferSyntax(deflated=True),
    **{f"{_ROOT}.4.{number}": _JPEG for number in (*range(50, 67), 70, 80, 81, 90, 91, 92, 93, 110, 111, 112, 201, 202, 203)},
    **{f"{_ROOT}.4.{number}": TransferSyntax() for number in (94, 204)},
    **{f"{_ROOT}.4.{number}": TransferSyntax(deflated=True) for number in (95, 205)},
    **{f"{_ROOT}.4.{number}": _VIDEO for number in range(100, 109)},
    **{f"{_ROOT}.4.{number}.1": _VIDEO for number in range(100, 107)},
    f"{_ROOT}.5": _JPEG,
    f"{_ROOT}.8.1": _JPEG,
}
"""Every transfer syntax that a stored data set may have. Missing on purpose: SMPTE ST 2110 (never stored), MIME and XML (no data set)."""

_PIXELS = ((PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_FLOAT_PIXEL_DATA, PIXEL_DATA_PROVIDER_URL),)
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_IMAGES = """
    1 1.1 1.1.1 1.2 1.2.1 1.3 1.3.1 2 2.1 2.2 3 3.1 4 4.1 4.3 4.4 5 6 6.1 6.2 6.3 7 7.1 7.2 7.3 7.4
    12.1 12.1.1 12.2 12.2.1 12.3 13.1.1 13.1.2 13.1.3 13.1.4 13.1.5 14.1 14.2 20 30 66.4 66.7 66.8
    77.1.1 77.1.1.1 77.1.2 77.1.2.1 77.1.3 77.1.4 77.1.4.1 77.1.5.1 77.1.5.2 77.1.5.4 77.1.5.5 77.1.5.6 77.1.5.7 77.1.5.8
    77.1.6 77.1.7 77.1.8 77.1.9 81.1 82.1 128 128.1 130 481.1 481.23 481.24 601.1 601.2
"""
_DOCUMENTS = "11 22 33 34 35 40 50 59 65 67 68 69 70 71 72 73 74 75 76 77"
_WAVEFORMS = "9.1.1 9.1.2 9.1.3 9.1.4 9.2.1 9.3.1 9.4.1 9.4.2 9.5.1 9.6.1 9.6.2 9.7.1 9.7.2 9.7.3 9.7.4 9.8.1"

Demand = tuple[tuple[int, ...], ...]
"""All of the groups, any tag of each."""

INDISPENSABLE: Mapping[str, Demand] = {
    **{_STORAGE + number: _PIXELS for number in _IMAGES.split()},
    **{f"{_STORAGE}88.{number}": ((0x0040A730,),) for number in _DOCUMENTS.split()},  # Content Sequence
    **{_STORAGE + number: ((0x54000100,),) for number in _WAVEFORMS.split()},  # Waveform Sequence
    **{f"{_STORAGE}104.{number}": ((0x00420011,),) for number in range(1, 6)},  # Encapsulated Document
    _STORAGE + "4.2": ((0x56000020,),),  # Spectroscopy Data
    _STORAGE + "11.1": ((0x0070005A,), (0x20500010, 0x20500020)),  # Displayed Area; Presentation LUT Sequence or Shape
    _STORAGE + "11.2": ((0x0070005A,),),
    _STORAGE + "11.3": ((0x0070005A,),),
    _STORAGE + "66.1": ((0x00700308,),),  # Registration Sequence
    _STORAGE + "66.2": ((0x0070031C,),),  # Fiducial Set Sequence
    _STORAGE + "66.3": ((0x00640002,),),  # Deformable Registration Sequence
    _STORAGE + "66.5": ((0x00660002,),),  # Surface Sequence
    _STORAGE + "66.6": ((0x00660101,),),  # Track Set Sequence
    _STORAGE + "67": ((0x00409094,),),  # Referenced Image Real World Value Mapping Sequence
    _STORAGE + "91.1": ((0x006A0002,),),  # Annotation Group Sequence
    _STORAGE + "481.2": ((PIXEL_DATA, 0x30040050),),  # grid-based dose, or DVH Sequence
    _STORAGE + "481.3": ((0x30060039,), (0x30060080,)),  # ROI Contour Sequence, RT ROI Observations Sequence
    _STORAGE + "481.4": ((0x30080020,),),  # Treatment Session Beam Sequence
    _STORAGE + "481.5": ((0x300A000C,),),  # RT Plan Geometry
    _STORAGE + "481.8": ((0x300A000C,),),
}
"""SOP class -> attributes without which an instance of it is none."""

IMAGE_MODULE: Final = frozenset({0x00280002, 0x00280004, 0x00280010, 0x00280011, 0x00280100})
"""Image Pixel module: where all of these stand at the top of a SOP class not listed above, Pixel Data must follow."""


def missing(sop_class_uid: str, present: frozenset[int] | set[int]) -> tuple[int, ...]:
    """Return the alternatives of the first unmet demand, empty when the instance has all that its SOP class needs."""
    demand = INDISPENSABLE.get(sop_class_uid)
    if demand is None:
        demand = _PIXELS if present >= IMAGE_MODULE else ()
    return next((alternatives for alternatives in demand if present.isdisjoint(alternatives)), ())


@cache
def witnesses() -> frozenset[int]:
    """Return every tag whose presence :func:`missing` may ask about."""
    return IMAGE_MODULE.union(*(group for demand in INDISPENSABLE.values() for group in demand))


@cache
def sequence_tags() -> frozenset[int]:
    """Return the tags of VR SQ of the data dictionary (PS3.6), which Implicit VR leaves to the reader to know."""
    from pydicom._dicom_dict import DicomDictionary  # noqa: PLC0415 - some 5,000 entries, wanted once and only here

    return frozenset(tag for tag, entry in DicomDictionary.items() if entry[0] == "SQ")


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers that say how large the pixel data is."""

    rows: int
    columns: int
    samples_per_pixel: int
    bits_allocated: int
    number_of_frames: int
    photometric_interpretation: str

    def fault(self) -> str:
        """Say what is impossible in these numbers; empty when nothing is."""
        if self.rows < 1 or self.columns < 1:
            return "Rows and Columns must be at least 1"
        if not 1 <= self.samples_per_pixel <= 4:
            return "Samples per Pixel must be 1 to 4"
        if self.bits_allocated != 1 and (self.bits_allocated % 8 or not 8 <= self.bits_allocated <= 64):
            return "Bits Allocated must be 1 or a multiple of 8 up to 64"
        if self.number_of_frames < 1:
            return "Number of Frames must be at least 1"
        return ""

    def native_sizes(self, tag: int) -> tuple[int, ...]:
        """Return the right lengths in bytes of a native element `tag`, without the pad byte, best first.

        Two are right for 4:2:2, whose chroma may stand for two pixels as the photometric interpretation says or, as many
        senders have it, once for each. One bit per pixel is packed across rows and frames (PS3.5 8.1.1).
        """
        bits = {FLOAT_PIXEL_DATA: 32, DOUBLE_FLOAT_PIXEL_DATA: 64}.get(tag, self.bits_allocated)
        pixels = self.rows * self.columns * self.number_of_frames
        full = (pixels * self.samples_per_pixel * bits + 7) // 8
        if tag == PIXEL_DATA and self.samples_per_pixel == 3:
            if self.photometric_interpretation in ("YBR_FULL_422", "YBR_PARTIAL_422"):
                return (pixels * 2 * bits // 8, full)
            if self.photometric_interpretation == "YBR_PARTIAL_420":
                return (pixels * 3 * bits // 16, full)
        return (full,)
