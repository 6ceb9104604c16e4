"""The vocabulary: frozen values that cross the seams. No behaviour, no third-party type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """Query/retrieve levels (PS3.4 C.3)."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    INSTANCE = "IMAGE"


INDEXED: Mapping[str, tuple[Level, str]] = {
    # keyword: (level, VR). What QIDO-RS and C-FIND match on and return; collected by the scanner.
    "PatientName": (Level.PATIENT, "PN"),
    "PatientID": (Level.PATIENT, "LO"),
    "IssuerOfPatientID": (Level.PATIENT, "LO"),
    "PatientBirthDate": (Level.PATIENT, "DA"),
    "PatientSex": (Level.PATIENT, "CS"),
    "StudyInstanceUID": (Level.STUDY, "UI"),
    "StudyDate": (Level.STUDY, "DA"),
    "StudyTime": (Level.STUDY, "TM"),
    "AccessionNumber": (Level.STUDY, "SH"),
    "ReferringPhysicianName": (Level.STUDY, "PN"),
    "StudyID": (Level.STUDY, "SH"),
    "StudyDescription": (Level.STUDY, "LO"),
    "TimezoneOffsetFromUTC": (Level.STUDY, "SH"),
    "SeriesInstanceUID": (Level.SERIES, "UI"),
    "Modality": (Level.SERIES, "CS"),
    "SeriesNumber": (Level.SERIES, "IS"),
    "SeriesDescription": (Level.SERIES, "LO"),
    "SeriesDate": (Level.SERIES, "DA"),
    "SeriesTime": (Level.SERIES, "TM"),
    "BodyPartExamined": (Level.SERIES, "CS"),
    "Laterality": (Level.SERIES, "CS"),
    "Manufacturer": (Level.SERIES, "LO"),
    "StationName": (Level.SERIES, "SH"),
    "PerformedProcedureStepStartDate": (Level.SERIES, "DA"),
    "PerformedProcedureStepStartTime": (Level.SERIES, "TM"),
    "SOPClassUID": (Level.INSTANCE, "UI"),
    "SOPInstanceUID": (Level.INSTANCE, "UI"),
    "InstanceNumber": (Level.INSTANCE, "IS"),
    "ContentDate": (Level.INSTANCE, "DA"),
    "ContentTime": (Level.INSTANCE, "TM"),
    "ImageLaterality": (Level.INSTANCE, "CS"),
    "NumberOfFrames": (Level.INSTANCE, "IS"),
    "Rows": (Level.INSTANCE, "US"),
    "Columns": (Level.INSTANCE, "US"),
    "BitsAllocated": (Level.INSTANCE, "US"),
    "SamplesPerPixel": (Level.INSTANCE, "US"),
    "PhotometricInterpretation": (Level.INSTANCE, "CS"),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Who handed the instance over, through which door, when."""

    door: str
    """dimse, dicomweb, or node (made here)."""
    received_at: datetime
    """Aware, UTC."""
    address: str = ""
    calling_ae_title: str = ""
    called_ae_title: str = ""
    peer: str = ""
    """Name of the configured peer; empty when the sender is none."""
    user: str = ""
    """Who identified (User Identity Negotiation), verified; empty: nobody did."""


@dataclass(frozen=True, slots=True)
class Announced:
    """What the command set (C-STORE) or the URL path (STOW-RS) said of an instance; empty means not said."""

    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    study_instance_uid: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits on one instance (threats.md)."""

    object_bytes: int = 2 * 1024**3
    depth: int = 64
    elements: int = 1_000_000
    inflate_ratio: int = 200
    inflate_bytes: int = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Summary:
    """What the scanner learnt in its one pass over a data set."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    byte_count: int
    sha256: str
    """Hexadecimal, over the data set bytes as received (deflated stays deflated; no preamble, no group 0002)."""
    attributes: Mapping[str, tuple[str, ...]]
    """keyword -> decoded values (multi-valued split at the backslash), for those of INDEXED that are present and top level."""
    specific_character_set: tuple[str, ...] = ()
    has_pixel_data: bool = False
    pixel_data_offset: int = -1
    """Byte offset of the Pixel Data element (its tag) in the data set; -1 without, or when deflated."""
    document_title_code: str = ""
    """SR only: value of the root Concept Name Code Sequence (0040,A043)."""
    manufacturer_model_name: str = ""
    software_versions: str = ""


class Outcome(StrEnum):
    """What became of an accepted instance."""

    STORED = "stored"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that the instance is durable; only after this may a door answer Success."""

    outcome: Outcome
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    sha256: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SealedObject:
    """Where the ciphertext of an instance lies, and how to know it again."""

    object_key: str
    """Opaque, random, 32 hexadecimal digits; nothing of the peer's."""
    byte_count: int
    sha256: str
    """Over the sealed bytes."""
    key_id: str
    """Of the study key that wraps the data key."""


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One row of the index: an archived instance (received, or a report made here)."""

    summary: Summary
    sealed: SealedObject
    origin: Origin
    role: str = "source"
    """source, or report."""
    landed_on: str = ""
    """Node on whose disk alone the object lies yet; empty: it is in the store."""


class JobKind(StrEnum):
    """What work there is."""

    ANALYSE = "analyse"
    DELIVER = "deliver"
    ARCHIVE = "archive"
    """Bring a landed object into the store."""


class JobState(StrEnum):
    """States of a job; the transitions are storage.work.TRANSITIONS."""

    READY = "ready"
    CLAIMED = "claimed"
    DONE = "done"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Job:
    """A unit of durable work."""

    id: int
    kind: JobKind
    state: JobState
    lane: str
    """Fair share and isolation: for DELIVER the peer's name; else empty."""
    sop_instance_uid: str
    """What the work is about: the source of ANALYSE, the report of DELIVER."""
    attempts: int
    """Claims so far, this one included."""
    first_claimed_at: datetime | None
    """Frozen at the first claim: the time that reports carry."""
    lease_token: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why the last attempt failed."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """Written at the end: proof of delivery, or model versions and outcome of the analysis."""
    available_at: datetime | None = None
    created_at: datetime | None = None
    finished_at: datetime | None = None
    home: str = ""
    """Node that alone can do it yet, because the object lies on its disk; empty: any."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be enqueued in the transaction that makes it necessary."""

    kind: JobKind
    sop_instance_uid: str
    lane: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)
    home: str = ""
    """As `Job.home`."""


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One audit record; identifiers are allowed here (the audit trail is encrypted), never in application logs."""

    action: str
    """instance.received, instance.duplicate, instance.quarantined, instance.refused, instance.retrieved, report.concluded …"""
    outcome: str
    """success, or the failure in words."""
    actor: str
    """Calling AE title, peer name, principal, or the node's own role."""
    subject: str = ""
    """SOP/Study Instance UID the event is about."""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """A report made here, with what it was made from."""

    sop_instance_uid: str
    source_sop_instance_uid: str
    kind: str
    """summary, findings or segmentation."""
    models: Mapping[str, str]
    """bundle name -> version + digest."""


