"""Every coded concept of the reports, and how a code is written. The only place with code values.

Codes of the standard's dictionaries are used where there is one; what has none gets a code of the private scheme. SNOMED retired designator
``SRT`` is never written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from inference.records import Code
from inference.report.encode import Element
from inference.report.identity import derived_uid
from inference.report.values import one_line, shortened

PRIVATE = "99DERMNODE"
"""Designator of the private scheme in this file and in bundle manifests; the configured one is what gets written."""
ICD11 = "99ICD11"
"""The same for ICD-11 MMS, which has no designator in the standard."""
ICD11_UID = "2.16.840.1.113883.6.347"
RESULT_SCHEMA = "1"
"""Version of what the reports say and how: part of every derived UID. Raise it when trees, codes or wording change."""

STANDARD_SCHEMES = frozenset({"DCM", "SCT", "UCUM", "UMLS", "LN", "RFC5646"})
"""Designators of PS3.16 Table 8-1 that need no identification in the object."""


@dataclass(frozen=True, slots=True)
class CodingSchemes:
    """Under which designators the two schemes without a standard one are written.

    Raises
    ------
    ValueError
        A designator does not begin with 99, or has more than 16 characters (PS3.3 Section 8.2).
    """

    private_designator: str = PRIVATE
    icd11_designator: str = ICD11
    icd11_version: str = "2025-01"
    organisation: str = "dicom-node"

    def __post_init__(self) -> None:
        for designator in (self.private_designator, self.icd11_designator):
            if not re.fullmatch(r"99[A-Z0-9_]{1,14}", designator):
                raise ValueError(
                    f"coding scheme designator {designator!r}: a private one begins with 99 and has at most 16 capital letters and digits"
                )

    def designator(self, canonical: str) -> str:
        """Return the designator to write for one used in this package or in a bundle manifest."""
        return {PRIVATE: self.private_designator, ICD11: self.icd11_designator}.get(canonical) or shortened(canonical, 16)

    def identification(self, designators: frozenset[str]) -> list[list[Element]]:
        """Items of the Coding Scheme Identification Sequence (0008,0110) for the schemes in use, as written."""
        items: list[list[Element]] = []
        for designator in sorted(designators - STANDARD_SCHEMES):
            item: list[Element] = [(0x00080102, "SH", designator)]
            if designator == self.private_designator:
                item += [
                    (0x0008010C, "UI", derived_uid("coding scheme", designator)),
                    (0x00080115, "ST", "Dermatology node: measurements and evaluations"),
                    (0x00080103, "SH", RESULT_SCHEMA),
                    (0x00080116, "ST", self.organisation),
                ]
            elif designator == self.icd11_designator:
                item += [
                    (0x0008010C, "UI", ICD11_UID),
                    (0x00080115, "ST", "ICD-11 MMS"),
                    (0x00080103, "SH", self.icd11_version),
                    (0x00080116, "ST", "World Health Organization"),
                ]
            items.append(item)
        return items


def coded(code: Code, schemes: CodingSchemes) -> list[Element]:
    """Elements of a Code Sequence item (PS3.3 Table 8.8-1): Code Value, Long Code Value or URN Code Value, whichever fits."""
    value = one_line(code.value)
    meaning: Element = (0x00080104, "LO", shortened(code.meaning) or shortened(value))
    designator: Element = (0x00080102, "SH", schemes.designator(code.scheme_designator))
    if re.match(r"(urn:|https?://)", value):  # here the designator may be left out, but DCMTK 3.6.7 cannot read the item then
        return [(0x00080120, "UR", value), designator, meaning]
    if len(value) > 16:
        return [(0x00080119, "UC", value), designator, meaning]
    return [(0x00080100, "SH", value), designator, meaning]


def _dcm(value: str, meaning: str) -> Code:
    return Code(value, "DCM", meaning)


def _sct(value: str, meaning: str) -> Code:
    return Code(value, "SCT", meaning)


def _own(value: str, meaning: str) -> Code:
    return Code(value, PRIVATE, meaning)


# Structure of TID 1500, 1204, 1004, 1600, 1501, 1410, 4019
IMAGING_MEASUREMENT_REPORT = _dcm("126000", "Imaging Measurement Report")
LANGUAGE = _dcm("121049", "Language of Content Item and Descendants")
ENGLISH = Code("en-US", "RFC5646", "English (United States)")
OBSERVER_TYPE = _dcm("121005", "Observer Type")
DEVICE = _dcm("121007", "Device")
DEVICE_OBSERVER_UID = _dcm("121012", "Device Observer UID")
DEVICE_OBSERVER_NAME = _dcm("121013", "Device Observer Name")
DEVICE_OBSERVER_MANUFACTURER = _dcm("121014", "Device Observer Manufacturer")
DEVICE_OBSERVER_MODEL_NAME = _dcm("121015", "Device Observer Model Name")
DEVICE_OBSERVER_SERIAL_NUMBER = _dcm("121016", "Device Observer Serial Number")
PROCEDURE_REPORTED = _dcm("121058", "Procedure reported")
IMAGING_PROCEDURE = _sct("363679005", "Imaging procedure")
IMAGE_LIBRARY = _dcm("111028", "Image Library")
IMAGE_LIBRARY_GROUP = _dcm("126200", "Image Library Group")
MODALITY = _dcm("121139", "Modality")
PIXEL_DATA_ROWS = _dcm("110910", "Pixel Data Rows")
PIXEL_DATA_COLUMNS = _dcm("110911", "Pixel Data Columns")
IMAGING_MEASUREMENTS = _dcm("126010", "Imaging Measurements")
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")
MEASUREMENT_GROUP = _dcm("125007", "Measurement Group")
TRACKING_IDENTIFIER = _dcm("112039", "Tracking Identifier")
TRACKING_UNIQUE_IDENTIFIER = _dcm("112040", "Tracking Unique Identifier")
FINDING = _dcm("121071", "Finding")
FINDING_SITE = _sct("363698007", "Finding Site")
LATERALITY = _sct("272741003", "Laterality")
ALGORITHM_NAME = _dcm("111001", "Algorithm Name")
ALGORITHM_VERSION = _dcm("111003", "Algorithm Version")
ALGORITHM_PARAMETERS = _dcm("111002", "Algorithm Parameters")
ALGORITHM_FAMILY = _dcm("111000", "Algorithm Family")
ARTIFICIAL_INTELLIGENCE = _dcm("123110", "Artificial Intelligence")
SOURCE_OF_MEASUREMENT = _dcm("121112", "Source of Measurement")
SOURCE = _sct("260753009", "Source")
IMAGE_REGION = _dcm("111030", "Image Region")
CONCLUSION = _dcm("121077", "Conclusion")
COMMENT = _dcm("121106", "Comment")
NOT_A_NUMBER = _dcm("114000", "Not a number")

# What is measured
IMAGE_QUALITY = _own("image-quality", "Image quality")
IMAGE_QUALITY_RATING = _dcm("111029", "Image Quality Rating")
IMAGE_DOMAIN = _own("image-domain", "Image domain")
CERTAINTY_OF_FINDING = _dcm("111012", "Certainty of Finding")
PROBABILITY_OF_CANCER = _dcm("111047", "Probability of cancer")
REFERRAL_PROBABILITY = _own("referral-prob", "Referral probability")
ENTROPY = _own("entropy", "Entropy of the distribution, normalised")
SKIN_LESION = _sct("95324001", "Skin lesion")
NUMBER_OF_LESIONS = _sct("246206008", "Number of lesions")
AREA = _sct("42798000", "Area")
AREA_PIXELS = _own("area-pixels", "Area in pixels")
AREA_SHARE = _own("area-share", "Area as share of the image")

PERCENT = Code("%", "UCUM", "Percent")
PIXELS = Code("{pixels}", "UCUM", "Pixels")
LESIONS = Code("{lesions}", "UCUM", "Lesions")
SQUARE_MILLIMETRE = Code("mm2", "UCUM", "Square millimeter")
NO_UNITS = Code("1", "UCUM", "no units")

# Indicators: finding, and the concept of its probability
INDICATORS: Mapping[str, tuple[Code, Code]] = MappingProxyType(
    {
        "malignancy": (_own("malignancy", "Malignancy"), PROBABILITY_OF_CANCER),
        "urgent_referral": (_own("urgent-referral", "Urgent referral"), REFERRAL_PROBABILITY),
        "high_priority_referral": (_own("high-priority", "High-priority referral"), REFERRAL_PROBABILITY),
        "pigmented_lesion": (_own("pigmented", "Pigmented lesion"), CERTAINTY_OF_FINDING),
        "dermatological_condition": (_own("derm-condition", "Dermatological condition"), CERTAINTY_OF_FINDING),
    }
)


def indicator_codes(key: str) -> tuple[Code, Code]:
    """Finding, and concept of the probability, of an indicator; a column that only some bundle knows becomes a private code of its key."""
    return INDICATORS.get(key) or (_own(key.replace("_", "-"), key.replace("_", " ").capitalize()), CERTAINTY_OF_FINDING)


# Evaluations
YES = _sct("373066001", "Yes")
NO = _sct("373067005", "No")
QUALITY_ASSESSMENT = _dcm("111050", "Quality Assessment")
USABLE = _dcm("111237", "Usable - Meets the quality control standard")
UNUSABLE = _dcm("111235", "Unusable - Quality renders image unusable")
NOT_DERMATOLOGICAL = _own("not-derm", "Not dermatological")
DOMAINS: Mapping[str, Code] = MappingProxyType(
    {"dermoscopic": _own("dermoscopic", "Dermoscopic image of the skin"), "clinical": _own("clinical", "Clinical photograph of the skin")}
)
DERMATOLOGICAL = _own("dermatological", "Dermatological")
SUSPICION: Mapping[str, Code] = MappingProxyType(
    {
        "malignancy": _own("susp-malignancy", "Suspicion of malignancy"),
        "urgent_referral": _own("refer-urgent", "Urgent referral suggested"),
        "high_priority_referral": _own("refer-priority", "High-priority referral suggested"),
    }
)

# Where and how the picture was taken
SIDES: Mapping[str, Code] = MappingProxyType(
    {"R": _sct("24028007", "Right"), "L": _sct("7771000", "Left"), "B": _sct("51440002", "Bilateral"), "U": _sct("66459002", "Unilateral")}
)
MODALITIES: Mapping[str, Code] = MappingProxyType(
    {
        "XC": _dcm("XC", "External-camera Photography"),
        "DMS": _dcm("DMS", "Dermoscopy"),
        "GM": _dcm("GM", "General Microscopy"),
        "ES": _dcm("ES", "Endoscopy"),
        "SM": _dcm("SM", "Slide Microscopy"),
    }
)

# Segmentation
MORPHOLOGICALLY_ABNORMAL_STRUCTURE = _sct("49755003", "Morphologically Abnormal Structure")
SEGMENTATION_DERIVATION = _dcm("113076", "Segmentation")
SOURCE_FOR_PROCESSING = _dcm("121322", "Source image for image processing operation")
