"""SmolVLM's SigLIP-like tower and connector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import SmolVLMConfig, SmolVLMVisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.idefics3.vision import siglip_tower
from opticnerve.models.smolvlm.layout import SmolVLMLayout

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.towers.tower import TowerSpec


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = transformers_config(SmolVLMConfig, checkpoint)
    layout = SmolVLMLayout(checkpoint)
    return siglip_tower(SmolVLMVisionTransformer, SmolVLMConnector, config, layout)
