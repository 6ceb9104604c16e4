"""Reports: read back by highdicom and pydicom, values, geometry, identity, determinism (report.md sections 2 to 6, 9, 11)."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import highdicom
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as PydicomCode

from inference.errors import UnsupportedPixels
from inference.records import (
    Algorithm,
    Category,
    Code,
    Diagnosis,
    Failure,
    FrameAnalysis,
    ImageAnalysis,
    Lesion,
    Report,
    ReportReference,
    Segmentation,
)
from inference.report import CodingSchemes, build_reports
from tests.inference import report_drawing as draw

CERTAINTY = PydicomCode("111012", "DCM", "Certainty of Finding")


def built(analysis: ImageAnalysis | None = None, source: Dataset | None = None, **context: object) -> dict[str, Report]:
    """Build, by kind."""
    reports = build_reports(source or draw.source(), analysis or draw.analysis(), draw.context(**context), node=draw.NODE)
    return {report.kind: report for report in reports}


def read(report: Report) -> Dataset:
    """Read as any reader does."""
    return pydicom.dcmread(draw.part10(report))


def sr(report: Report) -> highdicom.sr.MeasurementReport:
    """Read as a TID 1500 report."""
    return highdicom.sr.srread(draw.part10(report)).content


def children(item: Dataset, meaning: str) -> list[Dataset]:
    """Content items directly below one, by the meaning of their concept name."""
    return [
        child
        for child in item.get("ContentSequence", [])
        if "ConceptNameCodeSequence" in child and child.ConceptNameCodeSequence[0].CodeMeaning == meaning
    ]


def items(ds: Dataset) -> list[Dataset]:
    """All content items of a document, depth first."""
    found = []
    for child in ds.get("ContentSequence", []):
        found += [child, *items(child)]
    return found


def groups(ds: Dataset) -> list[Dataset]:
    """The measurement groups of a document."""
    return [item for item in items(ds) if children(item, "Tracking Identifier")]


def texts(ds: Dataset) -> list[str]:
    """Text of the evaluations."""
    return [item.TextValue for item in children(ds, "Qualitative Evaluations")[0].ContentSequence if item.ValueType == "TEXT"]


def evaluations(ds: Dataset) -> dict[str, str]:
    """Coded evaluations: meaning of the concept, meaning of the value."""
    found = children(ds, "Qualitative Evaluations")[0].ContentSequence
    return {
        item.ConceptNameCodeSequence[0].CodeMeaning: item.ConceptCodeSequence[0].CodeMeaning for item in found if item.ValueType == "CODE"
    }


def number(group: Dataset, meaning: str) -> float:
    """Value of a group's NUM."""
    return float(children(group, meaning)[0].MeasuredValueSequence[0].NumericValue)


def finding(group: Dataset) -> str:
    """Code value of a group's finding."""
    return str(children(group, "Finding")[0].ConceptCodeSequence[0].CodeValue)


