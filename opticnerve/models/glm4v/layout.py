"""GLM-4V's layout: pictures in patches like Qwen2-VL's, with bounds on the pixels of two frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opticnerve.media.plan import Modality
from opticnerve.models.picture_sizes import check_aspect
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout, smart_resize

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class Glm4vLayout(Qwen2VLLayout):
    """Takes pictures only: a video's frames would need timestamps between them.

    The image processor bounds the pixels of all frames of a patch, for which a still picture is
    repeated; a picture's own bounds are those divided by the frames.
    """

    family = "glm4v"
    other_placeholders = (
        "video_token",
        "image_start_token",
        "image_end_token",
        "video_start_token",
        "video_end_token",
    )
    defaults: Mapping[str, int] = {
        "image_token_id": 151343,
        "video_token_id": 151344,
        "hidden_size": 4096,
        "max_position_embeddings": 32768,
        "patch_size": 14,
        "min_pixels": 112 * 112,
        "max_pixels": 28 * 28 * 15000,
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.config["model_type"] == "glm4v_moe":
            experts = {"image_token_id": 151363, "video_token_id": 151364}
            self.defaults = {**self.defaults, **experts, "max_position_embeddings": 65536}
        super().__init__(checkpoint)
        self.placeholder_ids["video_token"] = self.item_token_ids.pop(Modality.VIDEO)
        self.min_pixels = max(1, self.min_pixels // self.temporal_patch_size)
        self.max_pixels = max(1, self.max_pixels // self.temporal_patch_size)

    def resize(self, width: int, height: int, low: int, high: int) -> tuple[int, int]:
        """As Qwen2-VL's, but a side shorter than a merged patch is enlarged to one first."""
        check_aspect(width, height)
        factor = self.patch_size * self.merge_size
        if min(width, height) < factor:
            scale = max(factor / height, factor / width)
            width, height = int(width * scale), int(height * scale)
        return smart_resize(width, height, factor, low, high)
