"""From an analysis to finished DICOM objects: which ones, under which UIDs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import Dataset

from inference.records import Algorithm, FrameAnalysis, ImageAnalysis, Report, ReportContext
from inference.report.codes import RESULT_SCHEMA, CodingSchemes
from inference.report.header import Source, read_source
from inference.report.identity import Instant, NodeIdentity, derived_uid
from inference.report.modules import EXPLICIT_VR_LITTLE_ENDIAN, ObjectIdentity
from inference.report.regions import outline, share_out
from inference.report.seg import SEGMENTATION_STORAGE, Segment, segmentation
from inference.report.sr import COMPREHENSIVE_3D_SR, ReportTree, document
from inference.report.tracking import Outline, Tracker

DEFAULT_SCHEMES = CodingSchemes()

MAX_SEGMENTS = 20
"""More lesions than this in one instance share one segment; each keeps its outline in the findings."""
MAX_PIXEL_BYTES = 8 << 20
"""Of a segmentation with one segment a lesion: at twelve megapixels a segment takes 1.5 MB, and every report is delivered and archived."""


def _algorithms(analysis: ImageAnalysis) -> Iterator[Algorithm]:
    for frame in analysis.frames:
        for part in (frame.quality, frame.domain, frame.diagnosis, *frame.indicators, frame.segmentation):
            if part is not None:
                yield part.algorithm


def _basis(source: Source, analysis: ImageAnalysis, context: ReportContext, node: NodeIdentity, schemes: CodingSchemes) -> tuple[str, ...]:
    """What the UIDs derive from: everything that decides the content, except the moment.

    Software version and coding schemes are part of it: after an upgrade a repeated analysis is another document.

    The installation is part of it: two nodes with the same models say the same, but not in the same bytes, and one UID names one object.
    So is what failed: a run that could not compute something is another document than the complete one after it.
    """
    bundles = sorted({f"{algorithm.name}\n{algorithm.version}\n{algorithm.digest}" for algorithm in _algorithms(analysis)})
    failed = [f"{failure.item}\n{failure.reason}" for failure in analysis.failures]
    failed += [f"{frame.frame_number}\n{failure.item}\n{failure.reason}" for frame in analysis.frames for failure in frame.failures]
    return (
        source.sop_instance_uid,
        context.source_sha256,
        context.profile,
        context.configuration_digest,
        context.installation_uid,
        *astuple(node),
        *astuple(schemes),
        RESULT_SCHEMA,
        "bundles",
        *bundles,
        "failed",
        *sorted(failed),
    )


def _reportable(frame: FrameAnalysis) -> FrameAnalysis:
    """The frame with its outlines as a report carries them: none without area; and nothing clinical passes a shut gate."""
    if not frame.valid:
        return replace(frame, diagnosis=None, indicators=(), segmentation=None)
    if frame.segmentation is None:
        return frame
    if frame.segmentation.mask.shape != (frame.rows, frame.columns):
        raise ValueError(f"the mask has shape {frame.segmentation.mask.shape}, the frame {(frame.rows, frame.columns)}: size it back first")
    lesions = []
    for lesion in frame.segmentation.lesions:
        polygon = outline(lesion.polygon, frame.rows, frame.columns)
        if polygon is not None:
            lesions.append(replace(lesion, polygon=polygon))
    return replace(frame, segmentation=replace(frame.segmentation, lesions=tuple(lesions)))


def _outlines(analysis: ImageAnalysis, tracker: Tracker) -> list[Outline]:
    return [
        Outline(
            frame.frame_number,
            lesion,
            part.algorithm,
            tracker.track(frame.frame_number, part.algorithm, f"lesion/{lesion.key}", lesion.key),
        )
        for frame in analysis.frames
        if (part := frame.segmentation) is not None
        for lesion in part.lesions
    ]


def _segments(analysis: ImageAnalysis, outlines: Sequence[Outline], tracker: Tracker) -> list[Segment]:
    """One segment a lesion; one for all where they are too many, or too ragged, or only a mask is known."""
    parts = [(frame.frame_number, frame.segmentation) for frame in analysis.frames if frame.segmentation is not None]
    parts = [(number, part) for number, part in parts if part.mask.any()]
    if not parts:
        return []
    shared: dict[int, NDArray[Any] | None] = {}
    bits = len(outlines) * parts[0][1].mask.size
    if len(outlines) <= MAX_SEGMENTS and bits <= 8 * MAX_PIXEL_BYTES and all(part.lesions for _, part in parts):
        shared = {number: share_out(part.mask, part.lesions) for number, part in parts}
    if not shared or any(labels is None for labels in shared.values()):
        algorithm = parts[0][1].algorithm
        tracked = tracker.track(None, algorithm, "skin-lesions", "skin-lesions")
        return [Segment("Skin lesions", tracked, algorithm, {number: (part.mask, 1) for number, part in parts})]
    segments = []
    position: dict[int, int] = {}
    for one in outlines:
        position[one.frame_number] = value = position.get(one.frame_number, 0) + 1
        labels = shared.get(one.frame_number)
        if labels is not None and (labels == value).any():
            segments.append(Segment(one.tracked.identifier, one.tracked, one.algorithm, {one.frame_number: (labels, value)}))
    return segments


def build_reports(
    source: Dataset, analysis: ImageAnalysis, context: ReportContext, *, node: NodeIdentity, schemes: CodingSchemes = DEFAULT_SCHEMES
) -> tuple[Report, ...]:
    """Write what was found on one source instance as DICOM objects.

    Same arguments, same bytes: no clock, no chance. The UIDs derive from source, models, profile, configuration and installation.

    Parameters
    ----------
    source
        Data set of the source up to its pixel data, as pydicom reads it. May lack any attribute but the four UIDs; is not changed.
    analysis
        Outlines and masks in pixels of the stored image.
    context
        Frozen with the job. ``predecessors`` name the reports (by kind) that these replace.
    node
        The equipment named as the maker.
    schemes
        Designators of the private and of the ICD-11 coding scheme.

    Returns
    -------
    tuple of Report
        ``summary`` always, also when a gate refused the picture; ``findings`` when there are regions; ``segmentation`` when
        there is a mask. Each alone in a series of its own, within the source's study.

    Raises
    ------
    UnsupportedPixels
        A UID of the source is missing or invalid.
    ValueError
        A mask is not of its frame's size, or ``context.analysed_at`` has no UTC offset.

    References
    ----------
    DICOM PS3.16 TID 1500, 1410, 1501, 4019; PS3.3 A.35.13, A.51
    """
    taken = read_source(source)
    analysis = replace(analysis, frames=tuple(_reportable(frame) for frame in analysis.frames))
    basis = _basis(taken, analysis, context, node, schemes)
    instant = Instant.parse(context.analysed_at, offset=taken.offset)
    tracker = Tracker(taken.sop_instance_uid, multi_frame=taken.multi_frame)
    outlines = _outlines(analysis, tracker)

    def identity(kind: str) -> ObjectIdentity:
        return ObjectIdentity(derived_uid(kind, *basis), derived_uid(kind, *basis, "series"), instant, node, context.profile)

    def report(kind: str, sop_class_uid: str, of: ObjectIdentity, data_set: bytes) -> Report:
        return Report(
            kind=kind,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=of.sop_instance_uid,
            series_instance_uid=of.series_instance_uid,
            study_instance_uid=taken.study_instance_uid,
            transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN,
            data_set=data_set,
        )

    def structured(kind: str) -> Report:
        tree = ReportTree(source=taken, context=context, node=node, schemes=schemes, tracker=tracker)
        root = tree.summary(analysis) if kind == "summary" else tree.findings(analysis, outlines)
        of = identity(kind)
        data_set = document(
            kind,
            analysis,
            root,
            identity=of,
            source=taken,
            scheme_items=tree.scheme_identification(),
            predecessor=context.predecessors.get(kind),
        )
        return report(kind, COMPREHENSIVE_3D_SR, of, data_set)

    reports = [structured("summary")]
    if outlines:
        reports.append(structured("findings"))
    segments = _segments(analysis, outlines, tracker)
    if segments:
        of = identity("segmentation")
        reports.append(report("segmentation", SEGMENTATION_STORAGE, of, segmentation(segments, identity=of, source=taken, schemes=schemes)))
    return tuple(reports)
