"""Train the reference domain model: dermoscopic, clinical skin, or other.

The ImageNet MobileNetV1 stays as it is; one linear layer on its averaged feature maps is fitted by regularised
logistic regression. With 13 clinical photographs more freedom would only learn the sources by heart. For the honest
figure each negative source in turn is left out of the fit and measured. Run ``python -m inference.training.domain``.
"""

from __future__ import annotations

import csv
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from inference.drawing import draw_skin_picture
from inference.networks import Classifier, build
from inference.training import bundles, data, fit, negatives, tflite

SEED = 20260703
SIZE = 160
ARCHITECTURE = "mobilenet_v1_classifier"
ARGUMENTS: dict[str, Any] = {"outputs": 3, "width": 0.5, "taps": [8, 16, 32]}
LABELS = ("dermoscopic", "clinical", "other")
PENALTY = 3e-3
CLINICAL_TEST = ("image_0003.jpg", "image_0012.jpg", "image_0016.jpg", "image_0017.jpg")
CLINICAL_VALIDATION = ("image_0009.jpg", "image_0010.jpg")
DRAWN_TEST_SEED, DRAWN_SEED = 900_001, 100_001
Picture = NDArray[np.uint8]


def _crops(picture: Picture, random: np.random.Generator, count: int, *, least: float = 0.3) -> list[Picture]:
    """Cut `count` windows of `least` to all of each side; mirror, relight and recolour them a little."""
    found = []
    for _ in range(count):
        rows, columns = (max(8, int(side * random.uniform(least, 1))) for side in picture.shape[:2])
        top, left = (int(random.integers(0, whole - part + 1)) for whole, part in zip(picture.shape[:2], (rows, columns), strict=True))
        small = cv2.resize(picture[top : top + rows, left : left + columns], (256, 256), interpolation=cv2.INTER_AREA)
        window = (
            small[:, :: int(random.choice([-1, 1]))].astype(np.float64) * random.uniform(0.55, 1.15) * (1 + random.uniform(-0.08, 0.08, 3))
        )
        found.append(np.clip(np.round(window), 0, 255).astype(np.uint8))
    return found


