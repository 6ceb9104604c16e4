"""The quality score's arithmetic: bands, measured limits, several images (items.md section 6). No network here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Final

BANDS: Final = ((20, "bad"), (40, "poor"), (60, "fair"), (80, "good"), (100, "excellent"))
"""Highest rounded score of each band; 0 is bad."""


def _in_range(score: float) -> float:
    if not 0 <= score <= 100:  # also catches NaN
        raise ValueError(f"a quality score lies in 0 to 100, not {score}")
    return score


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves upwards (20.5 to 21), without the error of adding 0.5 in binary."""
    return math.floor(Fraction(value) + Fraction(1, 2))


def quality_band(score: float) -> str:
    """Name the band of a score of 0 to 100, rounded half up first.

    Raises
    ------
    ValueError
        The score is not in 0 to 100.
    """
    rounded = round_half_up(_in_range(score))
    return next(name for highest, name in BANDS if rounded <= highest)


def acceptable(score: float, threshold: float) -> bool:
    """Say whether the score, rounded half up as it is shown, reaches the threshold."""
    return round_half_up(_in_range(score)) >= threshold


def limited(score: float, measured: Mapping[str, float], limits: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Lower `score` to the smallest limit that a measured property sets.

    Parameters
    ----------
    score
        The network's score; clipped to 0 to 100.
    measured
        Value of each property (short side in pixels, contrast ...).
    limits
        Of each property, points (value, highest score), values rising; straight lines between, level outside.

    Raises
    ------
    KeyError
        A limit names a property that was not measured.
    """
    lowest = min(max(score, 0.0), 100.0)
    for name, points in limits.items():
        lowest = min(lowest, _interpolated(measured[name], points))
    return max(lowest, 0.0)


def _interpolated(value: float, points: Sequence[tuple[float, float]]) -> float:
    if value <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if value <= right:
            return low + (high - low) * (value - left) / (right - left)
    return points[-1][1]


def combine_quality(scores: Sequence[float]) -> float:
    """Give the arithmetic mean of the scores of several images (60, 66, 75 gives 67).

    Raises
    ------
    ValueError
        No score, or one outside 0 to 100.
    """
    if not scores:
        raise ValueError("no image, no quality score")
    return math.fsum(_in_range(score) for score in scores) / len(scores)
