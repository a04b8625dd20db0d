"""How far rows are from a reference's, and how far they may be.

The engines' gate, the audit of what is served and ``opticnerve verify`` hold rows to it. It imports
no torch: it uses the methods of the tensors that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALLEST = 1e-6  # Rows of smaller numbers than this may differ by a share of it.


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``cosine``: of each row with the reference's, at least. ``difference``: of two numbers, at
    most, as a share of the reference's largest number."""

    cosine: float
    difference: float


LIMITS = {
    "float32": Tolerance(0.99999, 1e-3),
    "float16": Tolerance(0.999, 0.05),
    "bfloat16": Tolerance(0.999, 0.1),
}
"""By the precision in which rows were computed; the reference is exact or in the same one."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of rows from a reference's. Numbers that are not finite, on either side, are a cosine of 0
    and an infinite difference, which no limit permits."""

    cosine: float  # Of a row with the reference's, the smallest; of equal rows 1.
    difference: float  # Of two numbers, the largest.
    largest: float  # Number of the reference, by magnitude.

    def within(self, limit: Tolerance) -> bool:
        permitted = limit.difference * max(self.largest, SMALLEST)
        return self.cosine >= limit.cosine and self.difference <= permitted

    def describe(self, limit: Tolerance) -> str:
        """The figures, and what they are held to."""
        if not math.isfinite(self.difference):
            return "numbers that are not finite"
        return (
            f"cosine {self.cosine:.7f} (at least {limit.cosine:g}), largest difference "
            f"{self.difference:.3g} of {self.largest:.3g} (at most {limit.difference:g} of it)"
        )


def compare(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    """How far the first of each pair is from the second, its reference: both [rows, width], on
    the same device. Raises ValueError for pairs of two shapes, and where there is no row."""
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
    """[rows]. Of equal rows 1, of zeros too; of a row of zeros with another 0."""
    lengths = got.norm(dim=-1) * want.norm(dim=-1)
    cosines = (got * want).sum(dim=-1) / lengths.clamp(min=1e-300)
    return cosines.masked_fill((got == want).all(dim=-1), 1.0)
