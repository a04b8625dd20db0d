"""GLM-4V's configuration, by the model_type of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Glm4vConfig, Glm4vMoeConfig, Glm46VConfig
from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig, Glm4vVisionConfig
from transformers.models.glm4v_moe.configuration_glm4v_moe import (
    Glm4vMoeTextConfig,
    Glm4vMoeVisionConfig,
)

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

CONFIGS: dict[str, Any] = {
    "glm4v": Glm4vConfig,
    "glm4v_moe": Glm4vMoeConfig,
    "glm46v": Glm46VConfig,  # Has the parts of either of the above.
}
PARTS = (Glm4vVisionConfig, Glm4vTextConfig, Glm4vMoeVisionConfig, Glm4vMoeTextConfig)


def read_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration of the whole model. Raises CheckpointError, and
    UnsupportedCheckpoint for a vision or text part of another model."""
    config = transformers_config(CONFIGS[checkpoint.config["model_type"]], checkpoint)
    for part in (config.vision_config, config.text_config):
        if not isinstance(part, PARTS):
            raise UnsupportedCheckpoint(
                f"a part of this checkpoint is {part.model_type!r}, which is no GLM-4V"
            )
    return config
