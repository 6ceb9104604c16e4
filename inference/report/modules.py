"""The modules that all our objects share: patient, study, series, equipment, SOP common."""

from __future__ import annotations

from dataclasses import dataclass

from inference.report.encode import Element
from inference.report.header import Source
from inference.report.identity import Instant, NodeIdentity
from inference.report.values import shortened

EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"

# High, so that a worklist sorts the reports behind the pictures; one for each kind, as each is alone in its series
_SERIES_NUMBERS = {"summary": 9001, "findings": 9002, "segmentation": 9003}


@dataclass(frozen=True, slots=True)
class ObjectIdentity:
    """One object to be written: its UIDs, its moment, its maker."""

    sop_instance_uid: str
    series_instance_uid: str
    instant: Instant
    node: NodeIdentity
    profile: str

    def elements(self, sop_class_uid: str, modality: str, kind: str, source: Source) -> list[Element]:
        """Elements of the patient, study, series, equipment and SOP common modules, and content date and time."""
        now = self.instant
        return [
            *source.patient_and_study,
            (0x00080005, "CS", "ISO_IR 192"),
            (0x00080012, "DA", now.date),  # Instance Creation Date
            (0x00080013, "TM", now.time),
            (0x00080016, "UI", sop_class_uid),
            (0x00080018, "UI", self.sop_instance_uid),
            (0x00080021, "DA", now.date),  # Series Date
            (0x00080023, "DA", now.date),  # Content Date
            (0x00080031, "TM", now.time),
            (0x00080033, "TM", now.time),
            (0x00080060, "CS", modality),
            (0x00080070, "LO", shortened(self.node.manufacturer) or "-"),
            (0x00080201, "SH", now.offset),
            (0x0008103E, "LO", shortened(f"AI, not for clinical use: {self.profile} {kind}")),
            (0x00081090, "LO", shortened(self.node.model_name) or "-"),
            (0x00181000, "LO", shortened(self.node.serial_number) or "-"),
            (0x00181020, "LO", shortened(self.node.software_version) or "-"),
            (0x0020000E, "UI", self.series_instance_uid),
            (0x00200011, "IS", str(_SERIES_NUMBERS[kind])),
            (0x00200013, "IS", "1"),
        ]
