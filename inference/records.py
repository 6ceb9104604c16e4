"""What crosses the borders inside the laboratory: frozen values, no behaviour beyond arithmetic on themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept (DICOM PS3.3 Section 8): value, scheme designator, meaning (at most 64 characters when written)."""

    value: str
    scheme_designator: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Which model, or which rule, produced a result (TID 4019)."""

    name: str
    version: str
    digest: str
    """SHA-256, hexadecimal, over manifest and weights of the bundle; of the rule's constants for a rule."""
    parameters: str = ""
    """What a reader needs to repeat the result: thresholds, calibration; one line of text."""


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Decoded frames of one image instance.

    ``pixels``: uint8, shape (frames, rows, columns, 3), sRGB, in the orientation of the stored image.
    ``spacing_mm``: (between rows, between columns) in millimetres; None when not stated.
    ``notes``: what a person should know of the decoding (an ICC profile that could not be applied), without patient data.
    """

    pixels: NDArray[np.uint8]
    spacing_mm: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quality:
    """Image quality, 0 to 100; ``band`` is one of bad, poor, fair, good, excellent (items.md section 6)."""

    score: float
    band: str
    acceptable: bool
    threshold: float
    algorithm: Algorithm


@dataclass(frozen=True, slots=True)
class Domain:
    """Is it a dermatological picture, and of which modality ("dermoscopic" or "clinical"; None when it is not)."""

    dermatological: bool
    confidence: float
    """Probability, 0 to 1, that the picture is dermatological (clinical + dermoscopic)."""
    modality: str | None
    threshold: float
    algorithm: Algorithm


@dataclass(frozen=True, slots=True)
class Category:
    """One category of a diagnosis distribution; ``probability`` 0 to 1."""

    key: str
    code: Code
    probability: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A calibrated distribution over ICD-11 categories, sorted by falling probability, then code; sums to 1 within 1e-6."""

    categories: tuple[Category, ...]
    entropy: float
    """Normalised to [0, 1]; 0 when there is one category."""
    algorithm: Algorithm


@dataclass(frozen=True, slots=True)
class Indicator:
    """A probability derived from the distribution by the matrix of the bundle.

    ``key``: malignancy, urgent_referral, high_priority_referral, pigmented_lesion or dermatological_condition.
    """

    key: str
    probability: float
    threshold: float
    positive: bool
    algorithm: Algorithm


@dataclass(frozen=True, slots=True, eq=False)
class Lesion:
    """One region. ``polygon``: float32, shape (vertices, 2), (column, row) in pixels of the stored image.

    (0.0, 0.0) is the top left corner of the top left pixel; closed (first point repeated as the last); inside
    [0, columns] x [0, rows].
    """

    key: str
    polygon: NDArray[np.float32]
    area_pixels: float
    area_percent: float
    """Of the whole image."""
    area_mm2: float | None
    certainty: float


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """``mask``: bool, shape (rows, columns) of the stored image; lesions sorted by falling area."""

    mask: NDArray[np.bool_]
    lesions: tuple[Lesion, ...]
    algorithm: Algorithm


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that could not run, and why, in words for a person (no patient data)."""

    item: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class FrameAnalysis:
    """All that was found on one frame. Clinical parts are absent when a gate said no."""

    frame_number: int
    """1-based, as in Referenced Frame Number (0008,1160)."""
    rows: int
    columns: int
    quality: Quality | None = None
    domain: Domain | None = None
    diagnosis: Diagnosis | None = None
    indicators: tuple[Indicator, ...] = ()
    segmentation: Segmentation | None = None
    failures: tuple[Failure, ...] = ()

    @property
    def valid(self) -> bool:
        """Both gates passed (items.md section 3)."""
        return self.quality is not None and self.quality.acceptable and self.domain is not None and self.domain.dermatological


@dataclass(frozen=True, slots=True, eq=False)
class ImageAnalysis:
    """All frames of one source instance, and what concerns the instance as a whole."""

    frames: tuple[FrameAnalysis, ...]
    frame_count: int
    """Number of frames of the source; more than len(frames) when a limit cut the analysis."""
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportReference:
    """An earlier report this one replaces (Predecessor Documents Sequence)."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class ReportContext:
    """What a report depends on beside picture and models: frozen with the job, so that a re-run gives the same bytes."""

    analysed_at: str
    """ISO 8601 with UTC offset, the first claim of the job."""
    profile: str
    configuration_digest: str
    installation_uid: str
    """Device Observer UID of this installation."""
    source_sha256: str = ""
    """Of the picture's data set: an instance that an operator put in the place of another of its UID has other reports."""
    predecessors: dict[str, ReportReference] = field(default_factory=dict)
    """By kind: summary, findings."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """One finished DICOM object. ``data_set`` is Explicit VR Little Endian, without preamble and file meta."""

    kind: str
    """summary, findings or segmentation."""
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    data_set: bytes


JSON = dict[str, Any]
