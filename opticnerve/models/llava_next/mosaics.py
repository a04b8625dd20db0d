"""Makes the rows of pictures from the features of their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from opticnerve.models.towers.tile_graph import TileGraph

if TYPE_CHECKING:
    from opticnerve.media.plan import Plan
    from opticnerve.models.llava_next.layout import LlavaNextLayout, Mosaic
    from opticnerve.models.towers.graph import Tensors
    from opticnerve.models.towers.tower import ModuleTower


class Mosaics:
    """Puts the features of tiles together as the tiles lie in the picture. ``newline``:
    [hidden_size], the embedding at the end of each row."""

    def __init__(self, layout: LlavaNextLayout, newline: torch.Tensor) -> None:
        self._layout = layout
        self._newline = newline[None]

    def items(self, features: torch.Tensor, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        """[tiles of all pictures, side * side, hidden_size] -> the named tensors of each picture,
        as copies."""
        tiles = features.split([plan.grid.t for plan in plans])
        return [{"rows": self.rows(own, plan)} for own, plan in zip(tiles, plans, strict=True)]

    def rows(self, tiles: torch.Tensor, plan: Plan) -> torch.Tensor:
        """[tiles, side * side, hidden_size] of one picture -> [num_tokens, hidden_size]."""
        if len(tiles) == 1:
            return torch.cat([tiles[0], self._newline])
        return torch.cat([tiles[0], self._lines(tiles[1:], self._layout.mosaic(plan))])

    def _lines(self, tiles: torch.Tensor, mosaic: Mosaic) -> torch.Tensor:
        """The features of the tiles, row by row of the picture, with ``newline`` after each row:
        [mosaic.num_tokens, hidden_size]."""
        (rows, columns), side = mosaic.canvas, round(tiles.shape[1] ** 0.5)
        squares = tiles.reshape(rows // side, columns // side, side, side, -1)
        canvas = squares.transpose(1, 2).reshape(rows, columns, -1)
        high, wide = mosaic.kept
        top, left = (rows - high) // 2, (columns - wide) // 2
        shown = canvas[top : top + high, left : left + wide]
        if mosaic.shown != mosaic.kept:
            planes = F.interpolate(shown.permute(2, 0, 1)[None], mosaic.shown, mode="bilinear")
            shown = planes[0].permute(1, 2, 0)
        ends = self._newline.expand(len(shown), 1, -1)
        return torch.cat([shown, ends], dim=1).flatten(0, 1)


class MosaicGraph(TileGraph):
    """A graph whose outputs are features of tiles, from which ``mosaics`` makes rows."""

    def __init__(
        self, tower: ModuleTower, mosaics: Mosaics, size: int, patches: int, tokens: int
    ) -> None:
        super().__init__(tower, size, patches, tokens)
        self._mosaics = mosaics

    def split(self, outputs: Tensors, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        return self._mosaics.items(outputs["rows"], plans)
