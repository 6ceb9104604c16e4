"""Train the reference diagnosis model: melanoma, seborrhoeic keratosis, naevus on dermoscopy.

Run ``python -m inference.training.diagnosis`` (about 20 minutes on two cores).
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

from inference.networks import Classifier, MobileNetV2, build
from inference.training import bundles, data, fit, tflite

SEED = 20260701
SIZE = 224
EPOCHS = 24
BATCH = 32
ARCHITECTURE = "mobilenet_v2_classifier"
ARGUMENTS = {"outputs": 3, "taps": [16, 32]}
DROPOUT = 0.3
FROZEN_BLOCKS = 3
SENSITIVITY = 0.9
VIEWS = ("as_is", "flip_columns", "flip_rows", "turn_half")


def _load(listed: list[data.Picture]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """Read the whole (2017) and the square (2018) pictures at 256 x 256, and which have the latter."""
    stored = data.cache_folder() / "diagnosis.npz"
    if not stored.exists():
        whole = np.stack([data.read_rgb(picture.path) for picture in listed])
        square = np.stack(
            [
                data.read_rgb(picture.path)
                if picture.square is None
                else cv2.resize(data.read_rgb(picture.square), (256, 256), interpolation=cv2.INTER_AREA)
                for picture in listed
            ]
        ).astype(np.uint8)
        np.savez(stored, whole=whole, square=square)
    arrays = np.load(stored)
    return arrays["whole"], arrays["square"], np.array([picture.square is not None for picture in listed])


def make_network() -> Classifier:
    """Build the network on ImageNet weights, its first blocks frozen."""
    network = build(ARCHITECTURE, {**ARGUMENTS, "dropout": DROPOUT})
    assert isinstance(network, Classifier)  # noqa: S101 - for the type checker
    tflite.load_body(network.body, data.data_folder() / "backbones" / "tf2_mobilenet_v2_1.0_224_ptq.tflite")
    assert isinstance(network.body, MobileNetV2)  # noqa: S101 - for the type checker
    for module in (network.body.stem, *list(network.body.blocks)[:FROZEN_BLOCKS]):
        module.requires_grad_(False)
    nn.init.normal_(network.head.weight, std=0.01)
    nn.init.zeros_(network.head.bias)
    return network


def logits(network: nn.Module, pictures: NDArray[np.uint8], *, views: tuple[str, ...] = ("as_is",)) -> NDArray[np.float64]:
    """Mean logits over `views`, as the runner computes them."""
    flips: dict[str, tuple[int, ...]] = {"as_is": (), "flip_columns": (3,), "flip_rows": (2,), "turn_half": (2, 3)}
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 64):
            small = np.stack([cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for picture in pictures[start : start + 64]])
            batch = fit.normalised(torch.from_numpy(small).permute(0, 3, 1, 2).float())
            found.append(
                torch.stack([network(torch.flip(batch, flips[view]) if flips[view] else batch) for view in views]).mean(0).double().numpy()
            )
    return np.concatenate(found)


def main() -> None:
    """Train, calibrate on validation, measure on test once, write the bundle."""
    generator = fit.prepare_machine(SEED)
    random = np.random.default_rng(SEED)
    listed = data.pictures()
    whole, square, present = _load(listed)
    labels = np.array([picture.label for picture in listed])
    split = np.array([picture.split for picture in listed])
    training, validation, test = (np.nonzero(split == name)[0] for name in ("train", "validation", "test"))
    fit.say(f"train {np.bincount(labels[training])} validation {np.bincount(labels[validation])} test {np.bincount(labels[test])}")
    network = make_network()
    # seldom classes are drawn more often, by the root of their frequency: full balance overfits 200 pictures
    weight = np.bincount(labels[training])[labels[training]] ** -0.6
    weight /= weight.sum()
    steps = len(training) // BATCH

    def draw(_epoch: int) -> Iterator[tuple[Tensor, ...]]:
        chosen = random.choice(training, steps * BATCH, p=weight)
        for batch in fit.batches(chosen, BATCH):
            from_square = present[batch] & (random.random(len(batch)) < 0.4)
            pictures = np.where(from_square[:, None, None, None], square[batch], whole[batch])
            tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
            tensor = fit.recolour(fit.warp([tensor], generator, SIZE)[0], generator)
            yield fit.normalised(tensor), torch.from_numpy(labels[batch])

    def loss(outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        return functional.cross_entropy(outputs, targets[0], label_smoothing=0.05)

    def validate(candidate: nn.Module) -> float:
        scores = fit.softmax(logits(candidate, whole[validation]))
        return float(np.mean([fit.auc(labels[validation] == index, scores[:, index]) for index in (0, 1)]))

    body = [parameter for parameter in network.body.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": body, "lr": 2.5e-4}, {"params": list(network.head.parameters()), "lr": 2e-3}]
    kept, history = fit.train(network, groups=groups, epochs=EPOCHS, draw=draw, steps=steps, loss=loss, validate=validate)
    torch.save(kept.state_dict(), data.cache_folder() / "diagnosis.pt")
    finish(kept, listed, whole, history)


def finish(kept: nn.Module, listed: list[data.Picture], whole: NDArray[np.uint8], history: list[float]) -> None:
    """Calibrate and choose thresholds on validation, measure on test, write the bundle."""
    labels = np.array([picture.label for picture in listed])
    split = np.array([picture.split for picture in listed])
    validation, test = np.nonzero(split == "validation")[0], np.nonzero(split == "test")[0]
    known = logits(kept, whole[validation], views=VIEWS)
    temperature, bias = fit.fit_calibration(known, labels[validation])
    probabilities = fit.softmax(known / temperature + np.array(bias))
    melanoma = np.sort(probabilities[labels[validation] == 0, 0])
    # the highest threshold that still finds the wanted share of the validation melanomas
    threshold = float(np.floor(melanoma[int(np.floor((1 - SENSITIVITY) * len(melanoma)))] * 1000) / 1000)
    unseen = fit.softmax(logits(kept, whole[test], views=VIEWS) / temperature + np.array(bias))
    truth = labels[test]
    flagged = unseen[:, 0] >= threshold
    figures: dict[str, Any] = {name: fit.auc_figures(truth == index, unseen[:, index]) for index, name in enumerate(data.CLASSES)}
    recall = [float((unseen.argmax(1) == index)[truth == index].mean()) for index in range(3)]
    figures |= {
        "accuracy": round(float((unseen.argmax(1) == truth).mean()), 4),
        "balanced_accuracy": round(float(np.mean(recall)), 4),
        "expected_calibration_error": round(fit.calibration_error(unseen, truth), 4),
        "malignancy_sensitivity": round(float(flagged[truth == 0].mean()), 4),
        "malignancy_specificity": round(float((~flagged[truth != 0]).mean()), 4),
        "n": len(test),
    }
    official = np.array([listed[index].path.parent.name == "val" for index in test])
    figures["isic2017_validation_set_only"] = {
        name: fit.auc_figures(truth[official] == index, unseen[official, index]) for index, name in enumerate(data.CLASSES[:2])
    }
    fit.say(str(figures))
    bundles.write_diagnosis(
        kept,
        architecture=(ARCHITECTURE, ARGUMENTS),
        size=SIZE,
        views=VIEWS,
        calibration=(temperature, bias),
        threshold=threshold,
        sensitivity=SENSITIVITY,
        metrics={
            "test": figures,
            "validation": {
                "selection": "mean of melanoma and seborrhoeic keratosis AUC, one view",
                "best": round(max(history), 4) if history else None,
            },
            "splits": bundles.split_counts(listed),
            "seed": SEED,
            "epochs": EPOCHS,
        },
    )


if __name__ == "__main__":
    main()
