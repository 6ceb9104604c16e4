"""The runner on small bundles with seeded weights: shapes, ranges, refusals, repeatability."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from inference.bundle import INDICATORS, load_bundle
from inference.errors import ModelUnavailable, UnsupportedPixels
from inference.runner import MAX_LESIONS, ModelRunner
from tests.inference.models import manifest, write_bundle

TASKS = ("quality", "domain", "diagnosis", "segmentation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a bundle for each task."""
    target = tmp_path_factory.mktemp("bundles")
    for task in TASKS:
        write_bundle(target, task)
    return target


def make(folder: Path, tasks: Sequence[str] = TASKS) -> ModelRunner:
    """Make a runner with the bundles of `tasks`."""
    return ModelRunner([load_bundle(folder / task) for task in tasks], threads=1, device="cpu")


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    """Make a runner with every task."""
    return make(folder)


def frame(rows: int = 80, columns: int = 120, seed: int = 1) -> NDArray[np.uint8]:
    """Draw a frame of blocks."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-rows // 20), -(-columns // 20), 3), np.uint8)
    return np.ascontiguousarray(np.repeat(np.repeat(small, 20, 0), 20, 1)[:rows, :columns])


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (33, 7), (64, 64), (3000, 4000)])
def test_any_size_gives_results_in_range(runner: ModelRunner, shape: tuple[int, int]) -> None:
    """From one pixel to a 12 megapixel photograph every task answers within its range."""
    picture = frame(*shape)
    quality, domain = runner.quality(picture), runner.domain(picture)
    diagnosis, found = runner.diagnosis(picture)
    segmentation = runner.segmentation(picture, (0.1, 0.2))
    assert 0 <= quality.score <= 100
    assert 0 <= domain.confidence <= 1
    assert (domain.modality is None) == (not domain.dermatological)
    assert sum(category.probability for category in diagnosis.categories) == pytest.approx(1, abs=1e-6)
    assert 0 <= diagnosis.entropy <= 1
    assert [indicator.key for indicator in found] == list(INDICATORS)
    assert all(indicator.positive == (indicator.probability >= indicator.threshold) for indicator in found)
    assert segmentation.mask.shape == shape
    assert segmentation.mask.dtype == np.bool_
    assert sum(lesion.area_pixels for lesion in segmentation.lesions) == segmentation.mask.sum()
    for lesion in segmentation.lesions:
        assert lesion.area_mm2 == pytest.approx(lesion.area_pixels * 0.02)
        assert (lesion.polygon <= np.array(shape[::-1])).all()


def test_categories_are_sorted_and_indicators_follow_the_matrix(runner: ModelRunner) -> None:
    """Categories fall in probability; malignancy is the melanoma's, pigmented lesion the sum of both."""
    diagnosis, found = runner.diagnosis(frame())
    p = {category.key: category.probability for category in diagnosis.categories}
    by_key = {indicator.key: indicator.probability for indicator in found}
    assert list(p.values()) == sorted(p.values(), reverse=True)
    assert by_key["malignancy"] == p["melanoma"]
    assert by_key["pigmented_lesion"] == pytest.approx(1)


def test_same_frame_same_result(folder: Path, runner: ModelRunner) -> None:
    """A second runner gives the same rounded values and the same mask for the same frame."""
    picture, other = frame(seed=4), make(folder)
    assert runner.quality(picture) == other.quality(picture)
    assert runner.domain(picture) == other.domain(picture)
    assert runner.diagnosis(picture) == other.diagnosis(picture)
    first, second = runner.segmentation(picture), other.segmentation(picture)
    assert np.array_equal(first.mask, second.mask)
    assert [lesion.certainty for lesion in first.lesions] == [lesion.certainty for lesion in second.lesions]


def test_without_spacing_no_area_in_millimetres(runner: ModelRunner) -> None:
    """An area in mm2 is given only when the scale is known."""
    assert all(lesion.area_mm2 is None for lesion in runner.segmentation(frame()).lesions)


def test_many_regions_are_limited(folder: Path, tmp_path: Path) -> None:
    """However many regions a mask has, mask and lesions agree and the number is bounded."""
    target = write_bundle(tmp_path, "segmentation", thresholds={"mask": 0.5, "minimum_area_percent": 0})
    runner = ModelRunner([load_bundle(target)], threads=1, device="cpu")
    for seed in range(5):
        found = runner.segmentation(np.random.default_rng(seed).integers(0, 256, (90, 90, 3), np.uint8))
        assert len(found.lesions) <= MAX_LESIONS
        assert found.mask.sum() == sum(lesion.area_pixels for lesion in found.lesions)


def test_views_make_a_mirrored_frame_equal(tmp_path: Path) -> None:
    """With a view and its mirror image averaged, mirroring the frame changes nothing and mirrors the mask."""
    both = manifest("domain")["input"] | {"views": ["as_is", "flip_columns"]}
    bundles = [load_bundle(write_bundle(tmp_path, task, input=both)) for task in ("domain", "segmentation")]
    runner = ModelRunner(bundles, threads=1, device="cpu")
    picture = frame(64, 64, seed=9)
    mirrored = np.ascontiguousarray(picture[:, ::-1])
    assert runner.domain(picture).confidence == pytest.approx(runner.domain(mirrored).confidence, abs=2e-6)
    first, second = (runner._models["segmentation"].outputs(one) for one in (picture, mirrored))
    assert first.std() > 1e-4
    assert np.allclose(first, second[:, :, ::-1], atol=1e-6)


