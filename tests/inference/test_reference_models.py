"""The shipped models keep the promises of their manifests, on drawn pictures and on the held-out part of the real ones."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from inference.bundle import load_bundles
from inference.drawing import draw_skin_picture
from inference.runner import ModelRunner
from inference.training import negatives
from inference.training.domain import CLINICAL_TEST
from inference.training.fit import auc
from inference.training.segmentation import dice

Picture = NDArray[np.uint8]
FLOORS = {"melanoma": 0.78, "seborrheic_keratosis": 0.90}


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """Make a runner with the shipped bundles."""
    return ModelRunner(load_bundles(), threads=1, device="cpu")


def read(path: Path) -> Picture:
    """Read a picture file as sRGB."""
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert picture is not None
    return np.ascontiguousarray(picture[:, :, ::-1], np.uint8)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a table."""
    with path.open() as file:
        return list(csv.DictReader(file))


def blurred(picture: Picture, share: float) -> Picture:
    """Blur by `share` of the picture's side."""
    sigma = share * min(picture.shape[:2])
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.uint8) if sigma > 0 else picture


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 42, 2026])
def test_drawn_skin_picture_passes_the_gates(runner: ModelRunner, seed: int) -> None:
    """A newcomer's first picture gets through: good quality, skin, dermoscopic, one main lesion where it was drawn."""
    picture = draw_skin_picture(seed)
    quality, domain = runner.quality(picture), runner.domain(picture)
    assert quality.acceptable
    assert (domain.dermatological, domain.modality) == (True, "dermoscopic")
    lesions = runner.segmentation(picture).lesions
    assert lesions
    assert 5 < lesions[0].area_percent < 50
    middle = lesions[0].polygon.mean(axis=0)
    assert (abs(middle - 512) < 200).all()


def test_drawing_is_repeatable_and_of_any_size() -> None:
    """The same seed gives the same bytes, another seed another picture; one pixel can be drawn too."""
    assert np.array_equal(draw_skin_picture(5, 96, 128), draw_skin_picture(5, 96, 128))
    assert not np.array_equal(draw_skin_picture(5, 96, 128), draw_skin_picture(6, 96, 128))
    assert draw_skin_picture(1, 96, 128).shape == (96, 128, 3)
    assert draw_skin_picture(1, 1, 1).dtype == np.uint8


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((600, 800, 3), np.uint8),
        np.full((600, 800, 3), 255, np.uint8),
        np.full((600, 800, 3), (215, 170, 150), np.uint8),
        np.full((1, 1, 3), (215, 170, 150), np.uint8),
        np.full((300, 300, 3), 7, np.uint8),
    ],
    ids=["black", "white", "even skin colour", "one pixel", "nearly black"],
)
def test_empty_pictures_are_bad_and_no_skin(runner: ModelRunner, picture: Picture) -> None:
    """Black, white, uniform and 1 x 1 are in the band "bad" and are not dermatological."""
    quality = runner.quality(picture)
    assert (quality.band, quality.acceptable) == ("bad", False)
    assert not runner.domain(picture).dermatological


