"""What every training script needs: augmentation, averaged weights, figures with their uncertainty."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Floats = NDArray[np.float64]
BOOTSTRAPS = 2000


def say(text: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def prepare_machine(seed: int, threads: int = 2) -> torch.Generator:
    """Fix the seed and the number of threads; give the generator of all random choices."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Draw uniformly from [low, high)."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def warp(
    batches: list[Tensor], generator: torch.Generator, size: int, *, zoom: tuple[float, float] = (0.65, 1.05), aspect: float = 0.25
) -> list[Tensor]:
    """Turn, mirror, zoom, squeeze and shift every picture of several float batches (n, c, rows, columns) in the same way."""
    count = batches[0].shape[0]
    angle = uniform(generator, (count,), 0, 2 * math.pi)
    scale = uniform(generator, (count,), *zoom)
    squeeze = torch.exp(uniform(generator, (count,), -aspect, aspect) / 2)
    mirror = torch.where(uniform(generator, (count,), 0, 1) < 0.5, -1.0, 1.0)
    # any angle for half of the pictures, a right angle for the others, so that corners stay as they are
    right = torch.round(angle / (math.pi / 2)) * (math.pi / 2)
    angle = torch.where(uniform(generator, (count,), 0, 1) < 0.5, angle, right)
    room = (1 - scale).clamp(min=0.05)
    shift = uniform(generator, (count, 2), -1, 1) * room[:, None]
    cosine, sine = torch.cos(angle), torch.sin(angle)
    first = torch.stack([scale * squeeze * cosine * mirror, -scale * squeeze * sine, shift[:, 0]], 1)
    second = torch.stack([scale / squeeze * sine * mirror, scale / squeeze * cosine, shift[:, 1]], 1)
    matrix = torch.stack([first, second], 1)
    grid = functional.affine_grid(matrix, [count, 1, size, size], align_corners=False)
    return [functional.grid_sample(batch, grid, mode="bilinear", padding_mode="reflection", align_corners=False) for batch in batches]


def recolour(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Change exposure, contrast, saturation and white balance of float pictures in [0, 255]."""
    count = pictures.shape[0]
    gain = 1 + strength * uniform(generator, (count, 3, 1, 1), -0.08, 0.08)
    exposure = 1 + strength * uniform(generator, (count, 1, 1, 1), -0.25, 0.25)
    contrast = 1 + strength * uniform(generator, (count, 1, 1, 1), -0.25, 0.25)
    saturation = 1 + strength * uniform(generator, (count, 1, 1, 1), -0.3, 0.3)
    grey = pictures.mean(dim=1, keepdim=True)
    middle = pictures.mean(dim=(1, 2, 3), keepdim=True)
    coloured = grey + (pictures - grey) * saturation
    return (((coloured - middle) * contrast + middle) * gain * exposure).clamp(0, 255)


def normalised(pictures: Tensor) -> Tensor:
    """Map [0, 255] to [-1, 1], in the memory layout that is quickest on a CPU."""
    return (pictures / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def stored(network: nn.Module) -> nn.Module:
    """Give a copy whose weights went through float16, as the bundle stores them."""
    copied = copy.deepcopy(network).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.copy_(parameter.half().float())
    return copied


@dataclass
class Average:
    """Exponential moving average of a network's weights."""

    network: nn.Module
    decay: float = 0.99
    steps: int = 0
    mean: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.mean = copy.deepcopy(self.network).eval()

    def update(self) -> None:
        """Take one step; the first steps weigh more."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for kept, current in zip(self.mean.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)


def batches(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Cut `indices` into batches of `size`, the last one short."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def train(
    network: nn.Module,
    *,
    groups: list[dict[str, object]],
    epochs: int,
    draw: Callable[[int], Iterator[tuple[Tensor, ...]]],
    steps: int,
    loss: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
    validate: Callable[[nn.Module], float],
    decay: float = 0.99,
) -> tuple[nn.Module, list[float]]:
    """Fine-tune `network`; keep the averaged weights of the epoch with the best validation value.

    Parameters
    ----------
    groups
        Parameter groups of AdamW with their highest learning rates.
    draw
        Gives the batches of an epoch: (inputs normalised, targets ...).
    steps
        Batches an epoch.
    """
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[float(str(group["lr"])) for group in groups], total_steps=epochs * steps + 1, pct_start=0.15
    )
    average = Average(network, decay)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    best, history, kept = -math.inf, [], copy.deepcopy(average.mean)
    for epoch in range(epochs):
        network.train()
        total, start = 0.0, time.monotonic()
        for batch in draw(epoch):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = network(batch[0])
            value = loss(outputs.float(), batch[1:])
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            average.update()
            total += float(value.detach())
        score = validate(stored(average.mean))
        history.append(score)
        if score > best:
            best, kept = score, stored(average.mean)
        say(
            f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f} validation {score:.4f} best {best:.4f} ({time.monotonic() - start:.0f} s)"
        )
    return kept, history


def auc(positive: NDArray[np.bool_], score: Floats) -> float:
    """Area under the ROC curve by ranks, ties counted half."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    starts = np.r_[0, np.nonzero(np.diff(ordered))[0] + 1]
    ends = np.r_[starts[1:], len(ordered)]
    ranks = np.empty(len(score))
    ranks[order] = np.repeat((starts + ends + 1) / 2, ends - starts)
    hits = int(positive.sum())
    misses = len(score) - hits
    if not hits or not misses:
        return math.nan
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def interval(statistic: Callable[[NDArray[np.int64]], float], count: int, seed: int = 7) -> list[float]:
    """95 % percentile bootstrap of ``statistic(indices)`` over `count` pictures."""
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(0, count, count)) for _ in range(BOOTSTRAPS)]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def auc_figures(positive: NDArray[np.bool_], score: Floats) -> dict[str, object]:
    """AUC with its interval and the numbers behind it."""
    return {
        "auc": round(auc(positive, score), 4),
        "auc_95": interval(lambda chosen: auc(positive[chosen], score[chosen]), len(score)),
        "positives": int(positive.sum()),
        "negatives": int((~positive).sum()),
    }


def calibration_error(probabilities: Floats, labels: NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error of the most probable class, equal-width bins."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for number in range(bins):
        chosen = place == number
        if chosen.any():
            error += chosen.mean() * abs(confidence[chosen].mean() - correct[chosen].mean())
    return float(error)


def fit_calibration(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, list[float]]:
    """Fit temperature and class offsets on validation logits (maximum likelihood)."""
    values, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_temperature, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = functional.cross_entropy(values / log_temperature.exp() + bias, targets) + 1e-3 * bias.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    centred = (bias - bias.mean()).detach()
    return round(float(log_temperature.exp()), 4), [round(float(value), 4) for value in centred]


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
