"""LLaVA-NeXT's vision tower, its projector, and the row that ends the rows of a mosaic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlavaNextConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.llava.vision import SquareProjector, square_sizes, square_tower
from opticnerve.models.llava_next.layout import LlavaNextLayout
from opticnerve.models.llava_next.mosaics import MosaicGraph, Mosaics
from opticnerve.models.towers.pixels import check_pixels, upload
from opticnerve.models.towers.tower import ModuleTower, TowerSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Plan


class TileProjector(SquareProjector):
    """Adds the row that ends rows; ``forward`` does not use it."""

    def __init__(self, config: Any, layout: LlavaNextLayout) -> None:
        super().__init__(config, layout)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))


class TileTower(ModuleTower):
    """Implements ``opticnerve.models.family.Tower``: all tiles of a batch run together."""

    def __init__(self, module: Any, layout: LlavaNextLayout) -> None:
        super().__init__(module, layout.pixels, layout.hidden_size)
        self.layout = layout
        self.mosaics = Mosaics(layout, module.image_newline)

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """See ``family.Tower``. Raises PlanMismatch when tiles and plan differ."""
        side = self.layout.image_size
        for tiles, plan in zip(pixels, plans, strict=True):
            check_pixels(tiles, plan.grid.t, side, side, 3)
        with torch.inference_mode():
            values = self.table(upload(pixels, self.device)).permute(0, 3, 1, 2)
            return self.mosaics.items(self.module(values), plans)


def describe_graph(tower: TileTower) -> MosaicGraph:
    return MosaicGraph(tower, tower.mosaics, *square_sizes(tower.module))


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises UnsupportedCheckpoint for a tower that is neither CLIP's nor SigLIP's."""
    return tile_tower(transformers_config(LlavaNextConfig, checkpoint), LlavaNextLayout(checkpoint))


def tile_tower(config: Any, layout: LlavaNextLayout) -> TowerSpec:
    """A tower of tiles. ``config``: transformers' of the whole model."""
    return square_tower(
        config, lambda: TileProjector(config, layout), lambda module: TileTower(module, layout)
    )
