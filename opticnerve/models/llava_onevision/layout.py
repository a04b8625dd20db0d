"""LLaVA-OneVision's layout: LLaVA-NeXT's tiles, whose features are shrunk where they are too many.

In a prompt with several pictures none is cut into tiles: each is one square, padded to keep its
aspect, and followed by one learned embedding. Source: LLaVA-OneVision (2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from opticnerve.checkpoints.json_files import read_object, token_id
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.media.plan import NO_OVERRIDES, Grid, Overrides, Plan, Structure
from opticnerve.models.llava.layout import check_item
from opticnerve.models.llava_next.layout import LlavaNextLayout
from opticnerve.models.picture_sizes import check_agreed, picture_plan

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

EDGES = range(384, 2305, 384)
TOLERANCE = 1.1  # Features are shrunk if a side exceeds its share by more than this factor.


class LlavaOnevisionLayout(LlavaNextLayout):
    """``max_tiles``: the most features that a picture keeps beside its square's, in tiles."""

    family = "llava_onevision"
    towers: ClassVar[Mapping[str, int]] = {"siglip_vision_model": 16, "clip_vision_model": 32}
    text_model: ClassVar[str] = "qwen2"
    image_token: ClassVar[int] = 151646
    usual_strategy: ClassVar[str] = "full"
    usual_side: ClassVar[int] = 384
    usual_pinpoints: ClassVar[tuple[tuple[int, int], ...]] = tuple(
        (high, wide) for high in EDGES for wide in EDGES
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        index = token_id(config, "video_token_index", 151647)
        self.placeholder_ids["video_token"] = token_id(config, "video_token_id", index)
        named = _aspect_ratio(config)
        found = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", str(named))
        if found is None:
            raise UnsupportedCheckpoint(
                f"vision_aspect_ratio is {named!r}; supported is anyres_max_ with a number"
            )
        self.max_tiles = int(found[1])

    def _check_written(self, checkpoint: Checkpoint) -> None:
        super()._check_written(checkpoint)
        agree = partial(check_agreed, read_object(checkpoint.path / "processor_config.json") or {})
        name = "vision_aspect_ratio"
        agree(name, f"the model's {name}", _aspect_ratio(checkpoint.config))
        # The processor subtracts one for the class token.
        rows = (self.image_size // self.patch_size) ** 2 + (self.strategy == "default")
        agree("num_image_tokens", "the number of rows that the vision tower makes", rows)

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        if not overrides.one_of_several:
            return super().plan(structure, overrides)
        check_item(structure.displayed_size, overrides)
        square = (self.image_size, self.image_size)
        return picture_plan(structure, square, Grid(1, self.side, self.side), self.side**2 + 1)

    def shown(self, rows: int, columns: int) -> tuple[int, int]:
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > TOLERANCE else (rows, columns)

    def settings(self) -> Mapping[str, Any]:
        own = {"max_tiles": self.max_tiles, "several_pictures": "squares"}
        return {**super().settings(), **own}


def _aspect_ratio(config: Mapping[str, Any]) -> Any:
    return config.get("vision_aspect_ratio") or "anyres_max_9"
