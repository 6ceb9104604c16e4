"""A drawn skin picture, so that a newcomer can try the node without a photograph. It shows nobody."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]

_SKIN: Final = ((222, 178, 160), (226, 190, 172), (214, 164, 140), (204, 156, 128), (230, 186, 174))
_PIGMENT: Final = ((150, 98, 66), (112, 68, 44), (74, 44, 32), (44, 28, 26), (92, 84, 96))
"""sRGB: tan, light brown, dark brown, black, blue grey: the colours of dermoscopy."""


def _noise(random: np.random.Generator, shape: tuple[int, int], cells: float, octaves: int = 4) -> Plane:
    """Draw smooth noise of mean 0 and deviation 1: octaves of enlarged random grids, the coarsest of `cells` cells a side."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        side = max(2, round(cells * 2**octave) + 1)
        grid = random.standard_normal((side, side)).astype(np.float32)
        total += cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC) * 0.55**octave
    return np.asarray((total - total.mean()) / max(float(total.std()), 1e-6), np.float32)


def _smooth_step(values: Plane, low: float, high: float) -> Plane:
    place = np.clip((values - low) / (high - low), 0, 1)
    return np.asarray(place * place * (3 - 2 * place), np.float32)


def _net(random: np.random.Generator, shape: tuple[int, int], cell: float) -> Plane:
    """Draw the lines between the cells of a random mosaic, 1 on a line and 0 inside a cell; a cell is about `cell` pixels."""
    rows, columns = shape
    seeds = np.full(shape, 255, np.uint8)
    step = max(3.0, cell)
    centres = np.stack(np.meshgrid(np.arange(step / 2, rows, step), np.arange(step / 2, columns, step), indexing="ij"), -1).reshape(-1, 2)
    centres = centres + random.uniform(-0.45, 0.45, centres.shape) * step
    seeds[np.clip(centres[:, 0], 0, rows - 1).astype(int), np.clip(centres[:, 1], 0, columns - 1).astype(int)] = 0
    _, cells = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    edge = np.zeros(shape, bool)
    edge[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    edge[1:] |= cells[1:] != cells[:-1]
    away = cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, 5)
    return np.exp(-((np.minimum(away, 2 * step) / (0.2 * step)) ** 2)).astype(np.float32)


def _lesion_distance(random: np.random.Generator, shape: tuple[int, int], scale: float) -> Plane:
    """Draw an irregular blob: 0 at its centre, 1 on its border."""
    rows, columns = shape
    row, column = np.mgrid[0:rows, 0:columns].astype(np.float32)
    centre = (rows * random.uniform(0.46, 0.54), columns * random.uniform(0.46, 0.54))
    radius = scale * random.uniform(230, 300)
    turn, stretch = random.uniform(0, np.pi), random.uniform(0.78, 1.0)
    down, right = row - centre[0], column - centre[1]
    along = (right * np.cos(turn) + down * np.sin(turn)) / radius
    across = (down * np.cos(turn) - right * np.sin(turn)) / (radius * stretch)
    angle = np.arctan2(across, along)
    border = np.ones(shape, np.float32)
    for wave in range(2, 9):
        border += np.float32(random.uniform(-0.16, 0.16) / wave**0.8) * np.cos(wave * angle + random.uniform(0, 2 * np.pi)).astype(
            np.float32
        )
    return np.asarray(np.hypot(along, across) / border + 0.05 * _noise(random, shape, 9), np.float32)


def _hairs(random: np.random.Generator, shape: tuple[int, int], scale: float) -> Plane:
    """Draw a few curved hairs, 0 to 1."""
    rows, columns = shape
    drawn = np.zeros(shape, np.uint8)
    mostly = random.uniform(0, np.pi)
    for _ in range(int(random.integers(5, 14))):
        start = np.array([random.uniform(0, columns), random.uniform(0, rows)])
        angle = mostly + random.normal(0, 0.4)
        length = scale * random.uniform(250, 700)
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        bend = (start + end) / 2 + scale * random.normal(0, 70, 2)
        t = np.linspace(0, 1, 60)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        points = np.round(curve * 16).astype(np.int32).reshape(-1, 1, 2)
        shade, width = int(random.integers(150, 235)), max(1, round(scale * random.uniform(2, 4.5)))
        cv2.polylines(drawn, [points], isClosed=False, color=shade, thickness=width, lineType=cv2.LINE_AA, shift=4)
    return (cv2.GaussianBlur(drawn, (0, 0), max(0.4, 0.8 * scale)) / 255).astype(np.float32)


