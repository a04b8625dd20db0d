"""Qwen3-VL's vision tower and its mergers: the last, and one for each DeepStack level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import CheckpointError
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.towers.tower import Interpolation, PatchTower, TowerSpec, patch_tower

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Grid

MODELS: dict[str, tuple[Any, Any]] = {  # One tower under two names.
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLVisionModel),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeVisionModel),
}


class DeepStackTower(PatchTower):
    """Adds to PatchTower the interpolation of learned positions, and the DeepStack levels."""

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        super().__init__(module, pixels, hidden_size)
        self.interpolate = Interpolation(module, self.merge_size, self.device)

    def precompute(self, grids: Sequence[Grid]) -> dict[str, Any]:
        return super().precompute(grids) | self.interpolate(grids)

    def named_rows(self, output: Any) -> dict[str, torch.Tensor]:
        levels = {
            f"deepstack.{level}": rows for level, rows in enumerate(output.deepstack_features)
        }
        return super().named_rows(output) | levels


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises CheckpointError for DeepStack levels that name layers which the tower lacks."""
    config_class, module_class = MODELS[checkpoint.config["model_type"]]
    config = transformers_config(config_class, checkpoint).vision_config
    layers = list(config.deepstack_visual_indexes)
    if layers != sorted(set(layers) & set(range(config.depth))):
        raise CheckpointError(
            f"deepstack_visual_indexes {layers} are not ascending layers of a tower of "
            f"{config.depth} layers"
        )
    pixels = PixelSettings.read(processor_settings(checkpoint))
    return patch_tower(module_class, config, pixels, config.out_hidden_size, DeepStackTower)
