"""LLaVA-OneVision's vision tower and projector: LLaVA-NeXT's, with SigLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import LlavaOnevisionConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.llava_next.vision import tile_tower
from opticnerve.models.llava_onevision.layout import LlavaOnevisionLayout

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.towers.tower import TowerSpec


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises UnsupportedCheckpoint for a tower that is neither SigLIP's nor CLIP's."""
    layout = LlavaOnevisionLayout(checkpoint)
    return tile_tower(transformers_config(LlavaOnevisionConfig, checkpoint), layout)
