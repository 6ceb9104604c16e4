"""The tables of the design, section "Diagnosis, indicators, gates", and the properties it names."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.items.diagnosis import combine, entropy, indicators
from inference.items.quality import acceptable, combine_quality, limited, quality_band, round_half_up

COLUMNS = ("dermatological_condition", "malignancy", "pigmented_lesion", "urgent_referral", "high_priority_referral")


@st.composite
def distributions(draw: st.DrawFn, size: int | None = None) -> list[float]:
    """Draw probabilities that sum to 1."""
    count = size or draw(st.integers(1, 8))
    weights = draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count).filter(any))
    return [weight / sum(weights) for weight in weights]


def test_three_classes_of_the_table() -> None:
    """0.7 melanoma, 0.2 naevus, 0.1 eczema: malignancy 0.7, pigmented 0.9, urgent 0.7, entropy 0.7298."""
    p = {"melanoma": 0.7, "nevus": 0.2, "eczema": 0.1}
    matrix = {
        "melanoma": {"malignancy": True, "pigmented_lesion": True, "urgent_referral": True},
        "nevus": {"malignancy": False, "pigmented_lesion": True, "urgent_referral": False},
        "eczema": {"malignancy": False, "pigmented_lesion": False, "urgent_referral": False},
    }
    assert indicators(p, matrix) == pytest.approx({"malignancy": 0.7, "pigmented_lesion": 0.9, "urgent_referral": 0.7})
    assert entropy(list(p.values())) == pytest.approx(0.7298, abs=5e-5)


@pytest.mark.parametrize(
    ("p", "marks", "indicator", "uncertainty"),
    [
        ([1, 0, 0, 0], [True] * 4, 1.0, 0.0),
        ([0.25] * 4, [True, True, False, False], 0.5, 1.0),
        ([0.5, 0.5, 0, 0], [False] * 4, 0.0, 0.5),
    ],
)
def test_four_classes_of_the_table(p: list[float], marks: list[bool], indicator: float, uncertainty: float) -> None:
    """The remaining rows of the table hold exactly, and no zero is a minus zero."""
    matrix = {str(number): {"mark": mark} for number, mark in enumerate(marks)}
    found = indicators({str(number): value for number, value in enumerate(p)}, matrix)["mark"]
    assert found == indicator
    assert entropy(p) == pytest.approx(uncertainty)
    assert math.copysign(1, found) == math.copysign(1, entropy(p)) == 1


def test_one_category_has_no_uncertainty() -> None:
    """The entropy of one category is 0, not a division by ln 1."""
    assert entropy([1.0]) == 0.0


@given(distributions())
def test_indicator_and_entropy_stay_in_range(p: list[float]) -> None:
    """Entropy lies in [0, 1]; a column of ones gives 1, a column of zeros 0."""
    matrix = {str(number): {"all": True, "none": False} for number in range(len(p))}
    found = indicators({str(number): value for number, value in enumerate(p)}, matrix)
    assert 0 <= entropy(p) <= 1
    assert found["all"] == pytest.approx(1)
    assert found["none"] == 0


@given(distributions(5), st.lists(st.booleans(), min_size=5, max_size=5), st.permutations(range(5)))
def test_permuting_classes_and_rows_changes_nothing(p: list[float], marks: list[bool], order: list[int]) -> None:
    """Neither entropy nor indicator depends on the order of the classes, to the last bit."""
    matrix = {str(number): {"mark": mark} for number, mark in enumerate(marks)}
    first = indicators({str(number): p[number] for number in range(5)}, matrix)
    second = indicators({str(number): p[number] for number in order}, {str(number): matrix[str(number)] for number in order})
    assert first == second
    assert entropy(p) == entropy([p[number] for number in order])


@given(distributions(4), st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 3))
def test_marking_one_more_class_never_lowers_an_indicator(p: list[float], marks: list[bool], more: int) -> None:
    """The indicator is monotone in the matrix."""
    values = {str(number): value for number, value in enumerate(p)}
    before = indicators(values, {str(number): {"mark": mark} for number, mark in enumerate(marks)})
    after = indicators(values, {str(number): {"mark": mark or number == more} for number, mark in enumerate(marks)})
    assert after["mark"] >= before["mark"]


def test_class_without_a_row_is_refused() -> None:
    """A class without a row is an error, never a 0."""
    with pytest.raises(ValueError, match="no row for nevus"):
        indicators({"melanoma": 0.5, "nevus": 0.5}, {"melanoma": dict.fromkeys(COLUMNS, True)})


@pytest.mark.parametrize("values", [[], [0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]])
def test_what_is_no_distribution_is_refused(values: list[float]) -> None:
    """Empty, wrong sum, outside 0 to 1 and NaN raise."""
    with pytest.raises(ValueError):
        entropy(values)
    with pytest.raises(ValueError):
        combine([values])


@given(st.lists(distributions(3), min_size=1, max_size=3))
def test_combined_images_are_a_distribution(several: list[list[float]]) -> None:
    """The mean of distributions sums to 1 and lies between its parts."""
    mean = combine(several)
    assert math.fsum(mean) == pytest.approx(1)
    for number, value in enumerate(mean):
        assert min(one[number] for one in several) - 1e-12 <= value <= max(one[number] for one in several) + 1e-12


@pytest.mark.parametrize(
    ("score", "band"),
    [
        (0, "bad"), (20, "bad"), (20.49, "bad"), (20.5, "poor"), (21, "poor"), (40, "poor"), (40.5, "fair"), (41, "fair"),
        (60, "fair"), (60.5, "good"), (61, "good"), (80, "good"), (80.5, "excellent"), (81, "excellent"), (100, "excellent"),
    ],
)  # fmt: skip
def test_bands(score: float, band: str) -> None:
    """The edges of the bands, rounded half up first."""
    assert quality_band(score) == band


@pytest.mark.parametrize("score", [-0.1, 100.1, math.nan])
def test_scores_outside_the_scale_are_refused(score: float) -> None:
    """A score outside 0 to 100 has no band."""
    with pytest.raises(ValueError):
        quality_band(score)


def test_half_is_rounded_up_exactly() -> None:
    """20.5 gives 21 and 22.5 gives 23; the number just below one half stays below."""
    assert [round_half_up(value) for value in (0.0, 20.5, 22.5, 0.49999999999999994)] == [0, 21, 23, 0]


def test_accepting_follows_the_shown_score() -> None:
    """What is shown as 41 is accepted at 41."""
    assert acceptable(40.5, 41)
    assert not acceptable(40.4, 41)


def test_mean_of_three_images() -> None:
    """60, 66, 75 give 67.0; no image gives no score."""
    assert combine_quality([60, 66, 75]) == 67.0
    with pytest.raises(ValueError):
        combine_quality([])


@given(st.floats(-50, 150), st.floats(0, 500), st.floats(0, 90))
def test_limits_only_lower(score: float, side: float, contrast: float) -> None:
    """A limit never raises a score, and the result stays on the scale."""
    limits = {"short_side": [(1, 0), (64, 15), (400, 100)], "contrast": [(0, 0), (4, 100)]}
    found = limited(score, {"short_side": side, "contrast": contrast}, limits)
    assert 0 <= found <= max(0, min(score, 100))


def test_limit_is_a_straight_line_between_points() -> None:
    """Halfway between two points lies half of the way up; outside the curve is level."""
    curve = {"contrast": [(0.0, 10.0), (4.0, 50.0)]}
    assert [limited(100, {"contrast": value}, curve) for value in (-1, 0, 2, 4, 9)] == [10, 10, 30, 50, 50]
