"""A tower for pictures that are cut into one or more squares of one size; it encodes each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from opticnerve.models.towers.pixels import check_pixels, upload
from opticnerve.models.towers.tower import ModuleTower, without_batch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.checkpoints.json_files import PixelSettings
    from opticnerve.media.plan import Plan


class TileTower(ModuleTower):
    """Implements ``opticnerve.models.family.Tower``; runs all tiles of a batch together.

    ``module``: forward(pixels [tiles, 3, tile_size, tile_size]) -> [tiles, tokens, hidden_size].
    A plan's ``grid.t`` is its number of tiles.
    """

    def __init__(
        self, module: Any, pixels: PixelSettings, hidden_size: int, tile_size: int
    ) -> None:
        super().__init__(module, pixels, hidden_size)
        self.tile_size = tile_size

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """See ``family.Tower``. Raises PlanMismatch when pixels and plan differ."""
        for tiles, plan in zip(pixels, plans, strict=True):
            check_pixels(tiles, plan.grid.t, self.tile_size, self.tile_size, 3)
        with torch.inference_mode():
            values = self.table(upload(pixels, self.device)).permute(0, 3, 1, 2)
            items = self.module(values).split([plan.grid.t for plan in plans])
            return [{"rows": self.rows(*item)} for item in zip(items, plans, strict=True)]

    def rows(self, tiles: torch.Tensor, plan: Plan) -> torch.Tensor:
        """[tiles, tokens, hidden_size] of one picture -> [num_tokens, hidden_size], a copy on a
        CPU: here the rows of one tile after the other."""
        return without_batch(tiles.flatten(0, 1))


def merge_blocks(patches: torch.Tensor, factor: int) -> torch.Tensor:
    """Joins the channels of each ``factor`` x ``factor`` block of a square of patches ("pixel
    shuffle"): [tiles, side * side, channels] to [tiles, (side / factor)², factor² * channels], the
    patches of a block row by row."""
    side = round(patches.shape[1] ** 0.5) // factor
    blocks = patches.unflatten(1, (side, factor, side, factor)).transpose(2, 3)
    return blocks.flatten(3).flatten(1, 2)
