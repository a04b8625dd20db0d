"""A small tower and its graph, for tests of what serves engines. No family's.

A row is a linear map of its patches, averaged over a merge block, plus the mean of its picture: a
picture that is padded wrongly, or mixed with another, has other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from encoder_service.backends.base import Bucket
from opticnerve.media.plan import Grid, Modality, Plan
from opticnerve.models.towers.graph import PATCHES, PICTURES, GraphInput, Tensors, TowerGraph

MERGED = 4  # Patches of a row.
COLUMNS = 24
SIDE = 2  # Of a patch, in pixels.
WIDTH = 3 * SIDE**2
BUCKETS = (Bucket(8, 3), Bucket(32, 2))


class SmallModule(nn.Module):
    """Pixels [pictures, patches, width] and which are real -> rows [pictures, tokens, COLUMNS]."""

    def __init__(self, width: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, COLUMNS, generator=generator) / width**0.5)
        self.to(dtype).requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor]:
        rows = (pixels.to(self.weight.dtype) / 255) @ self.weight * real[..., None]
        mean = rows.sum(1, keepdim=True) / real.sum(1)[:, None, None]
        merged = rows.unflatten(1, (-1, MERGED)).mean(2)
        return (torch.tanh(merged) + mean,)


class SmallTower:
    """Implements ``family.Tower``: every picture alone, without padding."""

    hidden_size = COLUMNS

    def __init__(self, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.module = SmallModule(width, dtype, seed)
        self.dtype, self.device = dtype, torch.device("cpu")
        self.calls: list[int] = []  # Pictures of each.

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        self.calls.append(len(plans))
        made = []
        for each in pixels:
            patches = torch.from_numpy(each.reshape(1, len(each), -1))
            (rows,) = self.module(patches, torch.ones(1, len(each), dtype=self.dtype))
            made.append({"rows": rows[0]})
        return made


class SmallGraph(TowerGraph):
    """The graph of a ``SmallTower``."""

    output_names = ("rows",)
    unit = MERGED

    def __init__(self, tower: Any) -> None:
        self.module: Any = tower.module
        self.dtype, self.device = tower.dtype, tower.device
        self.hidden_size = COLUMNS
        self.width = len(tower.module.weight)
        self.inputs: Mapping[str, GraphInput] = {
            "pixels": GraphInput((PICTURES, PATCHES, self.width), torch.uint8),
            "real": GraphInput((PICTURES, PATCHES), self.dtype),
        }

    def tokens(self, patches: int) -> int:
        return patches // MERGED

    def pictures(self, plan: Plan) -> int:
        return 1

    def patches(self, plan: Plan) -> int:
        return plan.num_patches

    def prepare(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan], patches: int
    ) -> dict[str, torch.Tensor]:
        made = self.example(len(plans), patches)
        for i, each in enumerate(pixels):
            made["pixels"][i, : len(each)] = torch.from_numpy(each.reshape(len(each), -1))
            made["real"][i, : len(each)] = 1
        return made

    def split(self, outputs: Tensors, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        rows = outputs["rows"]
        return [{"rows": rows[i, : plan.num_tokens].clone()} for i, plan in enumerate(plans)]


# ---- pictures for them


def plan_of(patches: int) -> Plan:
    width, height = SIDE * patches // 2, SIDE * 2
    grid = Grid(1, 2, patches // 2)
    return Plan(
        Modality.IMAGE, "png", width, height, 1, width, height, grid, patches // MERGED, patches
    )  # fmt: skip


def pictures(*patches: int) -> tuple[list[NDArray[np.uint8]], list[Plan]]:
    random = np.random.default_rng(sum(patches))
    return (
        [random.integers(0, 255, (n, SIDE, SIDE, 3), dtype=np.uint8) for n in patches],
        [plan_of(n) for n in patches],
    )


def check_rows(got: Sequence[Any], tower: SmallTower, pixels: Any, plans: Any) -> None:
    for mine, right in zip(got, tower.encode(pixels, plans), strict=True):
        assert mine["rows"].shape == right["rows"].shape
        torch.testing.assert_close(mine["rows"], right["rows"], rtol=1e-5, atol=1e-5)
