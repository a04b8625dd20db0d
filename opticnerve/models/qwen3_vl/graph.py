"""The graph of Qwen3-VL's tower: learned positions are an input, DeepStack levels are outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opticnerve.models.qwen3_vl.vision import DeepStackTower
from opticnerve.models.towers.graph import PATCHES, PICTURES, GraphInput
from opticnerve.models.towers.patch_graph import PatchGraph

if TYPE_CHECKING:
    from opticnerve.media.plan import Grid


class DeepStackGraph(PatchGraph):
    """Adds to PatchGraph the input "position_rows", the learned positions interpolated to a frame's
    grid, [pictures, patches, width], and an output for each DeepStack level."""

    def __init__(self, tower: DeepStackTower) -> None:
        module = tower.module
        layers = module.config.deepstack_visual_indexes
        levels = dict(zip(layers, module.deepstack_merger_list, strict=True))
        super().__init__(tower, levels=levels)
        self._interpolate = tower.interpolate
        self._positions: torch.Tensor = module.pos_embed.weight
        rows = GraphInput((PICTURES, PATCHES, self._positions.shape[1]), self.dtype)
        self.inputs = {**self.inputs, "position_rows": rows}
        self.output_names = ("rows", *(f"deepstack.{level}" for level in range(len(levels))))

    def packed_inputs(self, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        found = self._interpolate(grids)
        entries, weights = self._positions[found["interp_indices"]], found["interp_weights"]
        rows = (entries * weights[:, :, None]).sum(1).to(self.dtype)
        return super().packed_inputs(grids) | {"position_rows": rows}
