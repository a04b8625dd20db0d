"""Mistral 3's layout: pictures keep their aspect, and rows of placeholders are separated by a break
token.

A picture is shrunk until it fits the longest edge, never enlarged, and then stretched to whole
tokens of merge_size x merge_size patches. Every row of tokens but the last ends with the break, the
last with the token that ends a picture. Positions are one-dimensional and count up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import PixelSettings, positive, read_object, token_id
from opticnerve.checkpoints.tokenizer_files import added_token_id
from opticnerve.errors import CheckpointError, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import NO_OVERRIDES, Grid, Modality, Overrides, Plan, Span, Structure
from opticnerve.models.family import Expansion, RowRun
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

# An expansion's tokens beside placeholders: (name in processor_config.json, usual spelling).
BREAK, END = ("image_break_token", "[IMG_BREAK]"), ("image_end_token", "[IMG_END]")


class Mistral3Layout:
    """Implements ``opticnerve.models.family.Layout``.

    The preprocessor also reads ``pixels``, ``patch_size`` and ``merge_size``. ``largest`` is the
    (width, height) that pictures are shrunk to fit.
    """

    family = "mistral3"
    position_dims = 1
    deepstack_levels = 0
    rewrite = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        tower = checkpoint.vision_config.get("model_type", "pixtral")
        if tower != "pixtral":
            raise UnsupportedCheckpoint(
                f"this checkpoint's vision tower is {tower!r}; pixtral is supported"
            )
        self.hidden_size, self.max_positions = text_sizes(checkpoint, "mistral")
        index = token_id(config, "image_token_index", 10)
        image_token_id = token_id(config, "image_token_id", index)
        self.break_token_id, self.end_token_id = _token_ids(checkpoint)
        self.item_token_ids = {Modality.IMAGE: image_token_id}
        self.placeholder_ids = {
            "image_token": image_token_id,
            BREAK[0]: self.break_token_id,
            END[0]: self.end_token_id,
        }
        self.patch_size = positive(checkpoint.vision_config, "patch_size", 16)
        self.merge_size = self._read_merge_size(checkpoint)
        processor = processor_settings(checkpoint)
        if processor.get("do_center_crop"):
            raise UnsupportedCheckpoint(
                "the image processor cuts out the centre of pictures (do_center_crop), which is "
                "not supported; switch it off, as published Pixtral towers have it"
            )
        self.pixels = PixelSettings.read(processor)
        self.largest = _largest(processor.get("size") or {"longest_edge": 1024})
        self._check_sizes(processor)
        self._check_sizes(read_object(checkpoint.path / "processor_config.json") or {})

    def _check_sizes(self, settings: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the processor's patch or merge size is not the model's."""
        size = settings.get("patch_size")
        sides = size.values() if isinstance(size, Mapping) else (size,)
        for side in sides:
            cut = {"patch_size": side}
            check_agreed(cut, "patch_size", "the vision tower's patch_size", self.patch_size)
        name = "spatial_merge_size"
        check_agreed(settings, name, f"the model's {name}", self.merge_size)

    def _read_merge_size(self, checkpoint: Checkpoint) -> int:
        """Patches along one side of a token."""
        return positive(checkpoint.config, "spatial_merge_size", 2)

    # ---- pictures

    def resized_size(self, width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
        """(width, height) of a displayed picture as the tower sees it: multiples of a token's side,
        rounded up from a shrunk size that was rounded down, as in the reference."""
        ratio = max(width / self.largest[0], height / self.largest[1])
        if max_pixels is not None:
            ratio = max(ratio, math.sqrt(width * height / max_pixels))
        if ratio > 1:
            width = max(1, math.floor(width / ratio))
            height = max(1, math.floor(height / ratio))
        side = self.patch_size * self.merge_size
        return math.ceil(width / side) * side, math.ceil(height / side) * side

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        check_overrides(overrides)
        if overrides.min_pixels is not None:
            raise InvalidRequest(
                "this model never enlarges pictures: leave out min_pixels", param="min_pixels"
            )
        check_aspect(*structure.displayed_size)
        resized = self.resized_size(*structure.displayed_size, overrides.max_pixels)
        grid = Grid(1, resized[1] // self.patch_size, resized[0] // self.patch_size)
        return picture_plan(structure, resized, grid, grid.num_patches // self.merge_size**2)

    def expand(self, plan: Plan) -> Expansion:
        """Rows of placeholders with a break after each but the last, which the end token
        follows."""
        rows, columns = plan.grid.h // self.merge_size, plan.grid.w // self.merge_size
        row = (self.item_token_ids[plan.modality],) * columns + (self.break_token_id,)
        return Expansion(
            (*(row * rows)[:-1], self.end_token_id),
            tuple(RowRun(i * len(row), columns, i * columns) for i in range(rows)),
        )

    # ---- positions

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        return count_positions(num_tokens, spans)

    # ---- identity

    def settings(self) -> Mapping[str, Any]:
        return {
            "family": self.family,
            "largest": self.largest,
            "max_pixels": self.largest[0] * self.largest[1],
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            **asdict(self.pixels),
        }


def _token_ids(checkpoint: Checkpoint) -> tuple[int, int]:
    """The ids of the break and the end, which only the tokenizer's files hold."""
    path = checkpoint.path
    named = read_object(path / "processor_config.json") or {}
    spelled = [str(named.get(name) or usual) for name, usual in (BREAK, END)]
    after_row, after_picture = (added_token_id(path, text) for text in spelled)
    if after_row is not None and after_picture is not None:
        return after_row, after_picture
    if (path / "tekken.json").is_file() and not (path / "tokenizer.json").is_file():
        raise UnsupportedCheckpoint(
            f"{path} holds its tokenizer as tekken.json only, a vendor's own format; put the "
            "tokenizer.json and tokenizer_config.json of the same model's Hugging Face conversion "
            "beside it"
        )
    raise CheckpointError(
        f"the tokenizer's files in {path} have no token {' or '.join(spelled)}; fetch "
        "tokenizer.json again"
    )


def _largest(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        size = {"longest_edge": size}
    if isinstance(size, Mapping) and size.get("longest_edge") is not None:
        edge = positive(size, "longest_edge")
        return edge, edge
    if isinstance(size, Mapping):
        return positive(size, "width"), positive(size, "height")
    raise CheckpointError(f"the image processor's size is {size!r}, which has no known form")
