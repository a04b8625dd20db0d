"""Shared by the families that cut pictures into square tiles of one size. No torch.

A picture is resized to a canvas, a whole number of tiles wide and high, and cut into them, row by
row. If there is more than one tile, a small copy of the whole picture follows as the last one. The
tower sees every tile as a picture of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.errors import CheckpointError, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import NO_OVERRIDES, Grid, Overrides, Plan, Span, Structure
from opticnerve.models.family import Expansion
from opticnerve.models.picture_sizes import check_aspect, check_overrides, picture_plan
from opticnerve.models.text_models import count_positions

if TYPE_CHECKING:
    from PIL import Image


MAX_TILES = 256  # Of one canvas.


class TiledLayout:
    """The part of ``opticnerve.models.family.Layout`` that these families have in common.

    A plan's resized size is that of the canvas. Its grid is (tiles, rows, columns): the number of
    tiles, the small copy included, and the patches of one tile.
    """

    family = ""
    position_dims = 1
    deepstack_levels = 0
    rewrite = None

    def __init__(
        self, pixels: PixelSettings, tile_size: int, patch_size: int, merge_size: int
    ) -> None:
        """``tile_size``: pixels a side. ``merge_size``: patches a side of the square that becomes
        one embedding row. Raises CheckpointError for a tile whose patches cannot be merged."""
        side = tile_size // patch_size  # Pixels left over at the edges are ignored.
        if side % merge_size or side == 0:
            raise CheckpointError(
                f"tiles of {tile_size}x{tile_size} pixels have {side}x{side} patches of "
                f"{patch_size}, which cannot be merged {merge_size} by {merge_size}"
            )
        self.pixels = pixels
        self.tile_size = tile_size
        self.patch_size = patch_size
        self.tile_tokens = (side // merge_size) ** 2

    @property
    @abstractmethod
    def max_pixels(self) -> int:
        """Pixels of the largest canvas."""

    @abstractmethod
    def canvas(self, width: int, height: int, max_pixels: int) -> tuple[int, int]:
        """(columns, rows) of tiles for a displayed picture: at most about ``max_pixels`` pixels,
        and at least one tile."""

    @abstractmethod
    def expand(self, plan: Plan) -> Expansion: ...

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        check_overrides(overrides)
        if overrides.min_pixels is not None:
            raise InvalidRequest(
                "this model cuts pictures into tiles: leave out min_pixels; max_pixels lowers the "
                "number of tiles",
                param="min_pixels",
            )
        most = self.max_pixels
        if overrides.max_pixels is not None:
            most = min(most, overrides.max_pixels)
        check_aspect(*structure.displayed_size)
        columns, rows = self.canvas(*structure.displayed_size, most)
        tiles, side = num_tiles(columns, rows), self.tile_size // self.patch_size
        return picture_plan(
            structure,
            (columns * self.tile_size, rows * self.tile_size),
            Grid(tiles, side, side),
            tiles * self.tile_tokens,
        )

    def shape(self, plan: Plan) -> tuple[int, int]:
        """(columns, rows) of tiles in a plan's canvas."""
        return plan.resized_width // self.tile_size, plan.resized_height // self.tile_size

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        return count_positions(num_tokens, spans)

    def settings(self) -> Mapping[str, Any]:
        return {
            "family": self.family,
            "tile_size": self.tile_size,
            "patch_size": self.patch_size,
            "tile_tokens": self.tile_tokens,
            "max_pixels": self.max_pixels,
            **asdict(self.pixels),
        }


def check_tiles(tiles: int, setting: str) -> None:
    """Raises UnsupportedCheckpoint for more than MAX_TILES. ``setting``: the setting that asks for
    them."""
    if tiles > MAX_TILES:
        raise UnsupportedCheckpoint(
            f"{setting} cuts pictures into {tiles} tiles; more than {MAX_TILES} are not served"
        )


def num_tiles(columns: int, rows: int) -> int:
    """The number of tiles of a canvas; if there are several, the small copy counts too."""
    cells = columns * rows
    return cells + 1 if cells > 1 else 1


def cut(canvas: Image.Image, size: int) -> NDArray[np.uint8]:
    """uint8 [rows * columns, size, size, 3]: the tiles of ``canvas``, row by row."""
    columns, rows = canvas.width // size, canvas.height // size
    blocks = np.asarray(canvas).reshape(rows, size, columns, size, 3)
    tiles = np.ascontiguousarray(blocks.transpose(0, 2, 1, 3, 4))
    return tiles.reshape(rows * columns, size, size, 3)
