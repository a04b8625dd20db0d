"""LLaVA-NeXT's layout: a picture is seen whole, and once more in tiles.

The whole picture is squeezed into one square. In addition it is put, with its aspect kept, on a
black canvas of one of the model's sizes (``image_grid_pinpoints``), which is cut into square tiles.
Features that show only the canvas are removed, and each remaining row of features ends with one
learned embedding (``image_newline``). Tokens are those of the square, then those of the canvas, row
by row. Source: LLaVA-NeXT (2024), which calls this anyres.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.errors import CheckpointError, UnsupportedCheckpoint
from opticnerve.media.plan import NO_OVERRIDES, Grid, Overrides, Plan, Structure
from opticnerve.models.llava.layout import LlavaLayout, check_item, read_size
from opticnerve.models.picture_sizes import picture_plan, processor_settings
from opticnerve.models.tiles import check_tiles

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MAX_PINPOINTS = 256


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Sizes of the grid of features that a picture's tiles form, each (rows, columns)."""

    canvas: tuple[int, int]  # All tiles side by side.
    kept: tuple[int, int]  # The middle, which shows the picture.
    shown: tuple[int, int]  # After shrinking; each row gets one more token.

    @property
    def num_tokens(self) -> int:
        return self.shown[0] * (self.shown[1] + 1)


class LlavaNextLayout(LlavaLayout):
    """The preprocessor also reads ``fitted_size``, and the tower ``mosaic``."""

    family = "llava_next"
    towers: ClassVar[Mapping[str, int]] = {"clip_vision_model": 32, "siglip_vision_model": 16}
    usual_side: ClassVar[int] = 224  # Pixels of the image processor's squares.
    usual_pinpoints: ClassVar[tuple[tuple[int, int], ...]] = PINPOINTS

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        # A mosaic has no place for CLIP's class token; SigLIP has none.
        wanted = "default" if self.tower == "clip_vision_model" else "full"
        if self.strategy != wanted:
            raise UnsupportedCheckpoint(
                f"vision_feature_select_strategy is {self.strategy!r}; with {self.tower}, only "
                f"{wanted} is served"
            )
        self.side = self.image_size // self.patch_size  # Of a tile, in features.

    def _read_processor(self, checkpoint: Checkpoint) -> None:
        processor = processor_settings(checkpoint)
        self.pixels = PixelSettings.read(processor)
        side = self.image_size
        for name, usual in (("size", self.usual_side), ("crop_size", side)):
            seen = read_size(processor.get(name) or usual, name)
            if seen not in (side, (side, side)):
                raise CheckpointError(
                    f"the image processor's {name} is {seen} but the vision tower takes "
                    f"{side}x{side}; the files are not of one checkpoint"
                )
        self.pinpoints = self._read_pinpoints(processor)
        if self.pinpoints != self._read_pinpoints(checkpoint.config):
            raise CheckpointError(
                "image_grid_pinpoints of the image processor and of config.json differ; the files "
                "are not of one checkpoint"
            )

    def _read_pinpoints(self, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """Sizes of canvases, as (height, width)."""
        given = config.get("image_grid_pinpoints") or self.usual_pinpoints
        side = self.image_size
        if not isinstance(given, list | tuple) or len(given) > MAX_PINPOINTS:
            raise CheckpointError("image_grid_pinpoints is no list of sizes; fetch the files again")
        for pair in given:
            if (
                not isinstance(pair, list | tuple)
                or len(pair) != 2
                or not all(type(edge) is int and edge >= side and edge % side == 0 for edge in pair)
            ):
                raise UnsupportedCheckpoint(
                    f"image_grid_pinpoints has {pair!r}; supported are sizes that tiles of "
                    f"{side}x{side} fill"
                )
            check_tiles(pair[0] * pair[1] // side**2, f"image_grid_pinpoints with {pair!r}")
        return tuple((high, wide) for high, wide in given)

    # ---- pictures

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        size = structure.displayed_size
        check_item(size, overrides)
        high, wide = self._best_pinpoint(*size)
        tiles = high * wide // self.image_size**2
        tokens = self.side**2 + self._mosaic(size, (wide, high)).num_tokens
        return picture_plan(structure, (wide, high), Grid(1 + tiles, self.side, self.side), tokens)

    def _best_pinpoint(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the canvas that shows most of the picture's pixels; of several, the
        smallest."""

        def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            high, wide = pinpoint
            scale = min(wide / width, high / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - high * wide

        return max(self.pinpoints, key=merit)

    def fitted_size(self, plan: Plan) -> tuple[int, int]:
        """(width, height) of the picture on its canvas; one of them is the canvas's own."""
        width, height = _displayed(plan)
        wide, high = plan.resized_width, plan.resized_height
        if wide / width < high / height:
            return wide, min(math.ceil(height * (wide / width)), high)
        return min(math.ceil(width * (high / height)), wide), high

    def mosaic(self, plan: Plan) -> Mosaic:
        return self._mosaic(_displayed(plan), (plan.resized_width, plan.resized_height))

    def _mosaic(self, size: tuple[int, int], canvas: tuple[int, int]) -> Mosaic:
        """``size`` and ``canvas``: (width, height) of the displayed picture, and of its canvas."""
        rows, columns = (edge // self.image_size * self.side for edge in reversed(canvas))
        kept = _kept(*size, rows, columns)
        return Mosaic((rows, columns), kept, self.shown(*kept))

    def shown(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) of the features that become tokens, given those that show the picture."""
        return rows, columns

    # ---- identity

    def settings(self) -> Mapping[str, Any]:
        return {
            "family": self.family,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "strategy": self.strategy,
            "pinpoints": self.pinpoints,
            **asdict(self.pixels),
        }


def _displayed(plan: Plan) -> tuple[int, int]:
    """(width, height) of the picture after orientation."""
    return (plan.width, plan.height) if plan.orientation < 5 else (plan.height, plan.width)


def _kept(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a canvas's features without those above and below the picture, or left and
    right of it; rounded as in the reference."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * padding
