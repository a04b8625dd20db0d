"""Gemma 3's SigLIP tower and its projector, which pools patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Gemma3Config, SiglipVisionModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.gemma3.layout import Gemma3Layout
from opticnerve.models.llava.vision import position_ids
from opticnerve.models.towers.tile_graph import TileGraph
from opticnerve.models.towers.tiles import TileTower
from opticnerve.models.towers.tower import TowerSpec

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class PooledProjector(nn.Module):  # type: ignore[misc]
    """The tower, and the projector: average pooling, a norm and a product."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        config.vision_config.vision_use_head = False  # It would pool a picture to one row.
        self.tower: Any = SiglipVisionModel(config.vision_config)
        self.projector = Gemma3MultiModalProjector(config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[pictures, 3, height, width] -> [pictures, tokens, hidden_size]."""
        hidden = self.tower.embeddings(pixels)
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        rows: torch.Tensor = self.projector(self.tower.post_layernorm(hidden))
        return rows


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises CheckpointError, UnsupportedCheckpoint."""
    layout = Gemma3Layout(checkpoint)
    config = transformers_config(Gemma3Config, checkpoint)
    return TowerSpec(
        make_module=lambda: PooledProjector(config),
        make_tower=lambda module: TileTower(
            module, layout.pixels, layout.hidden_size, layout.image_size
        ),
        recomputed={"tower.embeddings.position_ids": position_ids},
        ignored=(
            r".*vision_tower\.(?:vision_model\.)?head\.",
            r".*vision_tower\..*embeddings\.position_ids$",  # Computed; some checkpoints carry it.
        ),
    )


def describe_graph(tower: TileTower) -> TileGraph:
    embeddings, projector = tower.module.tower.embeddings, tower.module.projector
    tokens = projector.tokens_per_side**2
    return TileGraph(tower, embeddings.image_size, embeddings.num_patches, tokens)
