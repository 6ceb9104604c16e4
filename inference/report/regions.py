"""Outlines and masks as DICOM wants them: closed polygons inside the image, one mask a lesion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.geometry import labelled, thinned
from inference.records import Lesion

MAX_VERTICES = 300
"""Of one outline: more slows viewers, and Graphic Data (VR FL) ends at 8191 points."""
_MAX_COMPONENTS = 1000
_SAMPLES = 64


def outline(polygon: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32] | None:
    """Bring a polygon into the form a report carries.

    Parameters
    ----------
    polygon
        Shape (vertices, 2), (column, row) in pixels of the stored image; open or closed.
    rows, columns
        Size of the image: vertices are clamped to [0, columns] x [0, rows].

    Returns
    -------
    NDArray or None
        float32, shape (vertices, 2), closed, at most 300 vertices; None when it encloses no area.
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) < 3:
        return None
    points = np.clip(points, 0, (columns, rows)).astype(np.float32).astype(np.float64)
    moved = np.ones(len(points), dtype=bool)
    moved[1:] = (np.diff(points, axis=0) != 0).any(axis=1)
    points = points[moved]
    if (points[0] != points[-1]).any():
        points = np.vstack([points, points[:1]])
    thin = thinned(points.astype(np.float32), MAX_VERTICES)
    return thin if len(thin) > 3 and _area(thin.astype(np.float64)) > 0 else None


def _area(closed: NDArray[np.float64]) -> float:
    x, y = closed[:, 0] - closed[0, 0], closed[:, 1] - closed[0, 1]
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def _inside(points: NDArray[np.float64], polygon: NDArray[np.float64]) -> int:
    """How many points lie inside a closed polygon (even-odd rule)."""
    x, y = points[:, :1], points[:, 1:]
    x0, y0, x1, y1 = polygon[:-1, 0], polygon[:-1, 1], polygon[1:, 0], polygon[1:, 1]
    crosses = (y0 > y) != (y1 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
    return int(((crosses & (x < at)).sum(axis=1) % 2).sum())


def share_out(mask: NDArray[np.bool_], lesions: tuple[Lesion, ...]) -> NDArray[Any] | None:
    """Share a mask out among its lesions.

    Every connected component goes whole to the lesion whose outline covers it most; one that lies outside all outlines
    goes to the nearest. So the parts never overlap, and together they are the mask.

    Parameters
    ----------
    mask
        bool, shape (rows, columns), some of it set.
    lesions
        1 to 255, their polygons as `outline` gives them.

    Returns
    -------
    NDArray or None
        Shape of `mask`: 0 outside, k where the k-th lesion (from 1) is; None when the mask is too ragged to be shared out.
    """
    if len(lesions) == 1:
        return mask
    labels = labelled(mask)
    count = int(labels.max())
    if count > _MAX_COMPONENTS:
        return None
    # A component is known by the middles of its runs of pixels along the rows; some of them are enough.
    columns = mask.shape[1] + 1
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (0, 1))).ravel(), prepend=np.int8(0))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    lines = starts // columns
    component = labels[lines, starts - lines * columns]
    middles = np.column_stack([(starts + stops) / 2 - lines * columns, lines + 0.5])
    polygons = [np.asarray(lesion.polygon, dtype=np.float64) for lesion in lesions]
    owner = np.zeros(count + 1, dtype=np.uint8)
    for number in range(1, count + 1):
        sample = middles[component == number]
        sample = sample[:: max(1, len(sample) // _SAMPLES)]
        covered = [_inside(sample, polygon) for polygon in polygons]
        if max(covered):
            owner[number] = np.argmax(covered) + 1
        else:
            owner[number] = np.argmin([((polygon - sample[0]) ** 2).sum(axis=1).min() for polygon in polygons]) + 1
    return owner[labels]
