"""Qwen2-VL's vision tower and merger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.towers.tower import TowerSpec, patch_tower

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = transformers_config(Qwen2VLConfig, checkpoint).vision_config
    pixels = PixelSettings.read(processor_settings(checkpoint))
    return patch_tower(Qwen2VisionTransformerPretrainedModel, config, pixels, config.hidden_size)
