"""Train the reference quality model: a score of 0 to 100, learnt from pictures that were made worse on purpose.

The target is a product of factors, one a fault (blur, low resolution, exposure, contrast, noise, JPEG), times the score of
an unharmed archive picture. Each picture of a batch comes with a more blurred copy, whose score has to be lower.
Run ``python -m inference.training.quality`` (about 10 minutes on two cores).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inference.drawing import draw_skin_picture
from inference.networks import Classifier, build
from inference.training import bundles, data, fit, negatives, tflite

SEED = 20260704
SIZE = 256
EPOCHS = 8
PAIRS = 16
STEPS = 70
UNHARMED = 88.0
ARCHITECTURE = "mobilenet_v1_classifier"
ARGUMENTS: dict[str, Any] = {"outputs": 1, "width": 0.5, "taps": [4, 8, 16, 32]}
THRESHOLD = 41.0
LIMITS: dict[str, list[list[float]]] = {
    # a picture of few pixels cannot be good, however smooth it looks enlarged
    "short_side": [[1, 0], [32, 10], [64, 20], [128, 40], [200, 60], [256, 80], [400, 100]],
    # standard deviation of the luminance (0 to 255): an even surface shows nothing
    "contrast": [[0, 0], [1.5, 10], [4, 100]],
}
Picture = NDArray[np.uint8]


def _blurred(picture: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    return cv2.GaussianBlur(picture, (0, 0), sigma).astype(np.float32) if sigma > 0.2 else picture


def degrade(source: Picture, random: np.random.Generator, extra_blur: float = 0.0) -> tuple[Picture, float]:
    """Make a 256 x 256 picture worse at random; give it with the score it deserves.

    `extra_blur` (deviation in pixels) is added to the blur; the other faults depend on `random` alone.
    """
    picture = source.astype(np.float32)
    dice = random.random(7)
    sigma = math.exp(random.uniform(math.log(0.5), math.log(10))) if dice[0] < 0.4 else 0.0
    length, angle = int(random.integers(3, 31)), random.uniform(0, math.pi)
    side = int(math.exp(random.uniform(math.log(16), math.log(256))))
    contrast, stops = math.exp(random.uniform(math.log(0.03), 0)), random.uniform(-4.5, 2.5)
    noise, jpeg = math.exp(random.uniform(math.log(3), math.log(80))), int(math.exp(random.uniform(math.log(3), math.log(80))))
    grains = random.standard_normal(picture.shape).astype(np.float32)
    score = UNHARMED
    total = math.hypot(sigma, extra_blur)
    picture = _blurred(picture, total)
    blur = total
    if dice[1] < 0.12:
        kernel = np.zeros((length, length), np.float32)
        centre = (length - 1) / 2
        reach = np.array([math.cos(angle), math.sin(angle)]) * centre
        start, end = (tuple(round(float(value)) for value in np.array([centre, centre]) + sign * reach) for sign in (-1, 1))
        cv2.line(kernel, start, end, 1.0, 1)
        picture = cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT).astype(np.float32)
        blur = math.hypot(blur, length / 3.5)
    if dice[2] < 0.2:
        small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
        way = cv2.INTER_NEAREST if dice[2] < 0.06 else cv2.INTER_LINEAR
        picture = cv2.resize(small, (SIZE, SIZE), interpolation=way).astype(np.float32)
        blur = math.hypot(blur, 0.5 * (SIZE / side - 1))
    score /= 1 + (blur / 2.2) ** 1.6
    if dice[3] < 0.15:
        grey = random.uniform(40, 215)
        picture = grey + contrast * (picture - grey)
        score *= contrast**0.8
    if dice[4] < 0.3:
        picture = picture * 2.0**stops
        score /= 1 + (abs(stops) / 1.7) ** 2.5
    if dice[5] < 0.3:
        picture = picture + noise * grains
        score /= 1 + (noise / 22) ** 1.5
    harmed = np.clip(np.round(picture), 0, 255).astype(np.uint8)
    if dice[6] < 0.25:
        harmed = np.asarray(cv2.imdecode(cv2.imencode(".jpg", harmed, [cv2.IMWRITE_JPEG_QUALITY, jpeg])[1], cv2.IMREAD_COLOR), np.uint8)
        score /= 1 + (8 / jpeg) ** 1.6
    return harmed, score


def _empty(random: np.random.Generator) -> tuple[Picture, float]:
    """Draw a picture with nothing in it: one colour, noise or a ramp."""
    number = int(random.choice([0, 1, 2, 9]))
    if random.random() < 0.3:
        return np.full((SIZE, SIZE, 3), random.choice([0, 255, int(random.integers(256))]), np.uint8), 1.0
    return negatives.drawn(number + 1, int(random.integers(1 << 31)), SIZE)[number], 5.0


def _sources() -> dict[str, list[Picture]]:
    """Unharmed pictures at 256 x 256 by side of the split."""
    found: dict[str, list[Picture]] = {"train": [], "validation": [], "test": []}
    for picture in data.pictures():
        if picture.square is not None:
            found[picture.split].append(
                cv2.resize(data.read_rgb(picture.square), (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.uint8)
            )
        else:
            found[picture.split].append(data.read_rgb(picture.path))
    with (data.data_folder() / "healthy_skin" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    random = np.random.default_rng(SEED)
    for number, row in enumerate(rows):
        photograph = data.read_rgb(data.data_folder() / "healthy_skin" / row["file"])
        split = ("train", "train", "validation", "train", "test")[number % 5]
        if min(photograph.shape[:2]) < SIZE:
            continue
        for _ in range(16 if split == "train" else 4):
            side = int(random.integers(SIZE, min(photograph.shape[:2]) + 1))
            top, left = (int(random.integers(0, whole - side + 1)) for whole in photograph.shape[:2])
            found[split].append(
                cv2.resize(photograph[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.uint8)
            )
    for split, first, count in (("train", 200_001, 80), ("validation", 200_501, 12), ("test", 900_101, 24)):
        for number in range(count):
            large = draw_skin_picture(first + number, 512, 512)
            found[split].append(cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.uint8))
    return found


def scores(network: nn.Module, pictures: list[Picture]) -> NDArray[np.float64]:
    """Network scores, 0 to 100, of 256 x 256 pictures."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 64):
            batch = fit.normalised(torch.from_numpy(np.stack(pictures[start : start + 64])).permute(0, 3, 1, 2).float())
            found.append(network(batch)[:, 0].double().numpy())
    return np.asarray(np.clip(np.concatenate(found) * 100, 0, 100), np.float64)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)


