"""Towers of small random checkpoints as graphs, and pictures for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.media.plan import Plan, Structure
from opticnerve.models import registry
from opticnerve.models.towers.graph import Tensors, TowerGraph
from tests.checkpoints import FAMILIES
from tests.families import samples
from tests.reference import picture

Items = list[dict[str, torch.Tensor]]

DECLARED = {family.name: family for family in registry.families().values()}
EXPORTABLE = [name for name in FAMILIES if DECLARED[samples()[name].family].graph]
# One sample a family: exporting takes seconds.
FAMILIES_TO_EXPORT = list({samples()[name].family: name for name in EXPORTABLE[::-1]}.values())
# Batches of pictures: one, several of different sizes, and windows that edges cut.
BATCHES = (((100, 80),), ((300, 200), (57, 201), (120, 120)), ((28, 400), (260, 230)))


@dataclass(frozen=True, eq=False)
class Half:
    """The vision half of a checkpoint, as a tower and as a graph of the same weights."""

    layout: Any
    preprocess: Any
    tower: Any
    graph: TowerGraph

    @classmethod
    def load(cls, path: Path, dtype: str = "float32", device: str = "cpu") -> Half:
        checkpoint = Checkpoint.open(str(path), side="encoder")
        layout = registry.make_layout(checkpoint)
        tower = registry.load_tower(checkpoint, dtype, device)
        preprocess = registry.make_preprocessor(checkpoint, layout)
        return cls(layout, preprocess, tower, registry.make_graph(checkpoint, tower))

    def batch(self, sizes: Sequence[tuple[int, int]]) -> tuple[list[NDArray[np.uint8]], list[Plan]]:
        plans = [self.layout.plan(Structure("png", *size)) for size in sizes]
        images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
        pairs = zip(images, plans, strict=True)
        return [self.preprocess(image, plan) for image, plan in pairs], plans

    def bucket(self, plans: Sequence[Plan], spare: int = 2) -> int:
        """One that holds them all, and ``spare`` units of padding."""
        fixed = self.graph.fixed_patches
        return fixed or max(map(self.graph.patches, plans)) + spare * self.graph.unit

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """The graph, by torch."""
        assert self.graph.module is not None
        with torch.inference_mode():
            return dict(zip(self.graph.output_names, self.graph.module(**inputs), strict=True))


def lowest_cosine(items: Items, expected: Items) -> float:
    """Of all rows of all tensors; their names and shapes must be equal."""
    lowest = 1.0
    for item, wanted in zip(items, expected, strict=True):
        assert item.keys() == wanted.keys()
        for name, rows in wanted.items():
            assert item[name].shape == rows.shape
            cosine = F.cosine_similarity(item[name].double(), rows.double(), dim=-1)
            lowest = min(lowest, float(cosine.min()))
    return lowest


def largest_difference(items: Items, expected: Items) -> float:
    """Of all tensors, relative to the largest value of each."""
    return max(
        float((item[name].float() - rows.float()).abs().max() / rows.float().abs().max())
        for item, wanted in zip(items, expected, strict=True)
        for name, rows in wanted.items()
    )
