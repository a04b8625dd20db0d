"""Pixtral's vision tower and projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.models.mistral3.vision import PixtralProjector, pixtral_tower
from opticnerve.models.pixtral.layout import PixtralLayout

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.towers.tower import TowerSpec


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises UnsupportedCheckpoint for a projector that leaves out patches."""
    config = transformers_config(LlavaConfig, checkpoint)
    if config.vision_feature_select_strategy != "full":
        raise UnsupportedCheckpoint(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, which "
            "would drop a picture's first patch; a pixtral tower needs full"
        )
    return pixtral_tower(
        config,
        PixtralLayout(checkpoint),
        lambda: PixtralProjector(config, LlavaMultiModalProjector(config)),
    )
