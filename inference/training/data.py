"""The pictures, their groups of near duplicates and the split that every reference model shares.

Split: by picture id over ISIC 2017 and 2018 together, near duplicates kept on one side. A group is *test* when one of
its pictures is in the validation set of ISIC 2017, or when the hash of its first id falls below `TEST_SHARE`; it is
*validation* below `TEST_SHARE + VALIDATION_SHARE`; else *train*. Nothing but the final evaluation reads the test part.
"""

from __future__ import annotations

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from inference.networks import MobileNetV1
from inference.training import tflite

TEST_SHARE = 0.12
VALIDATION_SHARE = 0.14
SPLIT_SALT = "dicom-node reference split 1"
CLASSES = ("melanoma", "seborrheic_keratosis", "nevus")
DUPLICATE_SIMILARITY = 0.74
"""Cosine similarity of ImageNet features, mean removed, from which two pictures count as one (chosen by eye, on the wide side)."""
DUPLICATE_BITS = (45, 0.6)
"""Or: Hamming distance, of 256 bits of a difference hash, up to the first and similarity from the second."""


def data_folder() -> Path:
    """Give the folder of the training pictures: ``DICOM_NODE_TRAINING_DATA``, else ``../shared/data/derm``."""
    return Path(os.environ.get("DICOM_NODE_TRAINING_DATA", "../shared/data/derm")).resolve()


def cache_folder() -> Path:
    """Give the folder for decoded pictures and checkpoints: ``DICOM_NODE_TRAINING_CACHE``, else ``/tmp/lab``."""
    folder = Path(os.environ.get("DICOM_NODE_TRAINING_CACHE", "/tmp/lab"))  # noqa: S108 - a cache of public pictures
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True, slots=True)
class Picture:
    """One ISIC id: its class of 2017 and its side of the split."""

    identifier: str
    label: int
    split: str
    """train, validation or test."""
    path: Path
    """The 2017 picture: whole, squeezed to 256 x 256."""
    square: Path | None
    """The 2018 picture of the same id: the centre square, 512 x 512."""
    mask: Path | None


def read_rgb(path: Path | None) -> NDArray[np.uint8]:
    """Read a JPEG or PNG as uint8 sRGB, (rows, columns, 3)."""
    if path is None:
        raise FileNotFoundError("this ISIC id has no such picture")
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise FileNotFoundError(path)
    return np.ascontiguousarray(picture[:, :, ::-1]).astype(np.uint8, copy=False)


def _difference_hash(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    grey = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (17, 16), interpolation=cv2.INTER_AREA).astype(np.int16)
    return (grey[:, 1:] > grey[:, :-1]).reshape(-1)


def _features(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    import torch  # noqa: PLC0415 - the data of a run is also listed without it

    body = MobileNetV1(width=0.5).eval()
    tflite.load_body(body, data_folder() / "backbones" / "mobilenet_v1_0.5_160_quant.tflite")
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 64):
            batch = np.stack([cv2.resize(picture, (160, 160), interpolation=cv2.INTER_AREA) for picture in pictures[start : start + 64]])
            maps = body(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1)
            # a 2 x 2 grid keeps where things are: two moles on one kind of skin are no duplicates
            found.append(torch.nn.functional.adaptive_avg_pool2d(maps[32], 2).flatten(1).numpy())
    features = np.concatenate(found)
    features -= features.mean(axis=0)
    normalised: NDArray[np.float32] = features / np.linalg.norm(features, axis=1, keepdims=True)
    return normalised


def similarities(pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Give the cosine similarity of features and the Hamming distance of hashes of every pair."""
    features = _features(pictures)
    bits = np.stack([_difference_hash(picture) for picture in pictures]).astype(np.float32)
    distance = bits @ (1 - bits.T) + (1 - bits) @ bits.T
    return features @ features.T, distance.astype(np.int16)


def _groups(identifiers: list[str], pictures: NDArray[np.uint8]) -> dict[str, str]:
    """Give each id the smallest id of its group of near duplicates."""
    similarity, distance = similarities(pictures)
    bits, least = DUPLICATE_BITS
    alike = (similarity >= DUPLICATE_SIMILARITY) | ((distance <= bits) & (similarity >= least))
    parent = list(range(len(identifiers)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for first, second in np.argwhere(np.triu(alike, 1)):
        low, high = sorted((root(int(first)), root(int(second))))
        parent[high] = low
    return {identifier: identifiers[root(index)] for index, identifier in enumerate(identifiers)}


def _share(identifier: str) -> float:
    return int(hashlib.sha256(f"{SPLIT_SALT}:{identifier}".encode()).hexdigest()[:12], 16) / 16**12


def pictures() -> list[Picture]:
    """List every ISIC picture with its split; the groups are computed once and kept in the cache folder."""
    folder = data_folder()
    with (folder / "isic2017" / "labels.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["image_id"])
    identifiers = [row["image_id"] for row in rows]
    paths = [folder / "isic2017" / row["split"] / f"{row['image_id']}.jpg" for row in rows]
    stored = cache_folder() / "groups.csv"
    if not stored.exists():
        groups = _groups(identifiers, np.stack([read_rgb(path) for path in paths]))
        with stored.open("w") as file:
            csv.writer(file).writerows(groups.items())
    with stored.open() as file:
        groups = dict(csv.reader(file))
    held_out = {groups[row["image_id"]] for row in rows if row["split"] == "val"}
    found = []
    for row, path in zip(rows, paths, strict=True):
        group = groups[row["image_id"]]
        share = _share(group)
        split = "test" if group in held_out or share < TEST_SHARE else "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"
        square = folder / "isic2018" / "images" / f"{row['image_id']}.jpg"
        mask = folder / "isic2018" / "masks" / f"{row['image_id']}.png"
        present = square.exists()
        found.append(
            Picture(
                row["image_id"],
                CLASSES.index(row["class"]),
                split,
                path,
                square if present else None,
                mask if present and mask.exists() else None,
            )
        )
    return found