@pytest.mark.parametrize(
    "kind", range(10), ids=["even", "noise", "ramp", "text", "text 2", "stripes", "checks", "shapes", "clouds", "skin-coloured noise"]
)
def test_drawn_patterns_are_no_skin(runner: ModelRunner, kind: int) -> None:
    """Patterns of unseen seeds are not dermatological."""
    for seed in (3_000_001, 3_000_002, 3_000_003):
        assert not runner.domain(negatives.drawn(kind + 1, seed, 400)[kind]).dermatological


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_quality_falls_along_a_blur_series(runner: ModelRunner, seed: int) -> None:
    """The more blur, the lower the score; the last is not acceptable."""
    picture = draw_skin_picture(seed, 700, 900)
    scores = [runner.quality(blurred(picture, share)).score for share in (0, 0.003, 0.006, 0.012, 0.024, 0.048)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= 61
    assert scores[-1] <= 20


def test_large_photograph_equals_its_reduction(runner: ModelRunner) -> None:
    """A 12 megapixel photograph gives nearly the same probabilities as the same picture at a quarter of the size."""
    picture = draw_skin_picture(8, 750, 1000)
    large = np.asarray(cv2.resize(picture, (4000, 3000), interpolation=cv2.INTER_CUBIC), np.uint8)
    small, big = (({c.key: c.probability for c in runner.diagnosis(one)[0].categories}) for one in (picture, large))
    assert small == pytest.approx(big, abs=0.05)


@pytest.mark.shared
def test_real_pictures_pass_and_others_do_not(runner: ModelRunner, shared: Path) -> None:
    """Held-out dermoscopy and held-out healthy skin pass both gates; held-out photographs, smears and screens fail the domain."""
    derm = shared / "data" / "derm"
    dermoscopy = [read(path) for path in sorted((derm / "isic2017" / "val").glob("*.jpg"))[::5]]
    found = [runner.domain(picture) for picture in dermoscopy]
    assert np.mean([one.dermatological for one in found]) >= 0.97
    assert np.mean([one.modality == "dermoscopic" for one in found]) >= 0.93
    assert np.mean([runner.quality(picture).acceptable for picture in dermoscopy]) >= 0.93
    skin = [read(derm / "healthy_skin" / name) for name in CLINICAL_TEST]
    assert all(runner.domain(picture).dermatological for picture in skin)
    assert all(runner.quality(picture).acceptable for picture in skin)
    sources: dict[str, list[str]] = {}
    for row in rows_of(derm / "non_skin" / "index.csv"):
        sources.setdefault(row["file"].split("_")[0], []).append(row["file"])
    others = [name for names in sources.values() for name in names[4::5]]
    assert len(others) == 11
    assert not [name for name in others if runner.domain(read(derm / "non_skin" / name)).dermatological]


@pytest.mark.shared
@pytest.mark.slow
def test_diagnosis_keeps_its_figures(runner: ModelRunner, shared: Path) -> None:
    """On the validation set of ISIC 2017, never trained or tuned on, the runner reaches the AUCs of the manifest and the floors."""
    folder = shared / "data" / "derm" / "isic2017"
    rows = [row for row in rows_of(folder / "labels.csv") if row["split"] == "val"]
    assert len(rows) == 148
    found = []
    for row in rows:
        diagnosis, _ = runner.diagnosis(read(folder / "val" / f"{row['image_id']}.jpg"))
        found.append({category.key: category.probability for category in diagnosis.categories})
    card = next(bundle.card for bundle in runner.bundles if bundle.card.task == "diagnosis")
    for key, floor in FLOORS.items():
        measured = auc(np.array([row["class"] == key for row in rows]), np.array([one[key] for one in found]))
        assert measured >= floor
        assert measured == pytest.approx(card.metrics["test"]["isic2017_validation_set_only"][key]["auc"], abs=0.01)
        assert card.metrics["test"][key]["auc"] >= floor


@pytest.mark.shared
@pytest.mark.slow
def test_segmentation_keeps_its_figures(runner: ModelRunner, shared: Path) -> None:
    """On 40 held-out pictures the mean Dice of the runner's mask is above the floor, and so is the manifest's figure."""
    folder = shared / "data" / "derm" / "isic2018"
    names = [row["image_id"] for row in rows_of(folder / "attributes.csv") if row["isic2017_split"] == "val"][::3]
    scores = []
    for name in names:
        truth = read(folder / "masks" / f"{name}.png")[:, :, 0] >= 128
        scores.append(dice(runner.segmentation(read(folder / "images" / f"{name}.jpg")).mask, truth))
    assert len(scores) == 40
    assert np.mean(scores) >= 0.86
    card = next(bundle.card for bundle in runner.bundles if bundle.card.task == "segmentation")
    assert card.metrics["test"]["dice_mean"] >= 0.86


def test_domain_holds_with_a_source_left_out() -> None:
    """The manifest's AUC is above 0.97 whichever negative source was left out of the fit."""
    card = next(bundle.card for bundle in load_bundles() if bundle.card.task == "domain")
    left_out = card.metrics["test"]["one_negative_source_left_out"]
    assert set(left_out) == {"bccd", "coral", "mercure", "corpora", "drawn"}
    assert min(figures["auc"] for figures in left_out.values()) >= 0.97


@pytest.mark.shared
def test_converted_backbones_still_know_animals(shared: Path) -> None:
    """The dequantised ImageNet weights name ordinary pictures: padding, order and scaling are right."""
    import torch  # noqa: PLC0415 - the conversion needs it, the other tests only the runner

    from inference.networks import MobileNetV1, MobileNetV2  # noqa: PLC0415
    from inference.training.tflite import load_body  # noqa: PLC0415

    derm = shared / "data" / "derm"
    names = (derm / "backbones" / "imagenet_labels.txt").read_text().splitlines()
    wanted = {"coral_parrot": "macaw", "coral_sunflower": "daisy", "coral_bird": "chickadee", "coral_hotdog_train_1": "hotdog"}
    for body, size, file in (
        (MobileNetV1(width=0.5), 160, "mobilenet_v1_0.5_160_quant.tflite"),
        (MobileNetV2(), 224, "tf2_mobilenet_v2_1.0_224_ptq.tflite"),
    ):
        weight, bias = load_body(body, derm / "backbones" / file)
        for picture, name in wanted.items():
            small = np.asarray(cv2.resize(read(derm / "non_skin" / f"{picture}.jpg"), (size, size), interpolation=cv2.INTER_AREA))
            batch = torch.from_numpy(small.transpose(2, 0, 1).copy()).float()[None] / 127.5 - 1
            with torch.inference_mode():
                scores = torch.nn.functional.linear(body(batch)[32].mean(dim=(2, 3)), weight, bias)[0]
            assert names[int(scores.argmax())].startswith(name)
