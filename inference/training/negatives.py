"""Pictures that are not skin: photographs and screens, rendered DICOM files of other specialties, and drawn ones."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray

from inference.training import data

Picture = NDArray[np.uint8]
_WORDS = (
    "report",
    "study",
    "series",
    "patient",
    "image",
    "normal",
    "left",
    "right",
    "lesion",
    "date",
    "findings",
    "the",
    "of",
    "with",
    "no",
    "value",
)


def _bounded(picture: Picture, side: int = 512) -> Picture:
    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def photographs() -> dict[str, list[Picture]]:
    """The pictures of ``non_skin`` by source: bccd, coral, mercure."""
    folder = data.data_folder() / "non_skin"
    found: dict[str, list[Picture]] = {}
    with (folder / "index.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["file"].split("_")[0], []).append(_bounded(data.read_rgb(folder / row["file"])))
    return found


def _rendered(path: Path) -> Picture | None:
    """Render the middle frame of a DICOM file with plain min-max contrast; None when it has no decodable picture."""
    try:
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array
    except Exception:  # noqa: BLE001 - the corpora hold damaged files on purpose; each one is skipped
        return None
    samples = int(dataset.get("SamplesPerPixel", 1))
    if pixels.ndim == (4 if samples == 3 else 3):
        pixels = pixels[len(pixels) // 2]
    if pixels.ndim not in (2, 3) or min(pixels.shape[:2]) < 16:
        return None
    values = pixels.astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5])
    if high <= low:
        return None
    scaled = (values / max(values.max(), 1) if samples == 3 else (values - low) / (high - low)).clip(0, 1)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        scaled = 1 - scaled
    grey = np.round(scaled * 255).astype(np.uint8)
    return _bounded(grey if samples == 3 else np.repeat(grey[:, :, None], 3, axis=2))


def corpora() -> list[Picture]:
    """Radiology, pathology and test pictures of ``../corpora``, near-equal ones once, at most 120."""
    root = data.data_folder().parents[1] / "corpora"
    found: list[Picture] = []
    seen: set[bytes] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(root.rglob("*")):
            if not path.is_file() or path.stat().st_size < 2000:
                continue
            picture = _rendered(path)
            if picture is None:
                continue
            key = (cv2.resize(picture, (6, 6), interpolation=cv2.INTER_AREA) // 32).tobytes()
            if key not in seen:
                seen.add(key)
                found.append(picture)
    return found[:120]


def _smooth(random: np.random.Generator, side: int, cells: int) -> NDArray[np.float32]:
    grid = random.random((cells + 1, cells + 1, 3)).astype(np.float32)
    return cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.float32)


def _text_page(random: np.random.Generator, side: int) -> Picture:
    paper = random.integers(225, 256, 3)
    page = np.full((side, side, 3), paper, np.uint8)
    size = float(random.uniform(0.3, 0.8))
    ink = tuple(int(value) for value in random.integers(0, 90, 3))
    for row in range(int(16 + 30 * size), side, int(12 + 30 * size)):
        words = " ".join(random.choice(_WORDS, 16))
        cv2.putText(
            page,
            words[: int(random.integers(10, 90))],
            (int(random.integers(5, 30)), row),
            cv2.FONT_HERSHEY_SIMPLEX,
            size,
            ink,
            1,
            cv2.LINE_AA,
        )
    return page


def _shapes(random: np.random.Generator, side: int) -> Picture:
    picture = np.full((side, side, 3), random.integers(0, 256, 3), np.uint8)
    for _ in range(int(random.integers(2, 12))):
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        first, second = (tuple(int(value) for value in random.integers(0, side, 2)) for _ in range(2))
        kind = int(random.integers(3))
        if kind == 0:
            cv2.rectangle(picture, first, second, colour, -1)
        elif kind == 1:
            cv2.circle(picture, first, int(random.integers(5, side // 3)), colour, -1, cv2.LINE_AA)
        else:
            cv2.line(picture, first, second, colour, int(random.integers(1, 12)), cv2.LINE_AA)
    return picture


def drawn(count: int, seed: int, side: int = 256) -> list[Picture]:
    """Draw `count` pictures: uniform, noise, gradient, text, stripes, checks, shapes, colour clouds, in turn."""
    random = np.random.default_rng(seed)
    found = []
    skin = np.array([215, 170, 150], np.float32)
    for number in range(count):
        kind = number % 10
        colour = random.integers(0, 256, 3).astype(np.float32)
        tone = skin * random.uniform(0.35, 1.15) + random.normal(0, 12, 3)
        ramp = np.linspace(0, 1, side, dtype=np.float32)
        picture: NDArray[np.float32]
        if kind == 0:  # one colour, half of the time the colour of skin
            picture = np.ones((side, side, 3), np.float32) * (colour if random.random() < 0.5 else tone).astype(np.float32)
            picture += random.normal(0, random.choice([0.0, 1.0, 3.0]), picture.shape).astype(np.float32)
        elif kind == 1:  # independent noise, colour or grey, of any grain
            grain = int(random.choice([1, 2, 4, 8]))
            small = random.integers(0, 256, (side // grain, side // grain, 3 if random.random() < 0.6 else 1)).astype(np.float32)
            picture = np.repeat(np.repeat(np.broadcast_to(small, (*small.shape[:2], 3)), grain, 0), grain, 1)
        elif kind == 2:  # a ramp between two colours
            other = random.integers(0, 256, 3).astype(np.float32)
            across = ramp[None, :, None] if random.random() < 0.5 else (ramp[:, None, None] + ramp[None, :, None]) / 2
            picture = colour + across * (other - colour) + np.zeros((side, side, 3), np.float32)
        elif kind in (3, 4):
            picture = _text_page(random, side).astype(np.float32)
        elif kind == 5:  # stripes
            period, angle = random.uniform(4, 60), random.uniform(0, np.pi)
            phase = (ramp[:, None] * np.sin(angle) + ramp[None, :] * np.cos(angle)) * side / period * 2 * np.pi
            other = random.integers(0, 256, 3).astype(np.float32)
            picture = colour + (np.sin(phase)[..., None] > 0) * (other - colour)
        elif kind == 6:  # checks
            cell = int(random.integers(4, 48))
            checks = (np.add.outer(np.arange(side) // cell, np.arange(side) // cell) % 2)[..., None]
            picture = colour * checks + random.integers(0, 256, 3) * (1 - checks).astype(np.float32)
        elif kind == 7:
            picture = _shapes(random, side).astype(np.float32)
        elif kind == 8:  # clouds of many colours
            picture = _smooth(random, side, int(random.integers(2, 20))) * 255
        else:  # noise around the colour of skin
            picture = tone.astype(np.float32) + random.normal(0, random.uniform(10, 60), (side, side, 3)).astype(np.float32)
        found.append(np.clip(np.round(picture), 0, 255).astype(np.uint8))
    return found