def draw_skin_picture(seed: int = 0, rows: int = 1024, columns: int = 1024) -> NDArray[np.uint8]:
    """Draw a pigmented lesion on skin, as under a dermatoscope: the same `seed` and size give the same picture.

    Returns
    -------
    ndarray
        uint8, shape (rows, columns, 3), sRGB.
    """
    random = np.random.default_rng(seed)
    shape = (rows, columns)
    scale = min(rows, columns) / 1024
    skin = np.array(_SKIN[int(random.integers(len(_SKIN)))], np.float32)
    picture = np.ones((rows, columns, 3), np.float32) * skin
    # redness and brightness of the skin vary slowly; furrows and fine grain lie over it
    picture += _noise(random, shape, 3)[..., None] * np.array([2.5, 4.0, 4.0], np.float32)
    picture += _noise(random, shape, 24, 3)[..., None] * np.array([1.5, 2.2, 2.0], np.float32)
    furrows = cv2.GaussianBlur(_net(random, shape, 34 * scale), (0, 0), max(0.5, 2.5 * scale))
    picture -= (furrows * _smooth_step(_noise(random, shape, 5), -1.0, 1.5))[..., None] * np.array([7, 9, 9], np.float32)

    distance = _lesion_distance(random, shape, scale)
    # pigment fades out over a different width at each place of the border
    softness = 0.10 + 0.12 * _smooth_step(_noise(random, shape, 3, 2), -0.5, 1.5)
    inside = 1 - _smooth_step((distance - 1) / softness, -1, 1)
    colours = np.array(_PIGMENT, np.float32)
    pigment = np.broadcast_to(colours[0], picture.shape).copy()
    shares = (
        (1, 1 - _smooth_step(distance + 0.22 * _noise(random, shape, 4), 0.35, 0.95)),
        (2, _smooth_step(_noise(random, shape, 5), 0.1, 1.0) * (1 - _smooth_step(distance, 0.55, 0.95))),
        (4, 0.55 * _smooth_step(_noise(random, shape, 3, 3), 0.9, 1.7) * (1 - _smooth_step(distance, 0.3, 0.8))),
        (3, 0.8 * _smooth_step(_noise(random, shape, 7), 1.2, 1.8) * (1 - _smooth_step(distance, 0.5, 0.9))),
    )
    for index, share in shares:
        pigment += share[..., None] * (colours[index] - pigment)
    net = cv2.GaussianBlur(_net(random, shape, 17 * scale), (0, 0), max(0.4, 1.4 * scale))
    netted = _smooth_step(distance + 0.25 * _noise(random, shape, 4), 0.25, 0.8)
    pigment *= 1 - (0.30 * net * netted)[..., None] + (0.10 * (1 - net) * netted)[..., None]
    pigment += 5 * _noise(random, shape, 40, 3)[..., None]
    opacity = inside * (0.82 + 0.10 * _smooth_step(_noise(random, shape, 6), -1, 1))
    picture += opacity[..., None] * (pigment - picture)

    globules = np.zeros(shape, np.uint8)
    for _ in range(int(random.integers(25, 60))):
        row, column = int(random.uniform(0.2, 0.8) * rows), int(random.uniform(0.2, 0.8) * columns)
        if 0.45 < distance[row, column] < 1.0:
            cv2.circle(globules, (column, row), max(1, round(scale * random.uniform(3, 7))), int(random.integers(90, 200)), -1, cv2.LINE_AA)
    dots = cv2.GaussianBlur(globules, (0, 0), max(0.4, 1.6 * scale)).astype(np.float32) / 255
    picture += dots[..., None] * (colours[2] - picture)
    hairs = _hairs(random, shape, scale)
    picture += 0.85 * hairs[..., None] * (np.array([38, 27, 24], np.float32) - picture)

    # a lamp brighter in the middle, the lens' softness, the sensor's grain
    row, column = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j].astype(np.float32)
    picture *= (1.03 - 0.16 * (row**2 + column**2) ** 1.2 / 2)[..., None]
    picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), max(0.3, 0.7 * scale)), np.float32)
    picture += random.normal(0, 1.6, picture.shape).astype(np.float32)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)
