"""Idefics3's SigLIP-like tower and connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Idefics3Config, Idefics3VisionTransformer
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.idefics3.layout import Idefics3Layout
from opticnerve.models.towers.tiles import TileTower
from opticnerve.models.towers.tower import TowerSpec

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class SiglipConnector(nn.Module):  # type: ignore[misc]
    """The tower, and the connector that merges patches.

    No patch is masked: tiles are never padded; the processor only pads batches of pictures.
    """

    def __init__(self, tower_class: Any, connector_class: Any, config: Any) -> None:
        super().__init__()
        self.tower: Any = tower_class(config.vision_config)
        self.connector = connector_class(config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, height, width] -> [tiles, tokens, hidden_size]."""
        side = self.tower.patch_size
        shape = (len(pixels), pixels.shape[2] // side, pixels.shape[3] // side)
        whole = torch.ones(shape, dtype=torch.bool, device=pixels.device)
        hidden = self.tower.embeddings(pixel_values=pixels, patch_attention_mask=whole)
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        rows: torch.Tensor = self.connector(self.tower.post_layernorm(hidden))
        return rows


def siglip_tower(
    tower_class: Any, connector_class: Any, config: Any, layout: Idefics3Layout
) -> TowerSpec:
    """``config``: transformers' configuration of the whole model; the classes belong to it."""
    return TowerSpec(
        make_module=lambda: SiglipConnector(tower_class, connector_class, config),
        make_tower=lambda module: TileTower(
            module, layout.pixels, layout.hidden_size, layout.tile_size
        ),
    )


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = transformers_config(Idefics3Config, checkpoint)
    layout = Idefics3Layout(checkpoint)
    return siglip_tower(Idefics3VisionTransformer, Idefics3Connector, config, layout)
