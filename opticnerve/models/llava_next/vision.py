"""LLaVA-NeXT's vision tower, its projector, and the learned ``image_newline``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlavaNextConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.llava.vision import SquareProjector, square_sizes, square_tower
from opticnerve.models.llava_next.layout import LlavaNextLayout
from opticnerve.models.llava_next.mosaics import MosaicGraph, Mosaics
from opticnerve.models.towers.tiles import TileTower

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Plan
    from opticnerve.models.towers.tower import TowerSpec


class TileProjector(SquareProjector):
    """Adds ``image_newline``, which ``forward`` does not use."""

    def __init__(self, config: Any, layout: LlavaNextLayout) -> None:
        super().__init__(config, layout)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))


class MosaicTower(TileTower):
    """A tower that puts a picture's tiles together before it makes rows of them."""

    def __init__(self, module: Any, layout: LlavaNextLayout) -> None:
        super().__init__(module, layout.pixels, layout.hidden_size, layout.image_size)
        self.mosaics = Mosaics(layout, module.image_newline)

    def rows(self, tiles: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self.mosaics.rows(tiles, plan)


def describe_graph(tower: MosaicTower) -> MosaicGraph:
    return MosaicGraph(tower, tower.mosaics, *square_sizes(tower.module))


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises UnsupportedCheckpoint for a tower that is neither CLIP's nor SigLIP's."""
    return tile_tower(transformers_config(LlavaNextConfig, checkpoint), LlavaNextLayout(checkpoint))


def tile_tower(config: Any, layout: LlavaNextLayout) -> TowerSpec:
    """The declaration of a MosaicTower. ``config``: transformers' configuration of the whole
    model."""
    return square_tower(
        config, lambda: TileProjector(config, layout), lambda module: MosaicTower(module, layout)
    )
