"""Qwen3-VL's layout: sized and placed like Qwen2-VL, with DeepStack levels.

DeepStack (Meng et al., 2024): the rows of some inner layers of the tower go to the decoder beside
those of the last layer. They belong to the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opticnerve.errors import CheckpointError
from opticnerve.media.plan import Modality
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

DEEPSTACK_LAYERS = (8, 16, 24)  # transformers' default.


class Qwen3VLLayout(Qwen2VLLayout):
    """Takes pictures only: a video's frames would need timestamps between them."""

    family = "qwen3_vl"
    defaults: Mapping[str, int] = {
        **Qwen2VLLayout.defaults,
        "hidden_size": 4096,
        "max_position_embeddings": 128000,
        "patch_size": 16,
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.config["model_type"] == "qwen3_vl_moe":
            self.defaults = {**self.defaults, "hidden_size": 2048}
        super().__init__(checkpoint)
        video_token_id = self.item_token_ids.pop(Modality.VIDEO)
        self.placeholder_ids["video_token"] = video_token_id
        layers = checkpoint.vision_config.get("deepstack_visual_indexes", DEEPSTACK_LAYERS)
        if not isinstance(layers, list | tuple):
            raise CheckpointError(
                f"the checkpoint's configuration has deepstack_visual_indexes = {layers!r}, which "
                "should be a list of layers"
            )
        self.deepstack_levels = len(layers)
