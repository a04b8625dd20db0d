"""How far rows are from a reference's, and what no limit permits."""

from __future__ import annotations

import math

import pytest
import torch

from opticnerve.tensors.distance import LIMITS, Distance, compare

ROWS = torch.arange(1.0, 33.0).view(4, 8)


def changed(row: int, value: float) -> torch.Tensor:
    rows = ROWS.clone()
    rows[row, 3] = value
    return rows


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_too_far_on_either_side(
    precision: str, value: float
) -> None:
    for pair in (
        (changed(2, value), ROWS),
        (ROWS, changed(2, value)),
        (changed(2, value), changed(2, value)),
    ):
        far = compare([(ROWS, ROWS), pair, (ROWS, ROWS)])
        assert not far.within(LIMITS[precision])
        assert "not finite" in far.describe(LIMITS[precision])


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(
    "rows", [ROWS, torch.zeros(4, 8), ROWS * 1e-12, changed(0, 0.0), torch.full((1, 3), 1e-30)]
)
def test_equal_rows_are_no_distance_apart(precision: str, rows: torch.Tensor) -> None:
    near = compare([(rows, rows.clone())])
    assert near == Distance(1.0, 0.0, float(rows.abs().max()))
    assert near.within(LIMITS[precision])


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(
    "got", [ROWS * 2, -ROWS, ROWS.roll(1, 0), torch.zeros(4, 8), changed(3, 0.0)],
    ids=["scaled", "turned", "another order", "zeros", "one number"],
)  # fmt: skip
def test_what_differs_is_too_far(precision: str, got: torch.Tensor) -> None:
    assert not compare([(got, ROWS)]).within(LIMITS[precision])
    assert not compare([(ROWS, got)]).within(LIMITS[precision])


def test_the_worst_row_of_all_pairs_counts() -> None:
    far = compare([(ROWS, ROWS), (ROWS[:1] * -1, ROWS[:1]), (ROWS, ROWS)])
    assert far.cosine == pytest.approx(-1) and far.difference == 16 and far.largest == 32


def test_nothing_and_another_shape_cannot_be_compared() -> None:
    for nothing in ([], [(ROWS[:0], ROWS[:0])]):
        with pytest.raises(ValueError, match="no rows"):
            compare(nothing)
    with pytest.raises(ValueError, match="shape"):
        compare([(ROWS[1:], ROWS)])
