"""What a report takes over from its source image, and nothing more: patient, study, site, side.

The source may be a telephone's first try at DICOM: attributes missing, in a foreign character set, too long, of another shape. The rule: an
attribute is written exactly as the source has it (converted to UTF-8), or empty. Never cut: half a Patient ID is another patient. What was
left out is named, by keyword, in the report's notes.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sr._snomed_dict import mapping as snomed_mapping
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from inference.errors import UnsupportedPixels
from inference.records import Code
from inference.report import codes
from inference.report.encode import Element
from inference.report.values import valid

_UNREADABLE = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
    EOFError,
    NotImplementedError,
    LookupError,
    OSError,
    struct.error,
)
"""What pydicom raises when it converts a damaged element."""

_OFFSET = re.compile(r"[+-](0\d|1[0-4])[0-5]\d")

DERMOSCOPIC_PHOTOGRAPHY = "1.2.840.10008.5.1.4.1.1.77.1.7"

# Tag, VR, whether it must be there (type 2), the values allowed (None: any).
# PS3.3 C.7.1.1 Patient, C.7.2.1 General Study, C.7.2.2 Patient Study
_PATIENT_AND_STUDY: tuple[tuple[int, str, bool, frozenset[str] | None], ...] = (
    (0x00080020, "DA", True, None),  # Study Date
    (0x00080030, "TM", True, None),  # Study Time
    (0x00080050, "SH", True, None),  # Accession Number
    (0x00080090, "PN", True, None),  # Referring Physician's Name
    (0x00081030, "LO", False, None),  # Study Description
    (0x00100010, "PN", True, None),  # Patient's Name
    (0x00100020, "LO", True, None),  # Patient ID
    (0x00100021, "LO", False, None),  # Issuer of Patient ID
    (0x00100022, "CS", False, frozenset({"TEXT", "RFID", "BARCODE"})),  # Type of Patient ID
    (0x00100030, "DA", True, None),  # Patient's Birth Date
    (0x00100040, "CS", True, frozenset({"M", "F", "O"})),  # Patient's Sex
    (0x00101010, "AS", False, None),  # Patient's Age
    (0x00120062, "CS", False, frozenset({"YES", "NO"})),  # Patient Identity Removed
    (0x00120063, "LO", False, None),  # De-identification Method
    (0x00200010, "SH", True, None),  # Study ID
)
# Sequence, and the attributes of its items: assigning authorities (PS3.3 Table 10-18), and codes
_AUTHORITY = ((0x00400031, "UT"), (0x00400032, "UT"), (0x00400033, "CS"))
_CODE = ((0x00080100, "SH"), (0x00080102, "SH"), (0x00080103, "SH"), (0x00080104, "LO"))
_SEQUENCES: tuple[tuple[int, tuple[tuple[int, str], ...]], ...] = (
    (0x00080051, _AUTHORITY),  # Issuer of Accession Number
    (0x00100024, ((0x00400032, "UT"), (0x00400033, "CS"))),  # Issuer of Patient ID Qualifiers
    (0x00120064, _CODE),  # De-identification Method Code
)


class _Reader:
    """Text out of a pydicom data set, whatever state the data set is in."""

    def __init__(self, source: Dataset) -> None:
        self._encodings = ["iso8859"]
        declared = self.text(source, 0x00080005, "CS")
        if declared:
            try:
                self._encodings = list(convert_encodings([term.strip() for term in declared.split("\\")]))
            except LookupError:  # a character set nobody knows: read as Latin-1, as if none were declared
                self._encodings = ["iso8859"]

    def text(self, source: Dataset, tag: int, vr: str) -> str | None:
        """Text of one attribute without padding; None when absent, "" when empty. All values, joined by backslashes."""
        element = source.get_item(tag)
        if element is None:
            return None
        value = element.value
        if isinstance(element, RawDataElement):
            value = value or b""
            delimiters = PN_DELIMS if vr == "PN" else TEXT_VR_DELIMS
            if vr in {"PN", "LO", "SH", "ST", "UT"}:
                value = decode_bytes(value, self._encodings, delimiters)
            else:
                value = value.decode("ascii", "replace")
        elif value is None:
            value = ""
        elif isinstance(value, list | tuple) or (not isinstance(value, str | bytes) and hasattr(value, "append")):
            value = "\\".join(str(one) for one in value)
        return str(value).rstrip(" \0")

    @staticmethod
    def items(source: Dataset, tag: int) -> list[Dataset]:
        """Items of a sequence; none when it is absent or damaged."""
        try:
            if tag not in source or source[tag].VR != "SQ":
                return []
            return [item for item in source[tag].value if isinstance(item, Dataset)]
        except _UNREADABLE:
            return []

    @staticmethod
    def number(source: Dataset, tag: int) -> int | None:
        """One number; None when absent or damaged."""
        try:
            value = source[tag].value
            return int(value) if value is not None else None
        except _UNREADABLE:
            return None

    def code(self, item: Dataset) -> Code | None:
        """Code of a Code Sequence item, in SNOMED CT where it is in one of SNOMED's older forms; None when incomplete."""
        value = self.text(item, 0x00080100, "SH") or self.text(item, 0x00080119, "LO")
        designator = self.text(item, 0x00080102, "SH")
        meaning = self.text(item, 0x00080104, "LO") or value
        if not value or not designator or not meaning:
            return None
        if designator in {"SRT", "SNM3", "99SDM"}:
            current = snomed_mapping["SRT"].get(value)
            if current is None:
                return None
            value, designator = current, "SCT"
        if not (valid("SH", designator) and valid("LO", value) and valid("LO", meaning)):
            return None
        return Code(value, designator, meaning)