def test_calibration_is_applied(tmp_path: Path) -> None:
    """A higher temperature flattens the distribution, an offset lifts its class."""
    plain = load_bundle(write_bundle(tmp_path / "a", "diagnosis"))
    flat = load_bundle(write_bundle(tmp_path / "b", "diagnosis", calibration={"temperature": 50}))
    lifted = load_bundle(write_bundle(tmp_path / "c", "diagnosis", calibration={"bias": [5, 0]}))
    first, second, third = (ModelRunner([bundle], threads=1, device="cpu").diagnosis(frame())[0] for bundle in (plain, flat, lifted))
    assert second.entropy > first.entropy
    p, q = ({category.key: category.probability for category in one.categories} for one in (first, third))
    assert q["melanoma"] > p["melanoma"]


def test_limits_lower_the_quality(tmp_path: Path) -> None:
    """A measured property caps the score whatever the network says."""
    target = write_bundle(tmp_path, "quality", calibration={"scale": 0, "offset": 95}, limits={"contrast": [[0, 7], [5, 100]]})
    runner = ModelRunner([load_bundle(target)], threads=1, device="cpu")
    assert runner.quality(np.full((50, 50, 3), 128, np.uint8)).score == 7
    found = runner.quality(frame())
    assert (found.score, found.band, found.acceptable) == (95, "excellent", True)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
)
def test_what_is_no_frame_is_refused(runner: ModelRunner, picture: NDArray[np.uint8]) -> None:
    """Other shapes and types raise UnsupportedPixels, which is not tried again."""
    with pytest.raises(UnsupportedPixels):
        runner.diagnosis(picture)
    assert not UnsupportedPixels.retryable


def test_missing_task_is_unavailable(folder: Path) -> None:
    """A task without a bundle raises ModelUnavailable and names the setting."""
    runner = make(folder, ["domain"])
    assert runner.has("domain")
    assert not runner.has("quality")
    with pytest.raises(ModelUnavailable, match="no bundle for quality"):
        runner.quality(frame())
    assert ModelUnavailable.retryable


def test_two_bundles_for_one_task_are_refused(folder: Path) -> None:
    """The runner never chooses silently between two models."""
    with pytest.raises(ModelUnavailable, match="both for domain"):
        make(folder, ["domain", "domain"])


def test_unknown_device_is_refused(folder: Path) -> None:
    """A device that does not exist is named together with the setting."""
    with pytest.raises(ModelUnavailable, match=r"\[inference\] device"):
        ModelRunner([load_bundle(folder / "domain")], threads=1, device="warp")


def _changed(folder: Path, tmp_path: Path, **changes: object) -> Path:
    """Copy the domain bundle with other top-level keys of the manifest."""
    weights = (folder / "domain" / "weights.safetensors").read_bytes()
    return write_bundle(tmp_path, "domain", weights, **changes)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "resnet", "arguments": {}}, "no architecture 'resnet'"),
        ({"name": "mobilenet_v1_classifier", "arguments": {"outputs": 3, "depth": 2}}, "does not take these arguments"),
        ({"name": "mobilenet_v1_classifier", "arguments": {"outputs": 3, "width": 0.5, "taps": [8, 32]}}, "the architecture needs"),
        ({"name": "mobilenet_v1_classifier", "arguments": {"outputs": 3, "width": 0.25, "taps": [7]}}, "does not take these arguments"),
        ({"name": "mobilenet_v2_classifier", "arguments": {"outputs": 3}}, "missing"),
    ],
)
def test_weights_of_another_architecture_are_refused(folder: Path, tmp_path: Path, architecture: dict[str, object], message: str) -> None:
    """Names and shapes are compared before a weight is used."""
    bundle = load_bundle(_changed(folder, tmp_path, architecture=architecture))
    with pytest.raises(ModelUnavailable, match=message):
        ModelRunner([bundle], threads=1, device="cpu")


def test_outputs_and_labels_must_agree(folder: Path, tmp_path: Path) -> None:
    """A network with two outputs cannot serve three labels."""
    tensors = load((folder / "diagnosis" / "weights.safetensors").read_bytes())
    architecture = manifest("diagnosis")["architecture"]
    target = write_bundle(tmp_path, "domain", save(tensors), architecture=architecture)
    with pytest.raises(ModelUnavailable, match="3 labels need"):
        ModelRunner([load_bundle(target)], threads=1, device="cpu")


def test_weights_that_overflow_are_reported(folder: Path, tmp_path: Path) -> None:
    """Finite weights that make the outputs infinite are an error, never a number in a report."""
    tensors = dict(load((folder / "domain" / "weights.safetensors").read_bytes()))
    tensors["head.weight"] = np.full(tensors["head.weight"].shape, 3e38, np.float32)
    tensors["body.stem.bias"] = np.full(tensors["body.stem.bias"].shape, 6, np.float32)
    tensors["head.bias"] = np.full(3, 3e38, np.float32)
    target = write_bundle(tmp_path, "domain", save(tensors))
    assert json.loads((target / "manifest.json").read_text())["task"] == "domain"
    with pytest.raises(ModelUnavailable, match="not finite"):
        ModelRunner([load_bundle(target)], threads=1, device="cpu")
