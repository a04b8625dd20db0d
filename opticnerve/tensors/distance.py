"""The distance of rows from a reference's, and its limits.

Used by the gate of engines, the audit of served rows and ``opticnerve verify``. Imports no torch:
it uses the methods of the tensors that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALLEST = 1e-6  # The limit for rows of smaller numbers is a share of this.


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``cosine``: the least of a row with the reference's. ``difference``: the largest of two
    numbers, as a share of the reference's largest number."""

    cosine: float
    difference: float


LIMITS = {
    "float32": Tolerance(0.99999, 1e-3),
    "float16": Tolerance(0.999, 0.05),
    "bfloat16": Tolerance(0.999, 0.1),
}
"""By the dtype in which rows were computed; the reference is exact, or of the same dtype."""


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance of rows from a reference's. If either side has a number that is not finite, the
    cosine is 0 and the difference infinite, beyond every limit."""

    cosine: float  # The smallest of a row with the reference's; 1 for equal rows.
    difference: float  # The largest of two numbers.
    largest: float  # The reference's largest number, by magnitude.

    def within(self, limit: Tolerance) -> bool:
        permitted = limit.difference * max(self.largest, SMALLEST)
        return self.cosine >= limit.cosine and self.difference <= permitted

    def describe(self, limit: Tolerance) -> str:
        """The figures and their limits, for messages."""
        if not math.isfinite(self.difference):
            return "numbers that are not finite"
        return (
            f"cosine {self.cosine:.7f} (at least {limit.cosine:g}), largest difference "
            f"{self.difference:.3g} of {self.largest:.3g} (at most {limit.difference:g} of it)"
        )


def compare(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    """The largest distance of the first of each pair from the second, its reference; both [rows,
    width], on the same device. Raises ValueError for a pair with different shapes, and if there is
    no row."""
    if not any(want.numel() for _, want in pairs):
        raise ValueError("there are no rows to compare")
    cosine, difference, largest = 1.0, 0.0, 0.0
    for got, want in pairs:
        if got.shape != want.shape:
            raise ValueError(f"rows of shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
        if not (got.isfinite().all() and want.isfinite().all()):
            return Distance(0.0, math.inf, math.inf)
        if want.numel():
            got, want = got.double(), want.double()
            cosine = min(cosine, float(_cosines(got, want).min()))
            difference = max(difference, float((got - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
    return Distance(cosine, difference, largest)


def _cosines(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: 1 for equal rows, zeros included; 0 for a row of zeros and another."""
    lengths = got.norm(dim=-1) * want.norm(dim=-1)
    cosines = (got * want).sum(dim=-1) / lengths.clamp(min=1e-300)
    return cosines.masked_fill((got == want).all(dim=-1), 1.0)
