"""PaddleOCR-VL's vision tower and projector.

transformers' tower takes patches row by row, and its projector then reorders them by merge blocks.
Attention depends on the patches' positions, not on their order, so here they are ordered by merge
blocks from the start, as for other towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PaddleOCRVLConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import (
    PaddleOCRProjector,
    PaddleOCRVisionTransformer,
)

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.checkpoints.loader import rotary_buffers, transformers_config
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.towers.tower import Interpolation, PatchTower, TowerSpec

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Grid

UNUSED = r"(?:model\.)?visual\.vision_model\.(?:head|embeddings\.packing_position_embedding)\."


class OcrVision(nn.Module):  # type: ignore[misc]
    """Tower and projector for patches that are ordered by merge blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config.vision_config
        self.tower: Any = PaddleOCRVisionTransformer(config.vision_config)
        self.projector = PaddleOCRProjector(config)

    def forward(
        self, patches: torch.Tensor, grid_thw: torch.Tensor, **precomputed: Any
    ) -> BaseModelOutputWithPooling:
        """``patches``: [patches, patch, patch, 3]."""
        channels_first = patches.permute(0, 3, 1, 2)[None]
        hidden = self.tower(channels_first, grid_thw=grid_thw, **precomputed).last_hidden_state
        projector = self.projector
        blocks = projector.pre_norm(hidden).view(-1, projector.linear_1.in_features)
        rows = projector.linear_2(projector.act(projector.linear_1(blocks)))
        return BaseModelOutputWithPooling(pooler_output=rows)


class OcrTower(PatchTower):
    """Adds to PatchTower the interpolation of learned positions."""

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        super().__init__(module, pixels, hidden_size)
        self.interpolate = Interpolation(module.tower.embeddings, self.merge_size, self.device)

    def embed_by_product(self) -> None:
        """Nothing to do: ``use_products`` has replaced the tower's Conv2d already."""

    def precompute(self, grids: Sequence[Grid]) -> dict[str, Any]:
        return super().precompute(grids) | self.interpolate(grids)


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = transformers_config(PaddleOCRVLConfig, checkpoint)
    pixels = PixelSettings.read(processor_settings(checkpoint))
    return TowerSpec(
        make_module=lambda: OcrVision(config),
        make_tower=lambda module: OcrTower(module, pixels, config.text_config.hidden_size),
        recomputed={
            **rotary_buffers("tower.encoder.rotary_pos_emb"),
            "tower.embeddings.position_ids": lambda owner: torch.arange(owner.num_positions)[None],
        },
        ignored=(UNUSED,),
    )
