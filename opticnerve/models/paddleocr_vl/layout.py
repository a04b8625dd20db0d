"""PaddleOCR-VL's layout: patches like Qwen2-VL's, but of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opticnerve.media.plan import Modality
from opticnerve.models.picture_sizes import check_aspect
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout, smart_resize

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class PaddleOcrLayout(Qwen2VLLayout):
    """Takes pictures only. The tower embeds single frames, whatever temporal_patch_size says."""

    family = "paddleocr_vl"
    defaults: Mapping[str, int] = {
        "image_token_id": 100295,
        "video_token_id": 100296,
        "hidden_size": 1024,
        "max_position_embeddings": 131072,
        "patch_size": 14,
        "min_pixels": 384 * 384,
        "max_pixels": 1536 * 1536,
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.placeholder_ids["video_token"] = self.item_token_ids.pop(Modality.VIDEO)

    def frames(self, checkpoint: Checkpoint) -> int:
        return 1

    def resize(self, width: int, height: int, low: int, high: int) -> tuple[int, int]:
        """As Qwen2-VL's, but a side shorter than a merged patch is enlarged to one first."""
        check_aspect(width, height)
        factor = self.patch_size * self.merge_size
        if height < factor:
            width, height = round(width * factor / height), factor
        if width < factor:
            width, height = factor, round(height * factor / width)
        return smart_resize(width, height, factor, low, high)
