"""What runs on which image: gates before everything, one failure stops nothing else, and a digest for all that decides a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicom_node.demo import draw_skin_picture
from inference.bundle import load_bundles
from inference.errors import ModelUnavailable
from inference.pipeline import ANALYSABLE, OUR_MODEL_NAME, Pipeline, analysable
from inference.records import Frames
from inference.runner import ModelRunner
from storage.records import Summary
from tests.inference.laboratory import picture, pipeline_of, write_laboratory

VL_PHOTOGRAPHIC = "1.2.840.10008.5.1.4.1.1.77.1.4"


def header(**attributes: Any) -> Dataset:
    """Make the header of a colour picture."""
    data_set = Dataset()
    data_set.SamplesPerPixel = 3
    data_set.PhotometricInterpretation = "RGB"
    for keyword, value in attributes.items():
        setattr(data_set, keyword, value)
    return data_set


def frames(count: int = 1, notes: tuple[str, ...] = ()) -> Frames:
    """Draw frames."""
    return Frames(np.stack([picture(seed=seed) for seed in range(count)]), (0.1, 0.1), notes)


def summary(
    sop_class_uid: str = VL_PHOTOGRAPHIC, *, pixels: bool = True, model: str = "", samples: str = "3", colour: str = "RGB"
) -> Summary:
    """Make what the scanner tells of an instance."""
    return Summary(
        sop_class_uid=sop_class_uid,
        sop_instance_uid="2.25.1",
        study_instance_uid="2.25.2",
        series_instance_uid="2.25.3",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        byte_count=1,
        sha256="",
        attributes={"SamplesPerPixel": (samples,), "PhotometricInterpretation": (colour,)},
        has_pixel_data=pixels,
        manufacturer_model_name=model,
    )


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        *((summary(uid), True) for uid in ANALYSABLE),
        (summary(samples="1", colour="PALETTE COLOR"), True),
        (summary(samples="1", colour="MONOCHROME2"), False),
        (summary(pixels=False), False),
        (summary(model=OUR_MODEL_NAME), False),
        (summary("1.2.840.10008.5.1.4.1.1.2"), False),
        (summary("1.2.840.10008.5.1.4.1.1.88.34"), False),
        (summary("1.2.840.10008.5.1.4.1.1.66.4"), False),
        (summary("1.2.840.10008.5.1.4.1.1.104.1"), False),
        (summary("1.2.840.10008.5.1.4.1.1.77.1.1.1"), False),
    ],
)
def test_what_is_analysed(of: Summary, *, expected: bool) -> None:
    """Colour photographs by SOP class; no grey pictures, documents, video, or anything that this node made (threats.md row 46)."""
    assert analysable(of) == expected


@pytest.mark.parametrize(("acceptable", "shown"), [(False, "dermoscopic"), (True, "other"), (False, "other")])
def test_a_shut_gate_stops_everything_clinical(tmp_path: Path, *, acceptable: bool, shown: str) -> None:
    """A refused picture has the results of both gates, nothing clinical, and no failure: it is a result."""
    analysis = pipeline_of(write_laboratory(tmp_path, acceptable=acceptable, shown=shown)).run(header(), frames())
    (frame,) = analysis.frames
    assert frame.quality is not None
    assert frame.quality.acceptable == acceptable
    assert frame.domain is not None
    assert frame.domain.dermatological == (shown != "other")
    assert not frame.valid
    assert (frame.diagnosis, frame.indicators, frame.segmentation, frame.failures, analysis.failures) == (None, (), None, (), ())


def test_open_gates_let_every_item_run(tmp_path: Path) -> None:
    """A valid picture gets a distribution, its indicators and a segmentation, each with its algorithm."""
    (frame,) = pipeline_of(write_laboratory(tmp_path)).run(header(), frames()).frames
    assert frame.valid
    assert (frame.frame_number, frame.rows, frame.columns) == (1, 96, 128)
    assert frame.diagnosis is not None
    assert frame.diagnosis.algorithm.name == "test-diagnosis"
    assert len(frame.indicators) == 5
    assert frame.segmentation is not None
    assert frame.segmentation.mask.shape == (96, 128)
    assert frame.failures == ()


def test_a_model_is_not_asked_about_pictures_it_was_not_made_for(tmp_path: Path) -> None:
    """Without a word in its manifest a clinical model sees dermoscopic pictures only; the report says why it said nothing."""
    (frame,) = pipeline_of(write_laboratory(tmp_path, shown="clinical")).run(header(), frames()).frames
    assert frame.valid
    assert (frame.diagnosis, frame.segmentation) == (None, None)
    assert [failure.item for failure in frame.failures] == ["diagnosis", "segmentation"]
    assert all("dermoscopic" in failure.reason for failure in frame.failures)


def test_a_manifest_may_open_a_model_for_clinical_pictures(tmp_path: Path) -> None:
    """A bundle that says it is made for clinical pictures is asked about them."""
    folder = write_laboratory(tmp_path, shown="clinical", diagnosis={"modalities": ["clinical", "dermoscopic"]})
    (frame,) = pipeline_of(folder).run(header(), frames()).frames
    assert frame.diagnosis is not None
    assert [failure.item for failure in frame.failures] == ["segmentation"]


@pytest.mark.parametrize("broken", ["diagnosis", "segmentation"])
def test_one_failing_item_stops_no_other(tmp_path: Path, broken: str) -> None:
    """A model that breaks on the picture leaves a failure with its name; the other item is there."""
    overflowing = {"rows": 64, "columns": 64, "aspect": "squeeze", "mean": [0.0] * 3, "deviation": [1e-38] * 3}
    (frame,) = pipeline_of(write_laboratory(tmp_path, **{broken: {"input": overflowing}})).run(header(), frames()).frames
    assert [failure.item for failure in frame.failures] == [broken]
    assert (frame.diagnosis is None) == (broken == "diagnosis")
    assert (frame.segmentation is None) == (broken == "segmentation")


def test_a_failing_gate_fails_the_job(tmp_path: Path) -> None:
    """Without the word of both gates nothing is said of a picture, not even that it was refused."""
    overflowing = {"rows": 64, "columns": 64, "aspect": "squeeze", "mean": [0.0] * 3, "deviation": [1e-38] * 3}
    pipeline = pipeline_of(write_laboratory(tmp_path, quality={"input": overflowing}))
    with pytest.raises(ModelUnavailable):
        pipeline.run(header(), frames())


@pytest.mark.parametrize("missing", ["quality", "domain"])
def test_no_pipeline_without_gates(tmp_path: Path, missing: str) -> None:
    """A missing gate is found at the start, not at the first picture."""
    folder = write_laboratory(tmp_path, tasks=[task for task in ("quality", "domain", "diagnosis") if task != missing])
    with pytest.raises(ModelUnavailable, match="gates"):
        pipeline_of(folder)


def test_an_item_without_a_bundle_is_not_part_of_the_profile(tmp_path: Path) -> None:
    """What nobody configured is not missing."""
    (frame,) = pipeline_of(write_laboratory(tmp_path, tasks=("quality", "domain", "segmentation"))).run(header(), frames()).frames
    assert frame.diagnosis is None
    assert frame.segmentation is not None
    assert frame.failures == ()


def test_every_frame_is_an_image_up_to_a_limit(tmp_path: Path) -> None:
    """Frames are numbered from 1; where a limit cut, the number of all of them is kept and the cut is named."""
    pipeline = pipeline_of(write_laboratory(tmp_path), max_frames=2)
    analysis = pipeline.run(header(NumberOfFrames="3"), frames(3))
    assert [frame.frame_number for frame in analysis.frames] == [1, 2]
    assert analysis.frame_count == 3
    assert [failure.item for failure in analysis.failures] == ["frames"]
    assert pipeline.run(header(NumberOfFrames="2"), frames(2)).failures == ()


def test_a_grey_picture_is_a_failure_of_the_image(tmp_path: Path) -> None:
    """Models made for colour are not asked about grey; a palette counts as colour."""
    pipeline = pipeline_of(write_laboratory(tmp_path))
    grey = pipeline.run(header(SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2"), frames())
    assert grey.frames == ()
    assert [failure.item for failure in grey.failures] == ["image"]
    assert len(pipeline.run(header(SamplesPerPixel=1, PhotometricInterpretation="PALETTE COLOR"), frames()).frames) == 1


def test_notes_of_the_decoder_reach_the_report(tmp_path: Path) -> None:
    """Colours that may be off are said to be."""
    analysis = pipeline_of(write_laboratory(tmp_path)).run(header(), frames(notes=("ICC profile ignored: damaged.",)))
    assert [(failure.item, failure.reason) for failure in analysis.failures] == [("colour", "ICC profile ignored: damaged.")]


def test_the_same_picture_gives_the_same_analysis(tmp_path: Path) -> None:
    """Two runs, and two pipelines over the same bundles, agree in every number."""
    folder = write_laboratory(tmp_path)
    one = pipeline_of(folder)
    (first,), (second,), (third,) = (pipeline.run(header(), frames()).frames for pipeline in (one, one, pipeline_of(folder)))
    assert (first.quality, first.domain, first.diagnosis, first.indicators) == (
        second.quality,
        second.domain,
        second.diagnosis,
        second.indicators,
    )
    assert first.diagnosis == third.diagnosis
    assert first.segmentation is not None
    assert third.segmentation is not None
    assert np.array_equal(first.segmentation.mask, third.segmentation.mask)


def test_the_configuration_digest_names_all_that_decides(tmp_path: Path) -> None:
    """Profile, limits, thresholds and weights change the digest; another run of the same configuration does not."""
    folder = write_laboratory(tmp_path / "one")
    digest = pipeline_of(folder).configuration_digest
    assert len(digest) == 64
    assert pipeline_of(folder).configuration_digest == digest
    assert pipeline_of(folder, profile="other").configuration_digest != digest
    assert pipeline_of(folder, max_frames=3).configuration_digest != digest
    assert pipeline_of(write_laboratory(tmp_path / "two", domain={"thresholds": {"dermatological": 0.51}})).configuration_digest != digest
    assert pipeline_of(write_laboratory(tmp_path / "three", tasks=("quality", "domain"))).configuration_digest != digest


def test_steps_are_observed(tmp_path: Path) -> None:
    """Each step tells how long it took."""
    seen: list[str] = []
    pipeline = pipeline_of(write_laboratory(tmp_path), observe=lambda step, seconds: seen.append(step) if seconds >= 0 else None)
    pipeline.run(header(), frames())
    assert seen == ["quality", "domain", "diagnosis", "segmentation"]


@pytest.fixture(scope="module")
def reference() -> Pipeline:
    """Make the pipeline that the node ships."""
    return Pipeline(model=ModelRunner(load_bundles(), threads=1, device="cpu"))


def _reference_frames(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Frames:
    return Frames(np.ascontiguousarray(pixels)[None])


def test_the_reference_models_accept_a_skin_picture(reference: Pipeline) -> None:
    """The shipped bundles take a drawn skin picture through both gates to a diagnosis and an outline."""
    (frame,) = reference.run(header(), _reference_frames(draw_skin_picture(3, 600, 800))).frames
    assert frame.valid
    assert frame.domain is not None
    assert frame.domain.modality == "dermoscopic"
    assert frame.diagnosis is not None
    assert frame.failures == ()
    assert frame.segmentation is not None
    assert frame.segmentation.lesions


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((400, 400, 3), np.uint8),
        np.full((400, 400, 3), 255, np.uint8),
        np.full((400, 400, 3), (210, 160, 140), np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8),
    ],
    ids=["black", "white", "uniform", "one pixel", "noise"],
)
def test_the_reference_gates_refuse_what_shows_nothing(reference: Pipeline, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Black, white, uniform, one pixel and noise get no clinical item (items.md section 6)."""
    (frame,) = reference.run(header(), _reference_frames(pixels)).frames
    assert not frame.valid
    assert frame.diagnosis is None
