"""Resizing and outlines."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from inference import geometry


def test_one_pixel_is_its_own_square() -> None:
    """The outline of one pixel runs along its four edges, not through its centre."""
    mask = np.zeros((5, 7), np.bool_)
    mask[2, 3] = True
    polygon = geometry.outline(mask)
    assert polygon is not None
    assert {tuple(point) for point in polygon.tolist()} == {(3.0, 2.0), (4.0, 2.0), (4.0, 3.0), (3.0, 3.0)}
    assert polygon[0].tolist() == polygon[-1].tolist()


@given(st.integers(0, 10), st.integers(0, 10), st.integers(1, 9), st.integers(1, 9))
def test_rectangle_is_exact(top: int, left: int, height: int, width: int) -> None:
    """A rectangle of pixels has exactly its area and corners as outline."""
    mask = np.zeros((20, 20), np.bool_)
    mask[top : top + height, left : left + width] = True
    polygon = geometry.outline(mask)
    assert polygon is not None
    assert polygon.min(axis=0).tolist() == [left, top]
    assert polygon.max(axis=0).tolist() == [left + width, top + height]
    assert cv2.contourArea(polygon) == height * width


@settings(max_examples=150, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 24), st.integers(1, 24))))
def test_every_region_is_enclosed(mask: np.ndarray) -> None:
    """Regions divide the mask; an outline is closed, inside the image, has an area, and leaves no pixel out by more than the tolerance."""
    regions = geometry.components(mask, 1)
    assert sum(int(region.sum()) for region in regions) == int(mask.sum())
    assert [int(region.sum()) for region in regions] == sorted((int(region.sum()) for region in regions), reverse=True)
    for region in regions:
        polygon = geometry.outline(region)
        assert polygon is not None
        assert polygon.dtype == np.float32
        assert np.array_equal(polygon[0], polygon[-1])
        assert 4 <= len(polygon) <= geometry.MAX_VERTICES + 1
        assert (polygon >= 0).all()
        assert (polygon <= np.array(mask.shape[::-1])).all()
        assert cv2.contourArea(polygon) > 0
        for row, column in np.argwhere(region):
            distance = cv2.pointPolygonTest(polygon.reshape(-1, 1, 2), (float(column) + 0.5, float(row) + 0.5), measureDist=True)
            assert distance >= -geometry.TOLERANCE


def test_ragged_outline_is_thinned() -> None:
    """A border of thousands of points is brought down to the limit and keeps the area within a few percent."""
    random = np.random.default_rng(3)
    angle = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    radius = 700 + random.normal(0, 25, angle.size)
    points = np.stack([1000 + radius * np.cos(angle), 1000 + radius * np.sin(angle)], 1).astype(np.int32)
    mask = cv2.fillPoly(np.zeros((2000, 2000), np.uint8), [points], 1).astype(np.bool_)
    largest = geometry.components(mask, 1)[0]
    polygon = geometry.outline(largest)
    assert polygon is not None
    assert 50 < len(polygon) <= geometry.MAX_VERTICES + 1
    assert cv2.contourArea(polygon) == pytest.approx(int(largest.sum()), rel=0.05)


def test_empty_mask_has_no_outline() -> None:
    """Nothing found gives no polygon, not an empty one."""
    assert geometry.outline(np.zeros((4, 4), np.bool_)) is None
    assert geometry.components(np.zeros((4, 4), np.bool_), 1) == []


def test_small_regions_are_dropped() -> None:
    """Regions below the least area are left out."""
    mask = np.zeros((10, 10), np.bool_)
    mask[0, 0] = mask[5:8, 5:8] = True
    assert [int(region.sum()) for region in geometry.components(mask, 2)] == [9]


def test_centre_takes_the_middle_square() -> None:
    """With aspect "centre" the sides of a wide picture are cut, with "squeeze" they are kept."""
    frame = np.zeros((100, 300, 3), np.uint8)
    frame[:, 100:200] = 255
    assert geometry.resized(frame, 50, 50, "centre").min() == 255
    assert geometry.resized(frame, 50, 50, "squeeze").mean() == pytest.approx(85, abs=2)


def test_contrast_of_even_and_half_black() -> None:
    """An even picture has no contrast, half black and half white has 127.5."""
    frame = np.full((10, 10, 3), 90, np.uint8)
    assert geometry.contrast(frame) == 0
    frame[:5], frame[5:] = 0, 255
    assert geometry.contrast(frame) == pytest.approx(127.5)