@dataclass(frozen=True, slots=True)
class Source:
    """The source image as the reports need it."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    rows: int | None
    columns: int | None
    multi_frame: bool
    modality: Code
    site: Code | None
    laterality: Code | None
    patient_and_study: tuple[Element, ...]
    """Patient, Patient Study and General Study attributes, ready to write; Study Instance UID included."""
    patient_orientation: str
    lossy: tuple[Element, ...]
    """Lossy Image Compression (0028,2110) and what belongs to it."""
    offset: str | None
    """Timezone Offset From UTC of the source; None when it states none."""
    notes: tuple[str, ...]
    """Keywords of attributes that were left empty because the source's value is not valid."""


def read_source(data_set: Dataset) -> Source:
    """Take over what a report copies from its source.

    Parameters
    ----------
    data_set
        The source's data set up to the pixel data; neither changed nor checked as a whole.

    Raises
    ------
    UnsupportedPixels
        One of the four UIDs is missing or is no UID: no report could say what it is about.
    """
    with warnings.catch_warnings():  # pydicom warns of every bad value and character set; they are dealt with one by one
        warnings.simplefilter("ignore")
        return _read_source(data_set)


def _copied(reader: _Reader, data_set: Dataset) -> tuple[list[Element], list[str]]:
    elements: list[Element] = []
    notes: list[str] = []
    for tag, vr, mandatory, allowed in _PATIENT_AND_STUDY:
        text = reader.text(data_set, tag, vr)
        if text and (not valid(vr, text) or (allowed is not None and text not in allowed)):
            notes.append(keyword_for_tag(tag))
            text = None
        if text or mandatory:
            elements.append((tag, vr, text or ""))
    for tag, members in _SEQUENCES:
        items = []
        for item in reader.items(data_set, tag):
            found = [(member, vr, reader.text(item, member, vr)) for member, vr in members]
            kept = [(member, vr, text) for member, vr, text in found if text and valid(vr, text)]
            if kept and len(kept) == sum(1 for _, _, text in found if text):
                items.append(kept)
            else:
                notes.append(keyword_for_tag(tag))
        if items:
            elements.append((tag, "SQ", items))
    present = {tag for tag, _, _ in elements}
    # Patient Identity Removed YES needs one of the two that say how (PS3.3 Table C.7-1): without, it is left out rather than made invalid
    if 0x00120062 in present and not present & {0x00120063, 0x00120064}:
        elements = [element for element in elements if element[0] != 0x00120062 or element[2] != "YES"]
    return elements, notes


