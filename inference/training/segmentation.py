"""Train the reference lesion segmenter on the ISIC 2018 masks.

Run ``python -m inference.training.segmentation`` (about 20 minutes on two cores).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inference.networks import Segmenter, build
from inference.training import bundles, data, fit, tflite

SEED = 20260702
SIZE = 224
EPOCHS = 16
BATCH = 24
ARCHITECTURE = "mobilenet_v2_segmenter"
ARGUMENTS = {"outputs": 1, "channels": 48}
FROZEN_BLOCKS = 2
VIEWS = ("as_is", "flip_columns")
FULL = 512
"""Rows and columns of the pictures and masks of ISIC 2018; Dice is measured at this size."""


def _load(listed: list[data.Picture]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read pictures and masks (0 or 255) at 256 x 256."""
    stored = data.cache_folder() / "segmentation.npz"
    if not stored.exists():
        pictures, masks = [], []
        for picture in listed:
            assert picture.square is not None  # noqa: S101 - for the type checker
            assert picture.mask is not None  # noqa: S101 - for the type checker
            pictures.append(cv2.resize(data.read_rgb(picture.square), (256, 256), interpolation=cv2.INTER_AREA))
            masks.append(cv2.resize(data.read_rgb(picture.mask)[:, :, 0], (256, 256), interpolation=cv2.INTER_AREA))
        np.savez(stored, pictures=np.stack(pictures), masks=np.stack(masks))
    arrays = np.load(stored)
    return arrays["pictures"], arrays["masks"]


def make_network() -> Segmenter:
    """Build the network on ImageNet weights, its first blocks frozen."""
    network = build(ARCHITECTURE, ARGUMENTS)
    assert isinstance(network, Segmenter)  # noqa: S101 - for the type checker
    tflite.load_body(network.body, data.data_folder() / "backbones" / "tf2_mobilenet_v2_1.0_224_ptq.tflite")
    for module in (network.body.stem, *list(network.body.blocks)[:FROZEN_BLOCKS]):
        module.requires_grad_(False)
    return network


def probabilities(network: nn.Module, pictures: NDArray[np.uint8], *, views: tuple[str, ...] = ("as_is",)) -> NDArray[np.float32]:
    """Lesion probability of every pixel of the network's input, (n, SIZE, SIZE), as the runner computes it."""
    flips: dict[str, tuple[int, ...]] = {"as_is": (), "flip_columns": (3,)}
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 32):
            small = np.stack([cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for picture in pictures[start : start + 32]])
            batch = fit.normalised(torch.from_numpy(small).permute(0, 3, 1, 2).float())
            seen = [torch.flip(network(torch.flip(batch, flips[view])), flips[view]) if flips[view] else network(batch) for view in views]
            found.append(torch.sigmoid(torch.stack(seen).mean(0))[:, 0].numpy())
    return np.concatenate(found)


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks; 1 when both are empty."""
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0


def main() -> None:
    """Train, choose the cut on validation, measure on test once at full size, write the bundle."""
    generator = fit.prepare_machine(SEED)
    random = np.random.default_rng(SEED)
    listed = [picture for picture in data.pictures() if picture.mask is not None]
    pictures, masks = _load(listed)
    split = np.array([picture.split for picture in listed])
    training, validation = np.nonzero(split == "train")[0], np.nonzero(split == "validation")[0]
    network = make_network()
    steps = len(training) // BATCH

    def draw(_epoch: int) -> Iterator[tuple[Tensor, ...]]:
        chosen = random.permutation(training)[: steps * BATCH]
        for batch in fit.batches(chosen, BATCH):
            picture = torch.from_numpy(pictures[batch]).permute(0, 3, 1, 2).float()
            mask = torch.from_numpy(masks[batch])[:, None].float()
            picture, mask = fit.warp([picture, mask], generator, SIZE, zoom=(0.6, 1.15), aspect=0.35)
            yield fit.normalised(fit.recolour(picture, generator)), mask / 255

    def loss(outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        truth = targets[0]
        found = torch.sigmoid(outputs)
        overlap = (2 * (found * truth).sum((1, 2, 3)) + 100) / (found.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 100)
        return functional.binary_cross_entropy_with_logits(outputs, truth) + (1 - overlap).mean()

    small = np.stack([cv2.resize(masks[index], (SIZE, SIZE), interpolation=cv2.INTER_AREA) >= 128 for index in validation])

    def validate(candidate: nn.Module) -> float:
        found = probabilities(candidate, pictures[validation]) >= 0.5
        return float(np.mean([dice(one, truth) for one, truth in zip(found, small, strict=True)]))

    body = [parameter for parameter in network.body.parameters() if parameter.requires_grad]
    known = {id(parameter) for parameter in network.body.parameters()}
    decoder = [parameter for parameter in network.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [{"params": body, "lr": 2.5e-4}, {"params": decoder, "lr": 2e-3}]
    kept, history = fit.train(network, groups=groups, epochs=EPOCHS, draw=draw, steps=steps, loss=loss, validate=validate)
    torch.save(kept.state_dict(), data.cache_folder() / "segmentation.pt")
    finish(kept, listed, pictures, history)


def finish(kept: nn.Module, listed: list[data.Picture], pictures: NDArray[np.uint8], history: list[float]) -> None:
    """Choose the cut on validation, measure on test at full size, write the bundle."""
    split = np.array([picture.split for picture in listed])

    def found_and_true(indices: NDArray[np.int64]) -> tuple[NDArray[np.float32], list[NDArray[np.bool_]]]:
        return probabilities(kept, pictures[indices], views=VIEWS), [data.read_rgb(listed[index].mask)[:, :, 0] >= 128 for index in indices]

    def measured(found: NDArray[np.float32], truth: list[NDArray[np.bool_]], cut: float) -> NDArray[np.float64]:
        large = (cv2.resize(one, (FULL, FULL), interpolation=cv2.INTER_LINEAR) for one in found)
        return np.array([dice(np.asarray(one) >= cut, mask) for one, mask in zip(large, truth, strict=True)])

    validation, test = np.nonzero(split == "validation")[0], np.nonzero(split == "test")[0]
    known = found_and_true(validation)
    cut = max((0.35, 0.4, 0.45, 0.5, 0.55, 0.6), key=lambda value: float(measured(*known, value).mean()))
    scores = measured(*found_and_true(test), cut)
    figures: dict[str, Any] = {
        "dice_mean": round(float(scores.mean()), 4),
        "dice_mean_95": fit.interval(lambda chosen: float(scores[chosen].mean()), len(scores)),
        "dice_median": round(float(np.median(scores)), 4),
        "jaccard_mean": round(float((scores / (2 - scores)).mean()), 4),
        "share_below_dice_0.5": round(float((scores < 0.5).mean()), 4),
        "n": len(test),
        "measured_at": f"{FULL} x {FULL} pixels, before small components are dropped",
    }
    fit.say(str(figures))
    bundles.write_segmentation(
        kept,
        architecture=(ARCHITECTURE, ARGUMENTS),
        size=SIZE,
        views=VIEWS,
        threshold=cut,
        metrics={
            "test": figures,
            "validation": {"selection": "mean Dice at 0.5, one view", "best": round(max(history), 4) if history else None},
            "splits": bundles.split_counts(listed),
            "seed": SEED,
            "epochs": EPOCHS,
        },
    )


if __name__ == "__main__":
    main()
