"""GLM-4V's vision tower and merger; learned positions are interpolated to each picture's grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeVisionConfig
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionModel

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.media.plan import Grid
from opticnerve.models.glm4v.configuration import read_config
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.towers.tower import PatchTower, TowerSpec, patch_tower

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

MODELS: dict[type, Any] = {  # One tower under two names.
    Glm4vVisionConfig: Glm4vVisionModel,
    Glm4vMoeVisionConfig: Glm4vMoeVisionModel,
}


class FrameTower(PatchTower):
    """Passes every frame as a picture, since the tower needs one size for each attention
    segment."""

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        frames = [Grid(1, grid.h, grid.w) for grid in grids for _ in range(grid.t)]
        return super().forward(patches, frames)


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = read_config(checkpoint).vision_config
    pixels = PixelSettings.read(processor_settings(checkpoint))
    module_class = MODELS[type(config)]
    return patch_tower(module_class, config, pixels, config.out_hidden_size, FrameTower)
