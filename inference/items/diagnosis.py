"""The arithmetic of a diagnosis distribution: entropy, indicators, several images (items.md section 6). No network here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

SUM_TOLERANCE: Final = 1e-6


def _checked(probabilities: Sequence[float]) -> None:
    if not probabilities:
        raise ValueError("a distribution needs at least one category")
    if not all(0 <= value <= 1 for value in probabilities):  # also catches NaN
        raise ValueError("a probability lies in 0 to 1")
    if abs(math.fsum(probabilities) - 1) > SUM_TOLERANCE:
        raise ValueError(f"a distribution sums to 1, this one to {math.fsum(probabilities)}")


def _clipped(value: float) -> float:
    """Keep within [0, 1] what rounding may have pushed out; 0.0, never -0.0."""
    return min(max(value, 0.0), 1.0) + 0.0


def entropy(probabilities: Sequence[float]) -> float:
    """Entropy of a distribution, normalised to [0, 1]; 0 when there is one category.

    H = -sum(p ln p) / ln n.

    Raises
    ------
    ValueError
        The values are no distribution (each in 0 to 1, sum 1 within 1e-6).
    """
    _checked(probabilities)
    if len(probabilities) == 1:
        return 0.0
    return _clipped(math.fsum(-value * math.log(value) for value in probabilities if value > 0) / math.log(len(probabilities)))


def indicators(probabilities: Mapping[str, float], matrix: Mapping[str, Mapping[str, bool]]) -> dict[str, float]:
    """Probability of each column of a boolean matrix: the sum over the classes that the column marks.

    Parameters
    ----------
    probabilities
        By class; sum 1.
    matrix
        A row for each class, every row with the same columns.

    Returns
    -------
    dict
        By column, in the order of the first row; each in [0, 1].

    Raises
    ------
    ValueError
        A class has no row (it never counts as 0), the rows' columns differ, or the values are no distribution.
    """
    _checked(list(probabilities.values()))
    missing = [key for key in probabilities if key not in matrix]
    if missing:
        raise ValueError(f"the matrix has no row for {', '.join(sorted(missing))}; add one to the bundle's manifest")
    columns = list(next(iter(matrix.values())))
    if any(set(row) != set(columns) for row in matrix.values()):
        raise ValueError("the rows of the matrix have different columns")
    return {column: _clipped(math.fsum(value for key, value in probabilities.items() if matrix[key][column])) for column in columns}


def combine(distributions: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Give the mean distribution of several images of one lesion.

    Raises
    ------
    ValueError
        No image, different numbers of categories, or values that are no distribution.
    """
    if not distributions:
        raise ValueError("no image, no distribution")
    for distribution in distributions:
        _checked(distribution)
    if len({len(distribution) for distribution in distributions}) > 1:
        raise ValueError("the distributions have different numbers of categories")
    return tuple(math.fsum(values) / len(distributions) for values in zip(*distributions, strict=True))
