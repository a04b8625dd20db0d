"""LLaVA-1.5's layout: every picture is a square of one size and one run of placeholders.

The shortest edge is resized and the centre cut out. A picture has a token for each patch of the
tower, and one for the class token if the strategy is "full". Positions are one-dimensional and
count up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import PixelSettings, positive, read_object, token_id
from opticnerve.errors import CheckpointError, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import NO_OVERRIDES, Grid, Modality, Overrides, Plan, Span, Structure
from opticnerve.models.family import Expansion
from opticnerve.models.picture_sizes import (
    check_agreed,
    check_aspect,
    check_overrides,
    picture_plan,
    processor_settings,
)
from opticnerve.models.text_models import count_positions, text_sizes

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class LlavaLayout:
    """Implements ``opticnerve.models.family.Layout``.

    The preprocessor also reads ``pixels`` and ``resized_size``. ``crop_size`` is (width, height);
    None: no crop.
    """

    family = "llava"
    position_dims = 1
    deepstack_levels = 0
    rewrite = None
    # transformers' defaults for what config.json leaves out; of several towers, the first.
    towers: ClassVar[Mapping[str, int]] = {"clip_vision_model": 32}  # With patch sizes.
    text_model: ClassVar[str] = "llama"
    image_token: ClassVar[int] = 32000
    usual_strategy: ClassVar[str] = "default"

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, vision = checkpoint.config, checkpoint.vision_config
        self.tower = self._read_tower(vision)
        self.hidden_size, self.max_positions = text_sizes(checkpoint, self.text_model)
        index = token_id(config, "image_token_index", self.image_token)
        image_token_id = token_id(config, "image_token_id", index)
        self.item_token_ids = {Modality.IMAGE: image_token_id}
        self.placeholder_ids = {"image_token": image_token_id}
        self.patch_size = positive(vision, "patch_size", self.towers[self.tower])
        self.image_size = positive(vision, "image_size", 224)
        self.strategy = str(config.get("vision_feature_select_strategy") or self.usual_strategy)
        if self.strategy not in ("default", "full"):
            raise UnsupportedCheckpoint(
                f"vision_feature_select_strategy is {self.strategy!r}; default and full are served"
            )
        self._read_processor(checkpoint)
        self._check_written(checkpoint)

    def _read_tower(self, vision: Mapping[str, Any]) -> str:
        """The tower's model_type."""
        if not vision:
            raise UnsupportedCheckpoint(
                "this LLaVA checkpoint has no vision_config: it is in the original authors' "
                "layout; use its Hugging Face conversion (llava-hf/…)"
            )
        kind = str(vision.get("model_type", next(iter(self.towers))))
        if kind not in self.towers:
            raise UnsupportedCheckpoint(
                f"this LLaVA checkpoint's vision tower is {kind!r}; supported are "
                f"{', '.join(self.towers)}"
            )
        return kind

    def _read_processor(self, checkpoint: Checkpoint) -> None:
        processor = processor_settings(checkpoint)
        if processor.get("do_pad"):
            raise UnsupportedCheckpoint(
                "the image processor pads pictures to squares (do_pad), which is not supported; "
                "switch do_pad off, as the published LLaVA-1.5 has it"
            )
        self.pixels = PixelSettings.read(processor)
        self.size = read_size(processor.get("size", {"shortest_edge": 224}), "size")
        self.crop_size: tuple[int, int] | None = None
        if processor.get("do_center_crop", True):
            crop = read_size(processor.get("crop_size", 224), "crop_size")
            self.crop_size = (crop, crop) if isinstance(crop, int) else crop
        seen = self.crop_size or self.size
        if seen != (self.image_size, self.image_size):
            raise CheckpointError(
                f"the image processor makes pictures of {seen} but the vision tower takes "
                f"{self.image_size}x{self.image_size}; the files are not of one checkpoint"
            )

    def _check_written(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if processor_config.json would give a picture other tokens."""
        agree = partial(check_agreed, read_object(checkpoint.path / "processor_config.json") or {})
        agree("patch_size", "the vision tower's patch_size", self.patch_size)
        name = "vision_feature_select_strategy"
        agree(name, f"the model's {name}", self.strategy)
        extra = int(self.tower == "clip_vision_model")
        agree("num_additional_image_tokens", f"what {self.tower} adds to patches", extra)

    # ---- pictures

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a displayed picture after the resize, before the crop."""
        if not isinstance(self.size, int):
            return self.size
        short, long = sorted((width, height))
        longer = int(self.size * long / short)
        return (self.size, longer) if width <= height else (longer, self.size)

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        check_item(structure.displayed_size, overrides)
        side = self.image_size // self.patch_size
        tokens = side * side + (self.strategy == "full")
        return picture_plan(
            structure, (self.image_size, self.image_size), Grid(1, side, side), tokens
        )

    def expand(self, plan: Plan) -> Expansion:
        return Expansion.of_rows(self.item_token_ids[plan.modality], plan.num_tokens)

    # ---- positions

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        return count_positions(num_tokens, spans)

    # ---- identity

    def settings(self) -> Mapping[str, Any]:
        return {
            "family": self.family,
            "size": self.size,
            "crop_size": self.crop_size,
            "patch_size": self.patch_size,
            "strategy": self.strategy,
            **asdict(self.pixels),
        }


def check_item(size: tuple[int, int], overrides: Overrides) -> None:
    """Raises InvalidRequest for bounds on pixels, which these models do not take, and InvalidMedia
    for an extreme aspect ratio. ``size``: (width, height) as displayed."""
    check_overrides(overrides)
    if overrides.min_pixels is not None or overrides.max_pixels is not None:
        raise InvalidRequest(
            "this model's picture sizes are fixed: leave out min_pixels and max_pixels",
            param="min_pixels" if overrides.min_pixels is not None else "max_pixels",
        )
    check_aspect(*size)


def read_size(value: Any, name: str) -> int | tuple[int, int]:
    """A shortest edge, or (width, height)."""
    if isinstance(value, int):
        return positive({name: value}, name)
    if isinstance(value, Mapping) and value.get("shortest_edge") is not None:
        return positive(value, "shortest_edge")
    if isinstance(value, Mapping):
        return positive(value, "width"), positive(value, "height")
    raise CheckpointError(f"the image processor's {name} is {value!r}, which has no known form")
