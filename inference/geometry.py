"""Pictures to the size a network wants, masks to outlines. With ``pixels.py`` and ``drawing.py`` the only importer of cv2 in the node."""

from __future__ import annotations

from typing import Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_VERTICES: Final = 200
TOLERANCE: Final = 0.5
"""Of the simplification of outlines (Douglas-Peucker), in pixels."""


def resized(frame: NDArray[np.uint8], rows: int, columns: int, aspect: Literal["squeeze", "centre"] = "squeeze") -> NDArray[np.uint8]:
    """Resize a picture: by area averages where it shrinks in both directions, else linearly.

    Parameters
    ----------
    frame
        uint8, shape (rows, columns, 3).
    aspect
        ``squeeze`` keeps the whole picture, ``centre`` the largest centred square.
    """
    if aspect == "centre":
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        frame = frame[top : top + side, left : left + side]
    if frame.shape[:2] == (rows, columns):
        return frame
    shrinks = frame.shape[0] >= rows and frame.shape[1] >= columns
    return np.asarray(cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), np.uint8)


def enlarged(values: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Resize a float map, shape (rows, columns), linearly."""
    return np.asarray(cv2.resize(values, (columns, rows), interpolation=cv2.INTER_LINEAR), np.float32)


def contrast(frame: NDArray[np.uint8]) -> float:
    """Standard deviation of the luminance (0 to 255) of a picture."""
    return float(cv2.meanStdDev(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))[1][0, 0])


def components(mask: NDArray[np.bool_], minimum_area: float) -> list[NDArray[np.bool_]]:
    """Split a mask into its 8-connected parts of at least `minimum_area` pixels, by falling area, then from the top left."""
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = [(-int(statistics[number, cv2.CC_STAT_AREA]), number) for number in range(1, count)]
    return [labels == number for area, number in sorted(areas) if -area >= minimum_area]


def labelled(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the 8-connected parts of a mask from 1, in no particular order; 0 outside. Shape of `mask`, not empty."""
    return np.asarray(cv2.connectedComponents(mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1], np.int32)


def thinned(polygon: NDArray[np.float32], limit: int) -> NDArray[np.float32]:
    """Leave out vertices of a closed polygon, shape (vertices, 2), that matter least, until at most `limit` remain; closed again."""
    tolerance, points = TOLERANCE, polygon
    while len(points) > limit:
        simple = cv2.approxPolyDP(np.ascontiguousarray(polygon[:-1], np.float32).reshape(-1, 1, 2), tolerance, closed=True)[:, 0, :]
        points = np.vstack([simple, simple[:1]]).astype(np.float32)
        tolerance *= 1.25
    return points


def outline(mask: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """Give the outer outline of one connected region along the edges of its pixels.

    Returns
    -------
    ndarray or None
        float32, shape (vertices, 2), (column, row) with (0, 0) at the top left corner of the top left pixel; closed (the
        first point repeated), at most `MAX_VERTICES` + 1 points, inside [0, columns] x [0, rows]. None for an empty mask.
    """
    if not mask.any():
        return None
    rows, columns = mask.shape
    where_rows, where_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(where_rows[0]), int(where_columns[0])
    region = mask[top : int(where_rows[-1]) + 1, left : int(where_columns[-1]) + 1].astype(np.uint8)
    # the grid of pixel corners: a corner belongs to the region when one of its four pixels does. Its contour runs along
    # the outer edges, so that the outline encloses every pixel and even a single pixel has an area.
    corners = np.zeros((region.shape[0] + 1, region.shape[1] + 1), np.uint8)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corners[down : down + region.shape[0], right : right + region.shape[1]] |= region
    contours, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=cv2.contourArea)
    tolerance = TOLERANCE
    simple = cv2.approxPolyDP(contour, tolerance, closed=True)
    while len(simple) > MAX_VERTICES:
        tolerance *= 1.25
        simple = cv2.approxPolyDP(contour, tolerance, closed=True)
    if len(simple) < 3 or cv2.contourArea(simple) <= 0:
        column, row, width, height = cv2.boundingRect(contour)
        box = [(column, row), (column + width - 1, row), (column + width - 1, row + height - 1), (column, row + height - 1)]
        simple = np.array(box, np.int32).reshape(-1, 1, 2)
    placed = simple[:, 0, :].astype(np.float32) + np.array([left, top], np.float32)
    placed = np.clip(placed, 0, np.array([columns, rows], np.float32))
    return np.vstack([placed, placed[:1]]).astype(np.float32)