def _lossy(reader: _Reader, data_set: Dataset) -> tuple[Element, ...]:
    if reader.text(data_set, 0x00282110, "CS") != "01":
        return ((0x00282110, "CS", "00"),)
    ratio = reader.text(data_set, 0x00282112, "DS") or ""
    method = reader.text(data_set, 0x00282114, "CS") or ""
    elements: list[Element] = [(0x00282110, "CS", "01")]
    if re.fullmatch(r"\d{1,10}(\.\d{1,5})?(\\\d{1,10}(\.\d{1,5})?)*", ratio) and all(valid("CS", one) for one in method.split("\\")):
        elements += [(0x00282112, "DS", ratio), (0x00282114, "CS", method)]
    return tuple(elements)


def _first(codes_found: Iterable[Code | None]) -> Code | None:
    return next((code for code in codes_found if code is not None), None)


def _site(reader: _Reader, data_set: Dataset) -> tuple[Code | None, Code | None]:
    regions = reader.items(data_set, 0x00082218)  # Anatomic Region Sequence
    site = _first(reader.code(item) for item in regions[:1])
    # Image Laterality, else Laterality, else the region's modifier (items.md section 2)
    for tag in (0x00200062, 0x00200060):
        side = codes.SIDES.get(reader.text(data_set, tag, "CS") or "")
        if side is not None:
            return site, side
    sides = {code.value: code for code in codes.SIDES.values()}
    modifiers = [reader.code(item) for region in regions[:1] for item in reader.items(region, 0x00082220)]
    return site, _first(sides.get(code.value) for code in modifiers if code is not None and code.scheme_designator == "SCT")


def _read_source(data_set: Dataset) -> Source:
    reader = _Reader(data_set)
    uids = {}
    for tag in (0x00080016, 0x00080018, 0x0020000D, 0x0020000E):
        uid = reader.text(data_set, tag, "UI") or ""
        if not valid("UI", uid):
            raise UnsupportedPixels(
                f"{keyword_for_tag(tag)} of the source is missing or no UID: a report could not refer to it, send it again mended"
            )
        uids[tag] = uid
    elements, notes = _copied(reader, data_set)
    elements.append((0x0020000D, "UI", uids[0x0020000D]))
    offset = reader.text(data_set, 0x00080201, "SH") or ""
    site, laterality = _site(reader, data_set)
    modality: Any = reader.text(data_set, 0x00080060, "CS") or ""
    if uids[0x00080016] == DERMOSCOPIC_PHOTOGRAPHY:
        modality = "DMS"
    orientation = reader.text(data_set, 0x00200020, "CS") or ""
    return Source(
        sop_class_uid=uids[0x00080016],
        sop_instance_uid=uids[0x00080018],
        study_instance_uid=uids[0x0020000D],
        series_instance_uid=uids[0x0020000E],
        rows=reader.number(data_set, 0x00280010),
        columns=reader.number(data_set, 0x00280011),
        multi_frame=(reader.number(data_set, 0x00280008) or 1) > 1,
        modality=codes.MODALITIES.get(modality, codes.MODALITIES["XC"]),
        site=site,
        laterality=laterality,
        patient_and_study=tuple(elements),
        patient_orientation=orientation if re.fullmatch(r"[A-Z]{1,16}\\[A-Z]{1,16}", orientation) else "",
        lossy=_lossy(reader, data_set),
        offset=offset if _OFFSET.fullmatch(offset) else None,
        notes=tuple(notes),
    )