@dataclass(frozen=True, slots=True)
class NewReport:
    """A report to be archived and delivered; its identity is read from its data set by the scanner."""

    kind: str
    """summary, findings or segmentation."""
    data_set: bytes
    transfer_syntax_uid: str = "1.2.840.10008.1.2.1"  # Explicit VR Little Endian
    deliver_to: tuple[str, ...] = ()
    """Names of peers; one DELIVER job each."""
    models: Mapping[str, str] = field(default_factory=dict)
    """bundle name -> version + digest."""


@dataclass(frozen=True, slots=True)
class Query:
    """A search (QIDO-RS, C-FIND): keyword -> matching value as the standard writes it (PS3.4 C.2.2.2).

    ``keys`` may hold every keyword of INDEXED and ModalitiesInStudy. Empty values are universal matching.
    """

    level: Level
    keys: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    offset: int = 0
    combined_datetime: bool = False
    """Take a date key and its time key as one range of moments (PS3.4 C.2.2.2.5.4); else each by itself."""


@dataclass(frozen=True, slots=True)
class Match:
    """One result of a search: values by keyword, of the level asked and all levels above it.

    Besides INDEXED: ModalitiesInStudy, NumberOfStudyRelatedSeries, NumberOfStudyRelatedInstances,
    NumberOfSeriesRelatedInstances, SOPClassesInStudy; values are text, IS and US as decimal text.
    """

    attributes: Mapping[str, tuple[str, ...]]
