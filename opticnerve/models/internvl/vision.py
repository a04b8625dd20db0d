"""InternVL's InternViT tower and projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLVisionModel
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.internvl.layout import InternVLLayout
from opticnerve.models.towers.tiles import TileTower, merge_blocks
from opticnerve.models.towers.tower import TowerSpec

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class InternViTProjector(nn.Module):  # type: ignore[misc]
    """The tower, without its class token's row, and the projector, which takes merged patches."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tower: Any = InternVLVisionModel(config.vision_config)
        self.projector = InternVLMultiModalProjector(config)
        self.merge_size = int(1 / config.downsample_ratio)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, height, width] -> [tiles, tokens, hidden_size]."""
        hidden = self.tower.embeddings(pixels)
        for layer in self.tower.encoder.layer:
            hidden = layer(hidden)
        patches = self.tower.layernorm(hidden)[:, 1:]
        rows: torch.Tensor = self.projector(merge_blocks(patches, self.merge_size))
        return rows


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    layout = InternVLLayout(checkpoint)
    config = transformers_config(InternVLConfig, checkpoint)
    return TowerSpec(
        make_module=lambda: InternViTProjector(config),
        make_tower=lambda module: TileTower(
            module, layout.pixels, layout.hidden_size, layout.tile_size
        ),
    )