SOURCES = {
    "vl": draw.source(),
    "dms": draw.source(draw.DERMOSCOPIC),
    "sc": draw.source(draw.SECONDARY_CAPTURE),
    "bare": draw.source(draw.SECONDARY_CAPTURE, bare=True),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_summary_says_what_was_predicted(source: Dataset) -> None:
    """Every number of the analysis stands in the summary, to 1e-4, under its code, with its algorithm and its image."""
    content = sr(built(source=source)["summary"])
    found = {}
    for group in content.get_image_measurement_groups():
        for measurement in group.get_measurements():
            found[group.tracking_identifier, measurement.name.meaning] = measurement.value
        assert group.source_images[0].referenced_sop_instance_uid == source.SOPInstanceUID
        algorithm = group.finding_type
        assert algorithm is not None
    expected = {
        ("quality", "Image Quality Rating"): 72.5,
        ("domain", "Certainty of Finding"): 98.765,
        ("diagnosis-1", "Certainty of Finding"): 81.2345,
        ("diagnosis-1", "Entropy of the distribution, normalised"): 0.5512,
        ("diagnosis-2", "Certainty of Finding"): 10.0,
        ("diagnosis-3", "Certainty of Finding"): 8.7655,
        ("malignancy", "Probability of cancer"): 10.0,
        ("urgent-referral", "Referral probability"): 31.0,
        ("high-priority-referral", "Referral probability"): 10.0,
        ("pigmented-lesion", "Certainty of Finding"): 91.2345,
        ("dermatological-condition", "Certainty of Finding"): 100.0,
        ("lesion-count", "Number of lesions"): 2,
    }
    assert found == pytest.approx(expected, abs=1e-4)


def test_summary_concludes_for_people_and_machines() -> None:
    """Coded evaluations and one sentence say the same; the line about AI is in every document."""
    reports = built()
    summary = read(reports["summary"])
    assert evaluations(summary) == {
        "Quality Assessment": "Usable - Meets the quality control standard",
        "Image domain": "Dermoscopic image of the skin",
        "Suspicion of malignancy": "No",
        "Urgent referral suggested": "Yes",
        "High-priority referral suggested": "No",
    }
    assert texts(summary)[1] == (
        "Most likely: melanocytic naevus 81.2 %; malignancy 10.0 %, below the threshold (20 %); "
        "urgent referral 31.0 %, above the threshold (30 %); high-priority referral 10.0 %, below the threshold (30 %); 2 lesions outlined."
    )
    for kind in ("summary", "findings"):
        assert texts(read(reports[kind]))[0] == "Not for clinical use: reference models. AI result, not verified by a clinician."


def test_every_group_names_model_and_thresholds() -> None:
    """TID 4019 with version, digest and threshold in every group, so that the result can be repeated."""
    reports = built()
    for kind in ("summary", "findings"):
        for group in groups(read(reports[kind])):
            assert children(group, "Algorithm Name")[0].TextValue
            assert children(group, "Algorithm Version")[0].TextValue == "1.2.0"
            assert children(group, "Algorithm Family")[0].ConceptCodeSequence[0].CodeValue == "123110"
            assert f"sha256 {'0' * 50}" in children(group, "Algorithm Parameters")[0].TextValue
    parameters = {
        children(group, "Tracking Identifier")[0].TextValue: children(group, "Algorithm Parameters")[0].TextValue
        for group in groups(read(reports["summary"]))
    }
    assert parameters["quality"].startswith("accept threshold 41; ")
    assert "threshold 0.5" in parameters["domain"]
    assert parameters["urgent-referral"].startswith("threshold 0.3; ")


def test_findings_give_outline_area_and_certainty() -> None:
    """One TID 1410 group a lesion; outline, areas and certainty equal the analysis."""
    analysis = draw.analysis()
    content = sr(built(analysis)["findings"])
    assert analysis.frames[0].segmentation is not None
    lesions = analysis.frames[0].segmentation.lesions
    found = content.get_planar_roi_measurement_groups()
    assert [group.tracking_identifier for group in found] == ["lesion-1", "lesion-2"]
    for group, lesion in zip(found, lesions, strict=True):
        assert group.finding_type.value == "95324001"
        np.testing.assert_allclose(group.roi.value, lesion.polygon, atol=1e-4)
        values = {(measurement.name.meaning, measurement.unit.value): measurement.value for measurement in group.get_measurements()}
        assert values == pytest.approx(
            {
                ("Area in pixels", "{pixels}"): lesion.area_pixels,
                ("Area as share of the image", "%"): lesion.area_percent,
                ("Area", "mm2"): lesion.area_mm2,
                ("Certainty of Finding", "%"): 91,
            },
            abs=1e-4,
        )


def test_no_scale_no_square_millimetres() -> None:
    """Without Pixel Spacing no mm2 is written: a scale is never invented."""
    analysis = draw.analysis()
    part = analysis.frames[0].segmentation
    assert part is not None
    lesions = tuple(replace(lesion, area_mm2=None) for lesion in part.lesions)
    analysis = draw.analysis(replace(analysis.frames[0], segmentation=replace(part, lesions=lesions)))
    assert all(not children(group, "Area") for group in groups(read(built(analysis)["findings"])))


def test_masks_come_back_equal() -> None:
    """Read by highdicom: one segment a lesion; each equals its disc, together they are the mask; tracking equals the findings'."""
    analysis = draw.analysis()
    reports = built(analysis)
    segmentation = highdicom.seg.segread(draw.part10(reports["segmentation"]))
    uid = draw.source().SOPInstanceUID
    pixels = segmentation.get_pixels_by_source_instance([uid])[0]
    np.testing.assert_array_equal(pixels[..., 0], draw.disc(120, 160, 40, 50, 25))
    np.testing.assert_array_equal(pixels[..., 1], draw.disc(120, 160, 90, 120, 12))
    tracked = {group.tracking_identifier: str(group.tracking_uid) for group in sr(reports["findings"]).get_planar_roi_measurement_groups()}
    assert dict(segmentation.get_tracking_ids()) == tracked
    description = segmentation.get_segment_description(1)
    assert (description.segmented_property_type.value, description.segmented_property_category.value) == ("95324001", "49755003")
    assert description.algorithm_type.value == "AUTOMATIC"


def test_odd_sizes_are_packed_without_gaps() -> None:
    """Frames of a size that is no multiple of 8 follow each other bit by bit (PS3.5 Section 8.1.1)."""
    frames = [draw.frame(1, discs=[(8, 6, 4), (3, 14, 2.5)], rows=13, columns=19), draw.frame(2, discs=[(6, 6, 5)], rows=13, columns=19)]
    source = draw.source(draw.MULTI_FRAME_TRUE_COLOUR, rows=13, columns=19, frames=2)
    report = built(draw.analysis(*frames), source)["segmentation"]
    segmentation = highdicom.seg.segread(draw.part10(report))
    pixels = segmentation.get_pixels_by_source_frame(source.SOPInstanceUID, [1, 2], assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(pixels[0, ..., 0], draw.disc(13, 19, 8, 6, 4))
    np.testing.assert_array_equal(pixels[0, ..., 1], draw.disc(13, 19, 3, 14, 2.5))
    np.testing.assert_array_equal(pixels[1, ..., 2], draw.disc(13, 19, 6, 6, 5))
    assert int(pixels.sum()) == sum(int(frame.segmentation.mask.sum()) for frame in frames if frame.segmentation is not None)


def test_a_lesion_keeps_all_its_pieces() -> None:
    """A speck outside every outline goes to the nearest lesion, so that the segments together are the mask."""
    part = draw.segmentation([(40, 50, 25), (90, 120, 12)])
    mask = part.mask.copy()
    mask[110:112, 140:143] = True
    frame = replace(draw.frame(discs=[]), segmentation=replace(part, mask=mask))
    segmentation = highdicom.seg.segread(draw.part10(built(draw.analysis(frame))["segmentation"]))
    pixels = segmentation.get_pixels_by_source_instance([draw.source().SOPInstanceUID])[0]
    np.testing.assert_array_equal(pixels[..., 0], draw.disc(120, 160, 40, 50, 25))
    np.testing.assert_array_equal(pixels.any(axis=-1), mask)


def test_the_outline_decides_before_the_distance() -> None:
    """A piece inside a large outline is the large lesion's, even when a small lesion's outline is nearer."""
    mask = np.zeros((120, 160), dtype=bool)
    mask[50:53, 50:53] = mask[60:64, 54:58] = True
    lesions = []
    for key, left, top, right, bottom in (("large", 0, 0, 150, 56), ("small", 54, 60, 58, 64)):
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        lesions.append(Lesion(key, np.array(corners, dtype=np.float32), 9, 0.1, None, 0.9))
    part = Segmentation(mask, tuple(lesions), draw.algorithm())
    report = built(draw.analysis(replace(draw.frame(), segmentation=part)))["segmentation"]
    pixels = highdicom.seg.segread(draw.part10(report)).get_pixels_by_source_instance([draw.source().SOPInstanceUID])[0]
    assert pixels[51, 51].tolist() == [1, 0]


def test_a_key_that_comes_twice_is_told_apart() -> None:
    """Two categories under one key get two tracking UIDs: viewers merge groups that share one."""
    frame = draw.frame()
    assert frame.diagnosis is not None
    twice = replace(frame.diagnosis, categories=(frame.diagnosis.categories[0], frame.diagnosis.categories[0]))
    found = groups(read(built(draw.analysis(replace(frame, diagnosis=twice)))["summary"]))
    uids = [children(group, "Tracking Unique Identifier")[0].UID for group in found]
    assert len(set(uids)) == len(uids) == 9


@pytest.mark.parametrize(("count", "segments"), [(0, 0), (1, 1), (5, 5), (21, 1), (300, 1)])
def test_any_number_of_lesions(count: int, segments: int) -> None:
    """0, 1, 5, 300 lesions: as many groups; up to 20 segments, beyond that one for all, equal to the mask."""
    discs = [(6.0 + 12 * (number // 20), 6.0 + 12 * (number % 20), 4.0) for number in range(count)]
    frame = draw.frame(discs=discs, rows=200, columns=250)
    reports = built(draw.analysis(frame), draw.source(rows=200, columns=250))
    assert number(groups(read(reports["summary"]))[-1], "Number of lesions") == count
    assert ("findings" in reports, "segmentation" in reports) == (count > 0, count > 0)
    if count:
        assert len(groups(read(reports["findings"]))) == count
        segmentation = highdicom.seg.segread(draw.part10(reports["segmentation"]))
        assert segmentation.number_of_segments == segments
        assert frame.segmentation is not None
        np.testing.assert_array_equal(segmentation.pixel_array.reshape(-1, 200, 250).any(axis=0), frame.segmentation.mask)


def polygon(points: list[tuple[float, float]]) -> Lesion:
    """Make a lesion of a polygon."""
    return Lesion("lesion-1", np.array(points, dtype=np.float32).reshape(-1, 2), 1.0, 1.0, None, 0.5)


def outlined(*lesions: Lesion) -> dict[str, Report]:
    """Build a report of such lesions, with a mask of one pixel."""
    mask = np.zeros((120, 160), dtype=bool)
    mask[5, 5] = True
    return built(draw.analysis(replace(draw.frame(), segmentation=Segmentation(mask, lesions, draw.algorithm("lesion-segmenter")))))


@pytest.mark.parametrize(
    "points", [[], [(1, 1)], [(1, 1), (5, 5), (1, 1)], [(1, 1), (9, 1), (5, 1), (1, 1)], [(200, 5), (300, 9), (250, 80)]]
)
def test_regions_without_area_are_dropped(points: list[tuple[float, float]]) -> None:
    """No findings for what encloses nothing, be it a line, a point, or all outside the image."""
    reports = outlined(polygon(points))
    assert "findings" not in reports
    assert number(groups(read(reports["summary"]))[-1], "Number of lesions") == 0


def test_outline_on_the_border_and_open() -> None:
    """A polygon that leaves the image is clamped to its edges, an open one is closed."""
    report = outlined(polygon([(-4, -4), (170, -4), (170, 130), (-4, 130)]))["findings"]
    graphic = sr(report).get_planar_roi_measurement_groups()[0].roi.value
    np.testing.assert_array_equal(graphic, [[0, 0], [160, 0], [160, 120], [0, 120], [0, 0]])


def test_long_outlines_are_thinned() -> None:
    """A ring of 20000 vertices keeps at most 300 and stays within half a pixel of itself."""
    report = outlined(Lesion("lesion-1", draw.ring(60, 80, 50, 20000), 1, 1, None, 0.5))["findings"]
    points = sr(report).get_planar_roi_measurement_groups()[0].roi.value
    assert 20 < len(points) <= 300
    middles = (points[1:] + points[:-1]) / 2
    assert np.abs(np.hypot(middles[:, 0] - 80, middles[:, 1] - 60) - 50).max() < 0.5


@pytest.mark.parametrize(
    ("quality", "domain", "sentence", "evaluation"),
    [
        (False, True, "Not analysed: image quality 12 of 100 (bad), below the accept threshold 41.", ("Quality Assessment", "Unusable")),
        (True, False, "Not analysed: not recognised as skin (certainty 3.1 %, threshold 50 %).", ("Image domain", "Not dermatological")),
    ],
)
def test_refusal_is_a_result(quality: bool, domain: bool, sentence: str, evaluation: tuple[str, str]) -> None:
    """A shut gate gives a complete summary with both gate groups and no disease group, even if a caller hands clinical parts over."""
    frame = replace(
        draw.frame(discs=[(40, 50, 25)]),
        quality=draw.quality(72.5 if quality else 12, acceptable=quality),
        domain=draw.domain(dermatological=domain, confidence=0.9 if domain else 0.031),
    )
    reports = built(draw.analysis(frame))
    assert list(reports) == ["summary"]
    ds = read(reports["summary"])
    assert [finding(group) for group in groups(ds)] == ["image-quality", "image-domain"]
    assert ds.CompletionFlag == "COMPLETE"
    assert texts(ds)[1] == sentence
    assert evaluations(ds)[evaluation[0]].startswith(evaluation[1])
    assert set(evaluations(ds)) == {"Quality Assessment", "Image domain"}


def test_a_failed_item_makes_the_report_partial() -> None:
    """PARTIAL, a description of at most 64 characters, and the reason in words."""
    frame = replace(draw.frame(), diagnosis=None, indicators=(), failures=(Failure("diagnosis", "the bundle is damaged"),))
    ds = read(built(draw.analysis(frame))["summary"])
    assert (ds.CompletionFlag, ds.CompletionFlagDescription) == ("PARTIAL", "Not computed: diagnosis")
    assert "Not computed: diagnosis: the bundle is damaged" in texts(ds)
    many = replace(frame, failures=tuple(Failure(f"a long name of an item {n}", "because") for n in range(9)))
    assert len(read(built(draw.analysis(many))["summary"]).CompletionFlagDescription) <= 64


def test_nothing_computed_is_still_a_report() -> None:
    """Without gates and without groups the summary says so; highdicom does not read a report without measurements, pydicom does."""
    analysis = ImageAnalysis((FrameAnalysis(1, 120, 160),), 1, (Failure("quality", "no bundle"),))
    ds = read(built(analysis)["summary"])
    assert texts(ds)[1] == "Not analysed: image quality could not be determined; image domain could not be determined."
    assert ds.CompletionFlag == "PARTIAL"


def test_frames_are_told_apart() -> None:
    """Groups of a multi-frame source name their frame, in the identifier and in the reference; what was cut off is said."""
    source = draw.source(draw.MULTI_FRAME_TRUE_COLOUR, frames=5)
    analysis = draw.analysis(draw.frame(1, discs=[(40, 50, 25)]), draw.frame(3, discs=[(40, 60, 20), (90, 120, 12)]), count=5)
    reports = built(analysis, source)
    summary, findings = read(reports["summary"]), read(reports["findings"])
    for group in groups(summary):
        frame = int(children(group, "Tracking Identifier")[0].TextValue.split("/")[0].removeprefix("frame-"))
        assert children(group, "Source of Measurement")[0].ReferencedSOPSequence[0].ReferencedFrameNumber == frame
    regions = [group.roi for group in sr(reports["findings"]).get_planar_roi_measurement_groups()]
    assert [roi.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber for roi in regions] == [1, 3, 3]
    assert (findings.CompletionFlag, findings.CompletionFlagDescription) == ("PARTIAL", "2 of 5 frames analysed")
    assert texts(summary)[1].startswith("Frame 1: Most likely")
    segmentation = highdicom.seg.segread(draw.part10(reports["segmentation"]))
    pixels = segmentation.get_pixels_by_source_frame(source.SOPInstanceUID, [1, 2, 3], assert_missing_frames_are_empty=True).any(axis=-1)
    np.testing.assert_array_equal(pixels[0], draw.disc(120, 160, 40, 50, 25))
    assert not pixels[1].any()
    np.testing.assert_array_equal(pixels[2], draw.disc(120, 160, 40, 60, 20) | draw.disc(120, 160, 90, 120, 12))


def test_header() -> None:
    """Patient and study of the source, own series, flags, evidence, equipment, frozen time, schemes."""
    source = draw.source()
    reports = built(source=source)
    assert len({report.series_instance_uid for report in reports.values()}) == 3
    for report in reports.values():
        ds = read(report)
        for keyword in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "StudyID",
            "AccessionNumber",
        ):
            assert ds[keyword].value == source[keyword].value
        assert ds.StudyInstanceUID == source.StudyInstanceUID == report.study_instance_uid
        assert (ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.SOPClassUID) == (
            report.sop_instance_uid,
            report.series_instance_uid,
            report.sop_class_uid,
        )
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert (ds.ContentDate, ds.ContentTime, ds.TimezoneOffsetFromUTC) == ("20260304", "050607.250000", "+0100")
        assert (ds.Manufacturer, ds.ManufacturerModelName) == ("Derm Node makers", "dicom-node")
        assert (ds.SoftwareVersions, ds.DeviceSerialNumber) == ("0.1.0", "inst-1")
        assert ds.Modality == ("SEG" if report.kind == "segmentation" else "SR")
        assert "PixelSpacing" not in ds
        assert report.transfer_syntax_uid == "1.2.840.10008.1.2.1"
    ds = read(reports["summary"])
    assert (ds.CompletionFlag, ds.PreliminaryFlag, ds.VerificationFlag) == ("COMPLETE", "PRELIMINARY", "UNVERIFIED")
    evidence = ds.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == source.StudyInstanceUID
    assert evidence.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    schemes = {item.CodingSchemeDesignator: item for item in ds.CodingSchemeIdentificationSequence}
    assert set(schemes) == {"99DERMNODE", "99ICD11"}
    assert schemes["99ICD11"].CodingSchemeUID == "2.16.840.1.113883.6.347"
    assert ds.SeriesDescription == "AI, not for clinical use: dermatology summary"


def test_site_and_side() -> None:
    """Finding Site from Anatomic Region Sequence, side from Image Laterality; a retired SNOMED code in its current form; none: no site."""
    group = groups(read(built()["summary"]))[0]
    site = children(group, "Finding Site")[0]
    assert site.ConceptCodeSequence[0].CodeValue == "14975008"
    assert children(site, "Laterality")[0].ConceptCodeSequence[0].CodeMeaning == "Left"
    source = draw.source()
    del source.ImageLaterality
    region = source.AnatomicRegionSequence[0]
    region.CodeValue, region.CodingSchemeDesignator = "T-D8500", "SRT"
    side = Dataset()
    side.CodeValue, side.CodingSchemeDesignator, side.CodeMeaning = "24028007", "SCT", "Right"
    region.AnatomicRegionModifierSequence = [side]
    site = children(groups(read(built(source=source)["summary"]))[0], "Finding Site")[0]
    assert (site.ConceptCodeSequence[0].CodeValue, site.ConceptCodeSequence[0].CodingSchemeDesignator) == ("14975008", "SCT")
    assert children(site, "Laterality")[0].ConceptCodeSequence[0].CodeMeaning == "Right"
    bare = draw.source(bare=True)
    assert not children(groups(read(built(source=bare)["summary"]))[0], "Finding Site")


def test_same_input_same_bytes() -> None:
    """Again, from a data set as raw as the archive's, and in another process with another hash seed: the same bytes."""
    first = built()
    assert {kind: report.data_set for kind, report in built().items()} == {kind: report.data_set for kind, report in first.items()}
    assert [report.data_set for report in built(source=draw.reread(draw.source())).values()] == [
        report.data_set for report in first.values()
    ]
    script = (
        "from hashlib import sha256; from tests.inference import report_drawing as draw; from inference.report import build_reports; "
        "print(*(sha256(r.data_set).hexdigest() for r in build_reports(draw.source(), draw.analysis(), draw.context(), node=draw.NODE)))"
    )
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed})
        assert done.stdout.split() == [sha256(report.data_set).hexdigest() for report in first.values()]


def test_identity_follows_what_decides_the_content() -> None:
    """Another bundle version, configuration, profile, installation or failure: other UIDs; only another moment: the same."""
    base = built()
    uids = {report.sop_instance_uid for report in base.values()} | {report.series_instance_uid for report in base.values()}
    assert len(uids) == 6
    assert all(uid.startswith("2.25.") and len(uid) <= 44 for uid in uids)
    assert built(analysed_at="2027-01-01T00:00:00+00:00")["summary"].sop_instance_uid == base["summary"].sop_instance_uid
    frame = draw.frame(discs=[(40, 50, 25), (90, 120, 12)])
    assert frame.diagnosis is not None
    newer = replace(frame, diagnosis=replace(frame.diagnosis, algorithm=draw.algorithm(version="1.3.0")))
    others = [
        built(configuration_digest="d" * 64),
        built(profile="other"),
        built(installation_uid="2.25.1"),
        built(draw.analysis(newer)),
        built(draw.analysis(replace(frame, failures=(Failure("x", "y"),)))),
    ]
    for other in others:
        assert not uids & {report.sop_instance_uid for report in other.values()}


def test_predecessor() -> None:
    """A report that replaces an earlier one names it; one that is the earlier one itself does not."""
    before = ReportReference("1.2.826.0.1.3680043.10.99.1", "2.25.11", "1.2.840.10008.5.1.4.1.1.88.34", "2.25.12")
    reports = built(predecessors={"summary": before})
    item = read(reports["summary"]).PredecessorDocumentsSequence[0]
    assert item.StudyInstanceUID == before.study_instance_uid
    assert item.ReferencedSeriesSequence[0].SeriesInstanceUID == "2.25.11"
    assert item.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "2.25.12"
    assert "PredecessorDocumentsSequence" not in read(reports["findings"])
    itself = replace(before, sop_instance_uid=reports["summary"].sop_instance_uid)
    assert built(predecessors={"summary": itself})["summary"].data_set == built()["summary"].data_set


def test_codes_long_and_strange() -> None:
    """More than 16 characters: Long Code Value; a URI: URN Code Value; more than 64 of meaning: cut at a word, the whole in a text."""
    title = "Malignant neoplasm of the skin, of a kind that has a title which no attribute of sixty-four characters could ever hold"
    categories = (
        Category("a", Code("2C30&XH4846&XA1234&XT8W", "99ICD11", title), 0.5),
        Category("b", Code("urn:oid:2.16.840.1.113883.6.347", "99ICD11", "By name"), 0.3),
        Category("c", Code("X-1", "99OTHER", "Foreign"), 0.2),
    )
    frame = replace(draw.frame(), diagnosis=Diagnosis(categories, 0.9, draw.algorithm()), indicators=())
    schemes = CodingSchemes(private_designator="99CLINIC", icd11_designator="99ICD", icd11_version="2024-01")
    report = build_reports(draw.source(), draw.analysis(frame), draw.context(), node=draw.NODE, schemes=schemes)[0]
    ds = read(report)
    found = [children(group, "Finding")[0].ConceptCodeSequence[0] for group in groups(ds)[2:5]]
    assert found[0].LongCodeValue == "2C30&XH4846&XA1234&XT8W"
    assert "CodeValue" not in found[0]
    assert found[0].CodingSchemeDesignator == "99ICD"
    assert title.startswith(found[0].CodeMeaning)
    assert len(found[0].CodeMeaning) <= 64
    assert title[len(found[0].CodeMeaning)] in " ,"
    assert found[1].URNCodeValue == "urn:oid:2.16.840.1.113883.6.347"
    assert f"2C30&XH4846&XA1234&XT8W: {title}" in texts(ds)
    assert {item.CodingSchemeDesignator for item in ds.CodingSchemeIdentificationSequence} == {"99CLINIC", "99ICD", "99OTHER"}
    assert groups(ds)[0] is not None
    assert children(groups(ds)[0], "Finding")[0].ConceptCodeSequence[0].CodingSchemeDesignator == "99CLINIC"


def test_designators_are_checked() -> None:
    """A private designator that does not begin with 99 or is too long is refused when the schemes are made."""
    for wrong in ("DERMNODE", "99", "99ABCDEFGHIJKLMNO", "99lower"):
        with pytest.raises(ValueError, match="begins with 99"):
            CodingSchemes(private_designator=wrong)


def test_not_a_number_is_said() -> None:
    """A NaN or infinity of a model becomes a missing value with its qualifier, never an invalid DS."""
    frame = replace(draw.frame(), quality=draw.quality(math.nan), domain=draw.domain(confidence=math.inf))
    for group, name in zip(
        groups(read(built(draw.analysis(frame))["summary"]))[:2], ("Image Quality Rating", "Certainty of Finding"), strict=True
    ):
        item = children(group, name)[0]
        assert len(item.MeasuredValueSequence) == 0
        assert item.NumericValueQualifierCodeSequence[0].CodeValue == "114000"


def test_wrong_calls_are_refused() -> None:
    """A mask of another size, a moment without an offset, a source without UIDs: an error that names the cause."""
    frame = draw.frame(discs=[(40, 50, 25)])
    with pytest.raises(ValueError, match="size it back"):
        built(draw.analysis(replace(frame, rows=60)))
    with pytest.raises(ValueError, match="no UTC offset"):
        built(analysed_at="2026-03-04T05:06:07")
    source = draw.source()
    del source.StudyInstanceUID
    with pytest.raises(UnsupportedPixels, match="StudyInstanceUID"):
        built(source=source)


def test_offset_of_the_source_rules() -> None:
    """All times of a data set share one offset: ours are expressed in the source's, as its Study Time is copied."""
    source = draw.source()
    source.TimezoneOffsetFromUTC = "-0930"
    ds = read(built(source=source)["summary"])
    assert (ds.ContentDate, ds.ContentTime, ds.TimezoneOffsetFromUTC) == ("20260303", "183607.250000", "-0930")


def test_large_pictures_share_a_segment() -> None:
    """Where one segment a lesion would take more than 8 MiB, all share one: a report must not outweigh its picture."""
    mask = np.zeros((3000, 4000), dtype=bool)
    lesions = []
    for number in range(6):
        left = 100 * number
        mask[10:20, left : left + 10] = True
        corners = [(left, 10), (left + 10, 10), (left + 10, 20), (left, 20), (left, 10)]
        lesions.append(Lesion(f"lesion-{number}", np.array(corners, dtype=np.float32), 100, 0.1, None, 0.9))
    for count, segments in ((5, 5), (6, 1)):
        part = Segmentation(mask, tuple(lesions[:count]), draw.algorithm())
        frame = replace(draw.frame(rows=3000, columns=4000), segmentation=part)
        ds = read(built(draw.analysis(frame), draw.source(rows=3000, columns=4000))["segmentation"])
        assert len(ds.SegmentSequence) == int(ds.NumberOfFrames) == segments


finite = st.floats(-50, 250, width=32)
probability = st.floats(0, 1)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=90).filter(str.strip)
algorithms = st.builds(Algorithm, name=words, version=words, digest=st.just("ab" * 32), parameters=st.text(max_size=40))


@st.composite
def lesions(drawing: st.DrawFn) -> Lesion:
    """Draw a lesion of any polygon, inside, outside, degenerate."""
    points = drawing(st.lists(st.tuples(finite, finite), max_size=12))
    return Lesion(
        drawing(st.sampled_from(["lesion-1", "lesion-2", "x", "ø"])),
        np.array(points, dtype=np.float32).reshape(-1, 2),
        drawing(st.floats(0, 1e9)),
        drawing(st.floats(0, 100)),
        drawing(st.none() | st.floats(0, 1e12)),
        drawing(probability),
    )


@st.composite
def frames(drawing: st.DrawFn, number: int) -> FrameAnalysis:
    """Draw a frame: any gates, any distribution, any regions, any mask."""
    rows, columns = 9, 14
    cells = drawing(st.binary(min_size=16, max_size=16))
    mask = np.unpackbits(np.frombuffer(cells, dtype=np.uint8))[: rows * columns].reshape(rows, columns).astype(bool)
    categories = tuple(
        Category(f"k{n % 2}", Code(value, "99ICD11", meaning), p)
        for n, (value, meaning, p) in enumerate(drawing(st.lists(st.tuples(words, words, probability), max_size=7)))
    )
    algorithm = drawing(algorithms)
    return FrameAnalysis(
        frame_number=number,
        rows=rows,
        columns=columns,
        quality=drawing(st.none() | st.just(draw.quality()) | st.just(draw.quality(3, acceptable=False))),
        domain=drawing(st.none() | st.just(draw.domain()) | st.just(draw.domain(dermatological=False))),
        diagnosis=drawing(st.none() | st.just(Diagnosis(categories, drawing(probability), algorithm))),
        indicators=drawing(st.just(()) | st.just(draw.indicators())),
        segmentation=drawing(
            st.none() | st.builds(Segmentation, st.just(mask), st.lists(lesions(), max_size=24).map(tuple), st.just(algorithm))
        ),
        failures=drawing(st.lists(st.builds(Failure, item=words, reason=words), max_size=2).map(tuple)),
    )


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 3))
def test_whatever_the_models_say_the_reports_are_readable(data: st.DataObject, count: int) -> None:
    """Any analysis: readable by highdicom and pydicom, tracking UIDs unique, SCOORD closed and inside, segments together the mask."""
    analysis = ImageAnalysis(tuple(data.draw(frames(number)) for number in range(1, count + 1)), count)
    source = draw.source(draw.MULTI_FRAME_TRUE_COLOUR if count > 1 else draw.VL_PHOTOGRAPHIC, rows=9, columns=14, frames=count)
    reports = built(analysis, source)
    regions: list[str] = []
    for kind in {"summary", "findings"} & set(reports):
        ds = read(reports[kind])
        if groups(ds):
            sr(reports[kind])
        uids = [children(group, "Tracking Unique Identifier")[0].UID for group in groups(ds)]
        assert len(uids) == len(set(uids))
        for item in items(ds):
            if item.ValueType == "SCOORD":
                points = np.array(item.GraphicData).reshape(-1, 2)
                assert len(points) >= 4
                np.testing.assert_array_equal(points[0], points[-1])
                assert ((points >= 0) & (points <= (14, 9))).all()
        if kind == "findings":
            regions = uids
    if "segmentation" in reports:
        segmentation = highdicom.seg.segread(draw.part10(reports["segmentation"]))
        number_of_frames = int(segmentation.NumberOfFrames)
        planes = segmentation.pixel_array.reshape(number_of_frames, 9, 14)
        for frame in analysis.frames:
            if frame.valid and frame.segmentation is not None:
                mine = [
                    planes[index]
                    for index, group in enumerate(segmentation.PerFrameFunctionalGroupsSequence)
                    if count == 1 or group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber == frame.frame_number
                ]
                np.testing.assert_array_equal(np.sum(mine, axis=0, dtype=int) if mine else np.zeros((9, 14)), frame.segmentation.mask)
        tracked = [uid for _, uid in segmentation.get_tracking_ids()]
        assert set(tracked) <= set(regions) or len(tracked) == 1
