"""InternVL's layout: the canvas of tiles whose aspect is nearest to the picture's.

All tiles of a picture, its thumbnail last, are one run of placeholders between ``<img>`` and
``</img>``. Positions are one-dimensional and count up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from opticnerve.checkpoints.json_files import PixelSettings, number, positive, read_object, token_id
from opticnerve.checkpoints.tokenizer_files import (
    added_token_id,
    named_tokens,
    read_tokenizer_config,
)
from opticnerve.errors import CheckpointError, UnsupportedCheckpoint
from opticnerve.media.plan import Modality, Plan
from opticnerve.models.family import Expansion, RowRun
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.text_models import text_sizes
from opticnerve.models.tiles import TiledLayout, check_tiles

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class InternVLLayout(TiledLayout):
    """Implements ``opticnerve.models.family.Layout``. ``max_pixels`` bounds the tiles; if it allows
    only one, that is the whole picture, without a thumbnail."""

    family = "internvl"

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, processor = checkpoint.config, processor_settings(checkpoint)
        vision = checkpoint.vision_config
        _check_features(config)
        ratio = number(config, "downsample_ratio", 0.5)
        if not 0 < ratio <= 1:
            raise CheckpointError(f"downsample_ratio is {ratio}; it should be between 0 and 1")
        tile_size = _square(vision, "image_size", 448)
        super().__init__(
            PixelSettings.read(processor),
            tile_size,
            _square(vision, "patch_size", 14),
            int(1 / ratio),
        )
        self._check_processor(checkpoint, processor)
        self.hidden_size, self.max_positions = text_sizes(checkpoint, usual="qwen2")
        image_token_id = token_id(config, "image_token_id", 151667)
        self.item_token_ids = {Modality.IMAGE: image_token_id}
        # The reference's processor always cuts, whatever crop_to_patches says.
        self.max_tiles = positive(processor, "max_patches", 12)
        check_tiles(self.max_tiles, "the image processor's max_patches")
        self.min_tiles = min(positive(processor, "min_patches", 1), self.max_tiles)
        self._shapes = _shapes(self.max_tiles)
        self._path = checkpoint.path
        if checkpoint.side == "gateway":
            _ = self.placeholder_ids

    def _check_processor(self, checkpoint: Checkpoint, processor: Mapping[str, Any]) -> None:
        size = processor.get("size", {"height": 384, "width": 384})
        size = size if isinstance(size, Mapping) else {}
        seen = (positive(size, "width"), positive(size, "height"))
        if seen != (self.tile_size, self.tile_size):
            raise CheckpointError(
                f"the image processor makes tiles of {seen[0]}x{seen[1]} but the vision tower "
                f"takes {self.tile_size}x{self.tile_size}; the files are not of one checkpoint"
            )
        whole = read_object(checkpoint.path / "processor_config.json") or {}
        written = positive(whole, "image_seq_length", 256)
        if written != self.tile_tokens:
            raise CheckpointError(
                f"the processor writes {written} placeholders a tile (image_seq_length) but the "
                f"vision tower makes {self.tile_tokens} rows of it; the files are not of one "
                "checkpoint"
            )

    @property
    def max_pixels(self) -> int:
        return self.max_tiles * self.tile_size**2

    def canvas(self, width: int, height: int, max_pixels: int) -> tuple[int, int]:
        """The shape with the nearest aspect. Of several equally near, the largest of which the
        picture has more than half the pixels, else the smallest."""
        most = max(max_pixels // self.tile_size**2, 1)
        least = min(self.min_tiles, most)
        aspect, area = width / height, width * height
        best, best_distance = (1, 1), float("inf")
        for columns, rows in self._shapes:
            if not least <= columns * rows <= most:
                continue
            distance = abs(aspect - columns / rows)
            larger = area > 0.5 * self.tile_size**2 * columns * rows
            if distance < best_distance or (distance == best_distance and larger):
                best, best_distance = (columns, rows), distance
        return best

    def expand(self, plan: Plan) -> Expansion:
        """``<img>``, the placeholders of all tiles, ``</img>``."""
        start, end = self._markers
        run = (self.item_token_ids[plan.modality],) * plan.num_tokens
        return Expansion((start, *run, end), (RowRun(1, plan.num_tokens, 0),))

    @cached_property
    def placeholder_ids(self) -> Mapping[str, int]:
        """Read on first use, since an encoder may have no tokenizer. Raises CheckpointError."""
        start, end = self._markers
        image = self.item_token_ids[Modality.IMAGE]
        return {"image_token": image, "start_image_token": start, "end_image_token": end}

    @cached_property
    def _markers(self) -> tuple[int, int]:
        """The ids around a picture's placeholders. Raises CheckpointError."""
        named = named_tokens(read_tokenizer_config(self._path))
        spelled = (named.get("start_image_token", "<img>"), named.get("end_image_token", "</img>"))
        start, end = (added_token_id(self._path, text) for text in spelled)
        if start is None or end is None:
            raise CheckpointError(
                f"the tokenizer lacks {' or '.join(spelled)}, which stand around pictures; fetch "
                "its files again"
            )
        return start, end

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "min_tiles": self.min_tiles, "max_tiles": self.max_tiles}


def _check_features(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedCheckpoint if the projector reads another layer than the tower's last."""
    layer = config.get("vision_feature_layer", -1)
    strategy = config.get("vision_feature_select_strategy", "default")
    if layer != -1 or strategy != "default":
        raise UnsupportedCheckpoint(
            f"vision_feature_layer is {layer!r} and vision_feature_select_strategy {strategy!r}; "
            "-1 and default are served, as published checkpoints have them"
        )


def _square(vision: Mapping[str, Any], name: str, usual: int) -> int:
    """The side in ``vision[name]``, which is a number or [side, side]."""
    value = vision.get(name, usual)
    sides = value if isinstance(value, list) else [value]
    found = {positive({name: side}, name) for side in sides}
    if len(found) != 1:
        raise UnsupportedCheckpoint(f"the vision tower's {name} is {value}; it must be square")
    return found.pop()


def _shapes(most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of every canvas of at most ``most`` tiles, the smallest first."""
    shapes = [
        (columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)
    ]
    return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))
