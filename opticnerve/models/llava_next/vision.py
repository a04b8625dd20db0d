"""LLaVA-NeXT's vision tower, its projector, and the row that ends the rows of a mosaic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaNextConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.llava.vision import SquareProjector, square_tower
from opticnerve.models.llava_next.layout import LlavaNextLayout, Mosaic
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

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """See ``family.Tower``. Raises PlanMismatch when tiles and plan differ."""
        side = self.layout.image_size
        for tiles, plan in zip(pixels, plans, strict=True):
            check_pixels(tiles, plan.grid.t, side, side, 3)
        with torch.inference_mode():
            values = self.table(upload(pixels, self.device)).permute(0, 3, 1, 2)
            features = self.module(values).split([plan.grid.t for plan in plans])
            return [
                {"rows": self._rows(tiles, plan)}
                for tiles, plan in zip(features, plans, strict=True)
            ]

    def _rows(self, tiles: torch.Tensor, plan: Plan) -> torch.Tensor:
        """[tiles, side * side, hidden_size] of one picture -> [num_tokens, hidden_size]."""
        whole, newline = tiles[0], self.module.image_newline[None]
        if len(tiles) == 1:
            return torch.cat([whole, newline])
        return torch.cat([whole, _lines(tiles[1:], newline, self.layout.mosaic(plan))])


def _lines(tiles: torch.Tensor, newline: torch.Tensor, mosaic: Mosaic) -> torch.Tensor:
    """The tiles' features [tiles, side * side, hidden_size], side by side, row by row, each row
    with ``newline`` [1, hidden_size] at its end: [mosaic.num_tokens, hidden_size]."""
    (rows, columns), side = mosaic.canvas, round(tiles.shape[1] ** 0.5)
    squares = tiles.reshape(rows // side, columns // side, side, side, -1)
    canvas = squares.transpose(1, 2).reshape(rows, columns, -1)
    high, wide = mosaic.kept
    top, left = (rows - high) // 2, (columns - wide) // 2
    shown = canvas[top : top + high, left : left + wide]
    if mosaic.shown != mosaic.kept:
        planes = F.interpolate(shown.permute(2, 0, 1)[None], mosaic.shown, mode="bilinear")
        shown = planes[0].permute(1, 2, 0)
    ends = newline.expand(len(shown), 1, -1)
    return torch.cat([shown, ends], dim=1).flatten(0, 1)


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises UnsupportedCheckpoint for a tower that is neither CLIP's nor SigLIP's."""
    return tile_tower(transformers_config(LlavaNextConfig, checkpoint), LlavaNextLayout(checkpoint))


def tile_tower(config: Any, layout: LlavaNextLayout) -> TowerSpec:
    """A tower of tiles. ``config``: transformers' of the whole model."""
    return square_tower(
        config, lambda: TileProjector(config, layout), lambda module: TileTower(module, layout)
    )
