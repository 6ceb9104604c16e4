"""The two Structured Reports of a source image: Comprehensive 3D SR, TID 1500 Imaging Measurement Report (PS3.16).

``summary``: one TID 1501 group a model output. ``findings``: one TID 1410 group a lesion. Two documents and not one, because readers and
validators apply TID 1410 to every group of a document that has one region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inference.records import Algorithm, Category, Code, FrameAnalysis, ImageAnalysis, ReportContext, ReportReference
from inference.report import codes, wording
from inference.report.codes import CodingSchemes
from inference.report.content import (
    CONTAINS,
    HAS_ACQ_CONTEXT,
    HAS_CONCEPT_MOD,
    HAS_OBS_CONTEXT,
    SELECTED_FROM,
    ContentItems,
    Item,
)
from inference.report.encode import Element, encode
from inference.report.header import Source
from inference.report.identity import NodeIdentity
from inference.report.modules import ObjectIdentity
from inference.report.tracking import Outline, Tracker
from inference.report.values import shortened

COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
TOP_CATEGORIES = 5


@dataclass(frozen=True, slots=True)
class _Measurement:
    name: Code
    value: float
    unit: Code


def _percent(name: Code, probability: float) -> _Measurement:
    return _Measurement(name, 100 * probability, codes.PERCENT)


class ReportTree:
    """Makes the content tree of one document about one source image."""

    def __init__(self, *, source: Source, context: ReportContext, node: NodeIdentity, schemes: CodingSchemes, tracker: Tracker) -> None:
        self._source = source
        self._context = context
        self._node = node
        self._tracker = tracker
        self._schemes = schemes
        self._items = ContentItems(schemes)

    # The frame around it: TID 1500 rows 1 to 5

    def _image(self, relationship: str, name: Code | None, frame: int | None, children: Sequence[Item] = ()) -> Item:
        return self._items.image(
            relationship,
            name,
            self._source.sop_class_uid,
            self._source.sop_instance_uid,
            frame=frame if self._source.multi_frame else None,
            children=children,
        )

    def _observer(self) -> list[Item]:
        """TID 1001 and 1004: a device observed this."""
        items = self._items
        return [
            items.code(HAS_OBS_CONTEXT, codes.OBSERVER_TYPE, codes.DEVICE),
            items.uid_reference(HAS_OBS_CONTEXT, codes.DEVICE_OBSERVER_UID, self._context.installation_uid),
            items.text(HAS_OBS_CONTEXT, codes.DEVICE_OBSERVER_NAME, self._node.model_name),
            items.text(HAS_OBS_CONTEXT, codes.DEVICE_OBSERVER_MANUFACTURER, self._node.manufacturer),
            items.text(HAS_OBS_CONTEXT, codes.DEVICE_OBSERVER_MODEL_NAME, self._node.model_name),
            items.text(HAS_OBS_CONTEXT, codes.DEVICE_OBSERVER_SERIAL_NUMBER, self._node.serial_number),
        ]

    def _library(self) -> Item:
        """TID 1600: the source image, its modality and size."""
        items = self._items
        entry = [items.code(HAS_ACQ_CONTEXT, codes.MODALITY, self._source.modality)]
        if self._source.rows and self._source.columns:
            entry += [
                items.number(HAS_ACQ_CONTEXT, codes.PIXEL_DATA_ROWS, self._source.rows, codes.PIXELS),
                items.number(HAS_ACQ_CONTEXT, codes.PIXEL_DATA_COLUMNS, self._source.columns, codes.PIXELS),
            ]
        image = self._image(CONTAINS, None, None, entry)
        return items.container(CONTAINS, codes.IMAGE_LIBRARY, [items.container(CONTAINS, codes.IMAGE_LIBRARY_GROUP, [image])])

    def _document(self, groups: list[Item], evaluations: list[Item]) -> Item:
        items = self._items
        children = [
            items.code(HAS_CONCEPT_MOD, codes.LANGUAGE, codes.ENGLISH),
            *self._observer(),
            items.code(HAS_CONCEPT_MOD, codes.PROCEDURE_REPORTED, codes.IMAGING_PROCEDURE),
            self._library(),
        ]
        if groups:
            children.append(items.container(CONTAINS, codes.IMAGING_MEASUREMENTS, groups))
        children.append(items.container(CONTAINS, codes.QUALITATIVE_EVALUATIONS, evaluations))
        return items.container(None, codes.IMAGING_MEASUREMENT_REPORT, children, template="1500")

    # Groups

    def _group_head(self, identifier: str, tracking_uid: str, finding: Code) -> list[Item]:
        items = self._items
        head = [
            items.text(HAS_OBS_CONTEXT, codes.TRACKING_IDENTIFIER, identifier),
            items.uid_reference(HAS_OBS_CONTEXT, codes.TRACKING_UNIQUE_IDENTIFIER, tracking_uid),
            items.code(CONTAINS, codes.FINDING, finding),
        ]
        if self._source.site is not None:
            side = self._source.laterality
            modifier = [items.code(HAS_CONCEPT_MOD, codes.LATERALITY, side)] if side is not None else []
            head.append(items.code(HAS_CONCEPT_MOD, codes.FINDING_SITE, self._source.site, modifier))
        return head

    def _algorithm(self, algorithm: Algorithm, extra: str) -> list[Item]:
        """TID 4019; the bundle's digest and the thresholds stand among the parameters, so that the result can be repeated."""
        items = self._items
        parameters = "; ".join(
            part for part in (extra, algorithm.parameters, f"sha256 {algorithm.digest}", f"profile {self._context.profile}") if part
        )
        return [
            items.text(HAS_CONCEPT_MOD, codes.ALGORITHM_NAME, algorithm.name),
            items.text(HAS_CONCEPT_MOD, codes.ALGORITHM_VERSION, algorithm.version),
            items.text(HAS_CONCEPT_MOD, codes.ALGORITHM_PARAMETERS, parameters),
            items.code(HAS_CONCEPT_MOD, codes.ALGORITHM_FAMILY, codes.ARTIFICIAL_INTELLIGENCE),
        ]

    def _numbers(self, measurements: Sequence[_Measurement]) -> list[Item]:
        return [self._items.number(CONTAINS, one.name, one.value, one.unit) for one in measurements]

    def _group(
        self,
        frame: FrameAnalysis,
        key: str,
        name: str,
        finding: Code,
        algorithm: Algorithm,
        measurements: Sequence[_Measurement],
        extra: str = "",
    ) -> Item:
        """TID 1501: measurements of the whole image (frame); `key` tells the group for ever, `name` for the eye."""
        tracked = self._tracker.track(frame.frame_number, algorithm, key, name)
        return self._items.container(
            CONTAINS,
            codes.MEASUREMENT_GROUP,
            [
                *self._group_head(tracked.identifier, tracked.uid, finding),
                *self._algorithm(algorithm, extra),
                *self._numbers(measurements),
                self._image(CONTAINS, codes.SOURCE_OF_MEASUREMENT, frame.frame_number),
            ],
            template="1501",
        )

    def _frame_groups(self, frame: FrameAnalysis) -> Iterator[Item]:
        if frame.quality is not None:
            quality = frame.quality
            yield self._group(
                frame,
                "quality",
                "quality",
                codes.IMAGE_QUALITY,
                quality.algorithm,
                [_Measurement(codes.IMAGE_QUALITY_RATING, quality.score, codes.PERCENT)],
                f"accept threshold {quality.threshold:g}",
            )
        if frame.domain is not None:
            domain = frame.domain
            yield self._group(
                frame,
                "domain",
                "domain",
                codes.IMAGE_DOMAIN,
                domain.algorithm,
                [_percent(codes.CERTAINTY_OF_FINDING, domain.confidence)],
                f"certainty that the image shows skin; threshold {domain.threshold:g}",
            )
        if frame.diagnosis is not None:
            for rank, category in enumerate(_top(frame), start=1):
                measurements = [_percent(codes.CERTAINTY_OF_FINDING, category.probability)]
                if rank == 1:
                    measurements.append(_Measurement(codes.ENTROPY, frame.diagnosis.entropy, codes.NO_UNITS))
                yield self._group(
                    frame, f"diagnosis/{category.key}", f"diagnosis-{rank}", category.code, frame.diagnosis.algorithm, measurements
                )
        for indicator in frame.indicators:
            finding, concept = codes.indicator_codes(indicator.key)
            yield self._group(
                frame,
                indicator.key,
                indicator.key.replace("_", "-"),
                finding,
                indicator.algorithm,
                [_percent(concept, indicator.probability)],
                f"threshold {indicator.threshold:g}",
            )
        if frame.segmentation is not None:
            yield self._group(
                frame,
                "count",
                "lesion-count",
                codes.SKIN_LESION,
                frame.segmentation.algorithm,
                [_Measurement(codes.NUMBER_OF_LESIONS, len(frame.segmentation.lesions), codes.LESIONS)],
            )

    def _lesion(self, outline: Outline) -> Item:
        """TID 1410: one region, its outline and measurements."""
        items = self._items
        lesion = outline.lesion
        measurements = [
            _Measurement(codes.AREA_PIXELS, lesion.area_pixels, codes.PIXELS),
            _Measurement(codes.AREA_SHARE, lesion.area_percent, codes.PERCENT),
        ]
        if lesion.area_mm2 is not None:
            measurements.append(_Measurement(codes.AREA, lesion.area_mm2, codes.SQUARE_MILLIMETRE))
        measurements.append(_percent(codes.CERTAINTY_OF_FINDING, lesion.certainty))
        region = items.polyline(
            CONTAINS, codes.IMAGE_REGION, outline.lesion.polygon, self._image(SELECTED_FROM, codes.SOURCE, outline.frame_number)
        )
        return items.container(
            CONTAINS,
            codes.MEASUREMENT_GROUP,
            [
                *self._group_head(outline.tracked.identifier, outline.tracked.uid, codes.SKIN_LESION),
                region,
                *self._algorithm(outline.algorithm, ""),
                *self._numbers(measurements),
            ],
            template="1410",
        )

    # Evaluations

    def _verdicts(self, frames: Sequence[FrameAnalysis]) -> Iterator[Item]:
        """Coded conclusions about the instance: of several frames, one that is usable, skin, or suspicious is enough."""
        items = self._items
        qualities = [frame.quality for frame in frames if frame.quality is not None]
        if qualities:
            usable = any(quality.acceptable for quality in qualities)
            yield items.code(CONTAINS, codes.QUALITY_ASSESSMENT, codes.USABLE if usable else codes.UNUSABLE)
        domains = [frame.domain for frame in frames if frame.domain is not None]
        if domains:
            seen = {domain.modality for domain in domains if domain.dermatological}
            if not seen:
                yield items.code(CONTAINS, codes.IMAGE_DOMAIN, codes.NOT_DERMATOLOGICAL)
            else:
                values = {codes.DOMAINS.get(modality or "", codes.DERMATOLOGICAL) for modality in seen}
                for value in sorted(values, key=lambda code: code.value):
                    yield items.code(CONTAINS, codes.IMAGE_DOMAIN, value)
        for key, concept in codes.SUSPICION.items():
            answers = [indicator.positive for frame in frames for indicator in frame.indicators if indicator.key == key]
            if answers:
                yield items.code(CONTAINS, concept, codes.YES if any(answers) else codes.NO)

    def _lines(self, frames: Sequence[FrameAnalysis]) -> Iterator[Item]:
        for frame in frames:
            sentence = wording.conclusion(frame)
            yield self._items.text(
                CONTAINS, codes.CONCLUSION, f"Frame {frame.frame_number}: {sentence}" if self._source.multi_frame else sentence
            )

    def _disclaimer(self) -> Item:
        """First of all conclusions: many viewers show the beginning of a list, or of a line."""
        return self._items.text(CONTAINS, codes.COMMENT, wording.DISCLAIMER)

    def _remarks(self, analysis: ImageAnalysis) -> Iterator[Item]:
        for line in wording.failures(analysis):
            yield self._items.text(CONTAINS, codes.COMMENT, line)
        if self._source.notes:
            yield self._items.text(CONTAINS, codes.COMMENT, f"Left empty, not valid in the source: {', '.join(self._source.notes)}")

    def _full_titles(self, frames: Sequence[FrameAnalysis]) -> Iterator[Item]:
        """Titles that a Code Meaning (64 characters) had to cut."""
        long = {category.code for frame in frames for category in _top(frame) if shortened(category.code.meaning) != category.code.meaning}
        for code in sorted(long, key=lambda code: (code.value, code.meaning)):
            yield self._items.text(CONTAINS, codes.COMMENT, f"{code.value}: {code.meaning}")

    def summary(self, analysis: ImageAnalysis) -> Item:
        """Tree of the summary document: gates, diagnoses, indicators, conclusions."""
        groups = [group for frame in analysis.frames for group in self._frame_groups(frame)]
        evaluations = [
            self._disclaimer(),
            *self._verdicts(analysis.frames),
            *self._lines(analysis.frames),
            *self._full_titles(analysis.frames),
            *self._remarks(analysis),
        ]
        return self._document(groups, evaluations)

    def findings(self, analysis: ImageAnalysis, outlines: Sequence[Outline]) -> Item:
        """Tree of the findings document: one group a region."""
        count = len(outlines)
        sentence = f"{count} skin lesion outlined." if count == 1 else f"{count} skin lesions outlined."
        evaluations = [self._disclaimer(), self._items.text(CONTAINS, codes.CONCLUSION, sentence), *self._remarks(analysis)]
        return self._document([self._lesion(outline) for outline in outlines], evaluations)

    def scheme_identification(self) -> list[list[Element]]:
        """Items of the Coding Scheme Identification Sequence for what the tree has used."""
        return self._schemes.identification(self._items.designators)