def _with_lesion(skin: Picture, lesion: Picture, mask: NDArray[np.uint8], random: np.random.Generator) -> Picture:
    """Lay the lesion of a dermoscopic picture, small, over ordinary skin: its difference to its own skin is added."""
    side = int(random.integers(40, 130))
    small = cv2.resize(lesion, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    alpha = cv2.GaussianBlur(cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255, (0, 0), 1.5)
    around = small[alpha < 0.1]
    own = around.mean(0) if len(around) else small.mean((0, 1))
    picture = skin.astype(np.float32)
    top, left = (int(random.integers(0, 256 - side)) for _ in range(2))
    picture[top : top + side, left : left + side] += alpha[..., None] * (small - own)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _features(body: Classifier, pictures: list[Picture]) -> NDArray[np.float32]:
    """Averaged, joined feature maps of each picture, squeezed to the input size."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 64):
            small = np.stack(
                [
                    cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA if min(picture.shape[:2]) >= SIZE else cv2.INTER_LINEAR)
                    for picture in pictures[start : start + 64]
                ]
            )
            maps = body.body(fit.normalised(torch.from_numpy(small).permute(0, 3, 1, 2).float()))
            found.append(torch.cat([maps[tap].mean(dim=(2, 3)) for tap in ARGUMENTS["taps"]], 1).numpy())
    return np.concatenate(found)


def _fit(features: NDArray[np.float32], labels: NDArray[np.int64], weight: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted multinomial logistic regression on standardised features; the standardisation is folded into the result."""
    mean, deviation = features.mean(0), features.std(0) + 1e-2
    inputs = torch.from_numpy((features - mean) / deviation).double()
    targets, shares = torch.from_numpy(labels), torch.from_numpy(weight / weight.sum())
    matrix = torch.zeros(3, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([matrix, offset], max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = (
            functional.cross_entropy(inputs @ matrix.T + offset, targets, reduction="none") * shares
        ).sum() + PENALTY * matrix.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    folded = matrix.detach() / torch.from_numpy(deviation).double()
    return folded.float(), (offset.detach() - folded @ torch.from_numpy(mean).double()).float()


class _Sets:
    """Features, labels, sources and sides of all pictures."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.labels: list[int] = []
        self.sources: list[str] = []
        self.splits: list[str] = []

    def add(self, pictures: list[Picture], label: int, source: str, split: str) -> None:
        self.pictures += pictures
        self.labels += [label] * len(pictures)
        self.sources += [source] * len(pictures)
        self.splits += [split] * len(pictures)


def _collect(random: np.random.Generator) -> _Sets:
    sets = _Sets()
    listed = data.pictures()
    for picture in listed:
        whole = data.read_rgb(picture.path)
        sets.add([whole], 0, "isic2017", picture.split)
        if picture.split == "train":
            sets.add(_crops(whole, random, 1, least=0.6), 0, "isic2017", "train")
    squares = [picture for picture in listed if picture.square is not None]
    for picture in squares[::3]:
        sets.add(
            [cv2.resize(data.read_rgb(picture.square), (256, 256), interpolation=cv2.INTER_AREA).astype(np.uint8)],
            0,
            "isic2018",
            picture.split,
        )
    for split, first, count in (("train", DRAWN_SEED, 80), ("validation", DRAWN_SEED + 500, 20), ("test", DRAWN_TEST_SEED, 40)):
        sets.add([draw_skin_picture(first + number, 320, 320) for number in range(count)], 0, "drawn lesions", split)
    donors = [picture for picture in squares if picture.split == "train"]
    with (data.data_folder() / "healthy_skin" / "index.csv").open() as file:
        files = [row["file"] for row in csv.DictReader(file)]
    for name in files:
        split = "test" if name in CLINICAL_TEST else "validation" if name in CLINICAL_VALIDATION else "train"
        photograph = data.read_rgb(data.data_folder() / "healthy_skin" / name)
        sets.add([photograph], 1, "healthy photographs", split)
        crops = _crops(photograph, random, 60 if split == "train" else 12, least=0.35)
        sets.add(crops, 1, "crops of healthy photographs", split)
        if split == "train":
            for crop in crops[::2]:
                donor = donors[int(random.integers(len(donors)))]
                lesion, mask = data.read_rgb(donor.square), data.read_rgb(donor.mask)[:, :, 0]
                sets.add([_with_lesion(crop, lesion, mask, random)], 1, "crops with a lesion laid over", "train")
    others = {**negatives.photographs(), "corpora": negatives.corpora()}
    for source, pictures in others.items():
        for number, negative in enumerate(pictures):
            split = ("train", "train", "train", "validation", "test")[number % 5]
            sets.add([negative], 2, source, split)
            sets.add(_crops(negative, random, 5, least=0.4), 2, f"{source} crops", split)
    sets.add(negatives.drawn(400, SEED), 2, "drawn", "train")
    sets.add(negatives.drawn(100, SEED + 1), 2, "drawn", "validation")
    sets.add(negatives.drawn(100, SEED + 2), 2, "drawn", "test")
    return sets


def main() -> None:
    """Fit, leave each negative source out once, measure, write the bundle."""
    fit.prepare_machine(SEED, threads=1)
    network = build(ARCHITECTURE, ARGUMENTS).eval()
    assert isinstance(network, Classifier)  # noqa: S101 - for the type checker
    tflite.load_body(network.body, data.data_folder() / "backbones" / "mobilenet_v1_0.5_160_quant.tflite")
    shipped = fit.stored(network)
    assert isinstance(shipped, Classifier)  # noqa: S101 - for the type checker
    sets = _collect(np.random.default_rng(SEED))
    fit.say(f"{len(sets.pictures)} pictures")
    features = _features(shipped, sets.pictures)
    labels, sources, splits = np.array(sets.labels), np.array(sets.sources), np.array(sets.splits)
    bases = np.array([source.removesuffix(" crops") for source in sources])
    whole = bases == sources

    def fitted(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        # every class weighs the same, and within a class every source by the root of its size
        weight = np.zeros(len(labels))
        for label in range(3):
            for base in np.unique(bases[labels == label]):
                members = chosen & (labels == label) & (bases == base)
                if members.any():
                    weight[members] = members.sum() ** -0.5
            members = chosen & (labels == label)
            weight[members] /= weight[members].sum()
        matrix, offset = _fit(features[chosen], labels[chosen], weight[chosen])
        with torch.no_grad():
            network.head.weight.copy_(matrix.half().float())
            network.head.bias.copy_(offset.half().float())
            return fit.softmax(functional.linear(torch.from_numpy(features), network.head.weight, network.head.bias).double().numpy())

    positive = (labels != 2) & (splits == "test")
    left_out: dict[str, Any] = {}
    for source in ("bccd", "coral", "mercure", "corpora", "drawn"):
        scores = fitted((splits == "train") & ~((labels == 2) & (bases == source)))
        # nothing of the source was seen, so all of its pictures are measured
        measured = positive | ((labels == 2) & (bases == source) & whole)
        confidence = scores[measured, 0] + scores[measured, 1]
        left_out[source] = fit.auc_figures(labels[measured] != 2, confidence)
        left_out[source]["rejected_at_half"] = round(float((confidence[labels[measured] == 2] < 0.5).mean()), 4)
        fit.say(f"without {source}: {left_out[source]}")
    scores = fitted(splits == "train")
    confidence = scores[:, 0] + scores[:, 1]
    # the cut is halfway, on the logit scale, between what validation pictures of skin and of anything else get at the 2 % tails,
    # and never below one half: sources nobody thought of score higher than those of the fit
    known = splits == "validation"
    low = np.quantile(confidence[known & (labels != 2)], 0.02)
    high = np.quantile(confidence[known & (labels == 2)], 0.98)
    tail = [float(np.log(value / (1 - value))) for value in np.clip([low, high], 1e-4, 1 - 1e-4)]
    threshold = round(float(np.clip(1 / (1 + np.exp(-np.mean(tail))), 0.5, 0.8)), 3)
    fit.say(f"validation tails {low:.4f} {high:.4f}, threshold {threshold}")
    tested = splits == "test"
    figures: dict[str, Any] = {
        "all_sources_seen": fit.auc_figures(labels[tested] != 2, confidence[tested]),
        "one_negative_source_left_out": left_out,
        "accepted_at_threshold": {
            source: round(float((confidence[tested & (sources == source)] >= threshold).mean()), 4) for source in np.unique(sources[tested])
        },
        "modality_accuracy": round(float((scores[tested & (labels != 2), :2].argmax(1) == labels[tested & (labels != 2)]).mean()), 4),
        "n": {source: int((tested & (sources == source)).sum()) for source in np.unique(sources[tested])},
    }
    fit.say(str(figures))
    bundles.write_domain(
        network,
        architecture=(ARCHITECTURE, ARGUMENTS),
        size=SIZE,
        threshold=threshold,
        labels=LABELS,
        metrics={"test": figures, "seed": SEED},
    )


if __name__ == "__main__":
    main()