def _harmed(sources: list[Picture], seed: int, times: int) -> tuple[list[Picture], NDArray[np.float64]]:
    random = np.random.default_rng(seed)
    made = [degrade(source, random) for _ in range(times) for source in sources] + [_empty(random) for _ in range(len(sources) // 10)]
    return [picture for picture, _ in made], np.array([score for _, score in made])


def main() -> None:
    """Train, measure on held-out pictures, write the bundle."""
    fit.prepare_machine(SEED, threads=1)
    random = np.random.default_rng(SEED)
    sources = _sources()
    fit.say(str({split: len(found) for split, found in sources.items()}))
    network = build(ARCHITECTURE, {**ARGUMENTS, "dropout": 0.1})
    assert isinstance(network, Classifier)  # noqa: S101 - for the type checker
    tflite.load_body(network.body, data.data_folder() / "backbones" / "mobilenet_v1_0.5_160_quant.tflite")
    nn.init.normal_(network.head.weight, std=0.01)
    nn.init.constant_(network.head.bias, 0.5)
    known, wanted = _harmed(sources["validation"], SEED + 1, 1)

    def draw(_epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(STEPS):
            made: list[tuple[Picture, float]] = []
            worse: list[tuple[Picture, float]] = []
            for index in random.integers(0, len(sources["train"]), PAIRS):
                source = sources["train"][int(index)]
                source = np.ascontiguousarray(np.rot90(source, int(random.integers(4)))[:, :: int(random.choice([-1, 1]))])
                seed, more = int(random.integers(1 << 31)), float(random.uniform(0.7, 5))
                made.append(degrade(source, np.random.default_rng(seed)))
                worse.append(degrade(source, np.random.default_rng(seed), more))
            empty = [_empty(random) for _ in range(2)]
            batch = made + worse + empty
            pictures = torch.from_numpy(np.stack([picture for picture, _ in batch])).permute(0, 3, 1, 2).float()
            yield fit.normalised(pictures), torch.tensor([score for _, score in batch], dtype=torch.float32) / 100

    def loss(outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        found, truth = outputs[:, 0], targets[0]
        order = functional.relu(found[PAIRS : 2 * PAIRS] - found[:PAIRS] + 0.5 * (truth[:PAIRS] - truth[PAIRS : 2 * PAIRS]))
        return functional.smooth_l1_loss(found, truth, beta=0.05) + 0.5 * order.mean()

    def validate(candidate: nn.Module) -> float:
        return -float(np.abs(scores(candidate, known) - wanted).mean())

    groups: list[dict[str, Any]] = [
        {"params": list(network.body.parameters()), "lr": 5e-4},
        {"params": list(network.head.parameters()), "lr": 2e-3},
    ]
    kept, history = fit.train(network, groups=groups, epochs=EPOCHS, draw=draw, steps=STEPS, loss=loss, validate=validate)
    torch.save(kept.state_dict(), data.cache_folder() / "quality.pt")
    harmed, truth = _harmed(sources["test"], SEED + 2, 2)
    found = scores(kept, harmed)
    series = [0.0, 0.7, 1.4, 2.8, 5.6]
    rows = np.stack(
        [
            scores(kept, [_blurred(source.astype(np.float32), sigma).round().clip(0, 255).astype(np.uint8) for source in sources["test"]])
            for sigma in series
        ]
    )
    figures = {
        "mean_absolute_error": round(float(np.abs(found - truth).mean()), 2),
        "mean_absolute_error_95": fit.interval(lambda chosen: float(np.abs(found - truth)[chosen].mean()), len(found)),
        "rank_correlation": round(float(np.corrcoef(_ranks(found), _ranks(truth))[0, 1]), 4),
        "unharmed_accepted": round(float((rows[0] >= THRESHOLD).mean()), 4),
        "blur_series_falls": round(float((np.diff(rows, axis=0) <= 0).all(axis=0).mean()), 4),
        "blur_series_pixels": series,
        "blur_series_mean": [round(float(value), 1) for value in rows.mean(axis=1)],
        "n_harmed": len(found),
        "n_unharmed": len(sources["test"]),
    }
    fit.say(str(figures))
    bundles.write_quality(
        kept,
        architecture=(ARCHITECTURE, ARGUMENTS),
        size=SIZE,
        threshold=THRESHOLD,
        limits=LIMITS,
        metrics={
            "test": figures,
            "validation": {"selection": "mean absolute error", "best": round(-max(history), 2)},
            "splits": {split: len(pictures) for split, pictures in sources.items()},
            "seed": SEED,
            "epochs": EPOCHS,
        },
    )


if __name__ == "__main__":
    main()
