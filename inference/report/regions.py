"""Outlines and masks as DICOM wants them: closed polygons inside the image, one mask a lesion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.records import Lesion

MAX_VERTICES = 300
"""Of one outline: more slows viewers, and Graphic Data (VR FL) ends at 8191 points."""
_MAX_RUNS = 200_000
_MAX_COMPONENTS = 1000
_SAMPLES = 64


def _farthest(points: NDArray[np.float64]) -> tuple[int, float]:
    """Index of the point farthest from the chord between the ends, and its squared distance."""
    chord = points[-1] - points[0]
    offset = points[1:-1] - points[0]
    length = float(chord @ chord)
    if length == 0:
        distance = (offset * offset).sum(axis=1)
    else:
        along = np.clip(offset @ chord / length, 0, 1)
        distance = ((offset - along[:, None] * chord) ** 2).sum(axis=1)
    index = int(distance.argmax())
    return index + 1, float(distance[index])


def _simplified(points: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """At most `limit` vertices of a closed polygon, by splitting where the outline is farthest from what is kept (Douglas-Peucker)."""
    # Each segment between kept vertices waits with the vertex that would split it best; the farthest one splits first.
    kept = [0, len(points) - 1]
    waiting: list[tuple[float, int, int, int]] = []

    def wait(start: int, stop: int) -> None:
        if stop - start > 1:
            index, distance = _farthest(points[start : stop + 1])
            waiting.append((distance, start, start + index, stop))

    wait(0, len(points) - 1)
    while waiting and len(kept) < limit:
        best = max(range(len(waiting)), key=lambda position: waiting[position][0])
        _, start, middle, stop = waiting.pop(best)
        kept.append(middle)
        wait(start, middle)
        wait(middle, stop)
    return points[sorted(kept)]


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
    if len(points) > MAX_VERTICES:
        points = _simplified(points, MAX_VERTICES)
    if len(points) < 4 or _area(points) == 0:
        return None
    return points.astype(np.float32)


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


def _components(starts: NDArray[np.int64], stops: NDArray[np.int64], lines: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected component (8 neighbours) of each run of set pixels; runs in reading order."""
    parent = list(range(len(starts)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    begins, ends, rows = starts.tolist(), stops.tolist(), lines.tolist()
    above = 0
    for run in range(len(begins)):
        while rows[above] < rows[run] - 1 or (rows[above] == rows[run] - 1 and ends[above] < begins[run]):
            above += 1
        other = above
        while other < run and rows[other] == rows[run] - 1 and begins[other] <= ends[run]:
            parent[root(other)] = root(run)
            other += 1
    return np.unique([root(run) for run in range(len(begins))], return_inverse=True)[1]


def share_out(mask: NDArray[np.bool_], lesions: tuple[Lesion, ...]) -> NDArray[Any] | None:
    """Share a mask out among its lesions.

    Every connected component goes whole to the lesion whose outline covers it most; one that lies outside all outlines goes to the nearest.
    So the parts never overlap, and together they are the mask.

    Returns
    -------
    NDArray or None
        Shape of `mask`: 0 outside, k where the k-th lesion (from 1) is; None when the mask is too ragged to be shared out.
    """
    if len(lesions) == 1:
        return mask
    rows, columns = mask.shape
    flat = np.zeros((rows, columns + 1), dtype=np.int8)
    flat[:, :columns] = mask
    edges = np.diff(flat.ravel(), prepend=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if len(starts) > _MAX_RUNS:
        return None
    lines = starts // (columns + 1)
    starts, stops = starts - lines * (columns + 1), stops - lines * (columns + 1)
    component = _components(starts, stops, lines) if len(starts) else np.zeros(0, dtype=np.int64)
    count = int(component.max()) + 1 if len(component) else 0
    if count > _MAX_COMPONENTS:
        return None
    polygons = [np.asarray(lesion.polygon, dtype=np.float64).reshape(-1, 2) for lesion in lesions]
    middles = np.column_stack([(starts + stops) / 2, lines + 0.5])
    owner = np.zeros(count, dtype=np.int64)
    for index in range(count):
        sample = middles[component == index]
        sample = sample[:: max(1, len(sample) // _SAMPLES)]
        covered = [_inside(sample, polygon) if len(polygon) > 3 else 0 for polygon in polygons]
        if max(covered):
            owner[index] = int(np.argmax(covered))
        else:
            owner[index] = int(np.argmin([((polygon - sample[0]) ** 2).sum(axis=1).min(initial=np.inf) for polygon in polygons]))
    labels = np.zeros((rows, columns + 1), dtype=np.int32)
    np.add.at(labels, (lines, starts), owner[component] + 1)
    np.add.at(labels, (lines, stops), -(owner[component] + 1))
    return labels.cumsum(axis=1, dtype=np.int32)[:, :columns]