def _top(frame: FrameAnalysis) -> tuple[Category, ...]:
    return frame.diagnosis.categories[:TOP_CATEGORIES] if frame.diagnosis is not None else ()


def document(
    kind: str,
    analysis: ImageAnalysis,
    tree: Item,
    *,
    identity: ObjectIdentity,
    source: Source,
    scheme_items: list[list[Element]],
    predecessor: ReportReference | None,
) -> bytes:
    """Encode one SR document: modules of PS3.3 Table A.35.13-1 around a content tree."""
    missing = wording.completion_description(analysis)
    elements = [
        *identity.elements(COMPREHENSIVE_3D_SR, "SR", kind, source),
        (0x00081111, "SQ", ()),  # Referenced Performed Procedure Step
        (0x0040A372, "SQ", ()),  # Performed Procedure Code
        (0x0040A491, "CS", "PARTIAL" if missing else "COMPLETE"),
        (0x0040A493, "CS", "UNVERIFIED"),  # verifying takes a person
        (0x0040A496, "CS", "PRELIMINARY"),
        (
            0x0040A375,
            "SQ",
            (_hierarchy(source.study_instance_uid, source.series_instance_uid, source.sop_class_uid, source.sop_instance_uid),),
        ),
        *tree,
    ]
    if scheme_items:
        elements.append((0x00080110, "SQ", scheme_items))
    if missing:
        elements.append((0x0040A492, "LO", shortened(missing)))
    if predecessor is not None and predecessor.sop_instance_uid != identity.sop_instance_uid:
        before = predecessor
        elements.append(
            (
                0x0040A360,
                "SQ",
                (_hierarchy(before.study_instance_uid, before.series_instance_uid, before.sop_class_uid, before.sop_instance_uid),),
            )
        )
    return encode(elements)


def _hierarchy(study_instance_uid: str, series_instance_uid: str, sop_class_uid: str, sop_instance_uid: str) -> list[Element]:
    """Item of a Hierarchical SOP Instance Reference (PS3.3 Table C.17-3)."""
    reference: list[Element] = [(0x00081150, "UI", sop_class_uid), (0x00081155, "UI", sop_instance_uid)]
    series: list[Element] = [(0x0020000E, "UI", series_instance_uid), (0x00081199, "SQ", (reference,))]
    return [(0x0020000D, "UI", study_instance_uid), (0x00081115, "SQ", (series,))]
