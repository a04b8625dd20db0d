"""Qwen2-VL's layout: pictures of any size, in patches that are merged two by two; 3D positions.

A picture of h x w patches becomes h * w / merge² placeholders between the template's vision
markers. Positions are (t, h, w): text counts all three up together; a picture's tokens share
their start in t and count rows and columns; text after it goes on past the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import PixelSettings, positive, token_id
from opticnerve.errors import CheckpointError, InvalidRequest
from opticnerve.media.plan import NO_OVERRIDES, Grid, Modality, Overrides, Plan, Span, Structure
from opticnerve.models.family import Expansion
from opticnerve.models.picture_sizes import (
    check_agreed,
    check_aspect,
    check_overrides,
    picture_plan,
    processor_settings,
)

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

MAX_SECONDS_PER_GRID = 3600


def smart_resize(
    width: int, height: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(width, height) as multiples of ``factor``, close to the given ones, with about
    ``min_pixels`` to ``max_pixels`` in all. Halves round to the even multiple, as in Python.

    Raises InvalidMedia if one side is more than 200 times the other.
    """
    check_aspect(width, height)
    new_width = round(width / factor) * factor
    new_height = round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


class Qwen2VLLayout:
    """Implements ``opticnerve.models.family.Layout``.

    The preprocessor also reads ``pixels``, ``patch_size``, ``merge_size`` and
    ``temporal_patch_size``.
    """

    family = "qwen2_vl"
    position_dims = 3
    deepstack_levels = 0
    rewrite = None
    other_placeholders: tuple[str, ...] = (
        "video_token",
        "vision_start_token",
        "vision_end_token",
        "vision_token",
    )
    # transformers' defaults, which published files leave out.
    defaults: Mapping[str, int] = {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_size": 8192,
        "max_position_embeddings": 32768,
        "patch_size": 14,
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, vision = checkpoint.config, checkpoint.vision_config
        processor, text = processor_settings(checkpoint), checkpoint.text_config
        usual = self.defaults
        image_token_id = token_id(config, "image_token_id", usual["image_token_id"])
        video_token_id = token_id(config, "video_token_id", usual["video_token_id"])
        self.item_token_ids = {Modality.IMAGE: image_token_id, Modality.VIDEO: video_token_id}
        self.placeholder_ids = {"image_token": image_token_id}
        for name in self.other_placeholders:
            if config.get(f"{name}_id") is not None:
                self.placeholder_ids[name] = token_id(config, f"{name}_id")
        self.hidden_size = positive(text, "hidden_size", usual["hidden_size"])
        self.max_positions = positive(
            text, "max_position_embeddings", usual["max_position_embeddings"]
        )
        self.pixels = PixelSettings.read(processor)
        self.patch_size = _agreed(
            processor, "patch_size", vision, "patch_size", usual["patch_size"]
        )
        self.merge_size = _agreed(processor, "merge_size", vision, "spatial_merge_size", 2)
        self.temporal_patch_size = self.frames(checkpoint)
        self.min_pixels, self.max_pixels = _pixel_bounds(processor, usual)

    def frames(self, checkpoint: Checkpoint) -> int:
        """The number of frames that a patch of the tower covers."""
        processor, vision = processor_settings(checkpoint), checkpoint.vision_config
        return _agreed(processor, "temporal_patch_size", vision, "temporal_patch_size", 2)

    # ---- pictures

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        width, height = structure.displayed_size
        min_pixels, max_pixels = self._bounds(overrides)
        resized = self.resize(width, height, min_pixels, max_pixels)
        grid = Grid(1, resized[1] // self.patch_size, resized[0] // self.patch_size)
        return picture_plan(structure, resized, grid, self.num_tokens(grid))

    def resize(self, width: int, height: int, low: int, high: int) -> tuple[int, int]:
        """(width, height) that the tower sees, of about ``low`` to ``high`` pixels. Raises
        InvalidMedia."""
        return smart_resize(width, height, self.patch_size * self.merge_size, low, high)

    def _bounds(self, overrides: Overrides) -> tuple[int, int]:
        """(min, max) pixels of one item. If a request sets only one bound, the model's other bound
        gives way where they contradict each other. Raises InvalidRequest."""
        check_overrides(overrides)
        low, high = overrides.min_pixels, overrides.max_pixels
        if low is None:
            low = self.min_pixels if high is None else min(self.min_pixels, high)
        if high is None:
            high = max(self.max_pixels, low)
        return low, high

    def num_tokens(self, grid: Grid) -> int:
        return grid.num_patches // self.merge_size**2

    def expand(self, plan: Plan) -> Expansion:
        """One run of placeholders; the markers around it are the template's."""
        return Expansion.of_rows(self.item_token_ids[plan.modality], plan.num_tokens)

    # ---- positions

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        """int64 [3, num_tokens] and the delta of the output. Raises InvalidRequest for spans that
        overlap, go beyond the prompt, or do not have as many tokens as their grid needs."""
        result = np.empty((3, num_tokens), dtype=np.int64)
        offset = position = 0
        for span in sorted(spans, key=lambda item: item.token_offset):
            end = span.token_offset + span.num_tokens
            self._check(span, offset, num_tokens)
            text = span.token_offset - offset
            result[:, offset : span.token_offset] = np.arange(position, position + text)
            position += text
            result[:, span.token_offset : end] = position + self._span_positions(span)
            position += max(span.grid_thw.h, span.grid_thw.w) // self.merge_size
            offset = end
        result[:, offset:] = np.arange(position, position + num_tokens - offset)
        largest = int(result.max()) if num_tokens else -1
        return result, largest + 1 - num_tokens

    def _check(self, span: Span, offset: int, num_tokens: int) -> None:
        if span.token_offset < offset or span.token_offset + span.num_tokens > num_tokens:
            raise InvalidRequest(
                "spans overlap, or one goes beyond the prompt's tokens", param="spans"
            )
        grid, merge = span.grid_thw, self.merge_size
        fits = grid.h % merge == 0 and grid.w % merge == 0
        if span.num_tokens < 1 or not fits or span.num_tokens != self.num_tokens(grid):
            raise InvalidRequest(
                f"a span of {span.num_tokens} tokens does not fit its grid of "
                f"{grid.t}x{grid.h}x{grid.w} patches",
                param="spans",
            )
        if not 0 <= span.seconds_per_grid <= MAX_SECONDS_PER_GRID:
            raise InvalidRequest(
                f"seconds_per_grid must be between 0 and {MAX_SECONDS_PER_GRID}", param="spans"
            )

    def _span_positions(self, span: Span) -> NDArray[np.int64]:
        """int64 [3, span.num_tokens], from 0."""
        grid = span.grid_thw
        shape = (grid.t, grid.h // self.merge_size, grid.w // self.merge_size)
        positions = np.indices(shape, dtype=np.int64).reshape(3, -1)
        steps = self.temporal_steps(span)
        if steps is not None:
            positions[0] = np.repeat(steps, shape[1] * shape[2])
        return positions

    def temporal_steps(self, span: Span) -> NDArray[np.int64] | None:
        """int64 [grid.t]: a span's temporal positions, from 0; None if they are 0, 1, 2, ..."""
        return None

    # ---- identity

    def settings(self) -> Mapping[str, Any]:
        return {
            "family": self.family,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            **asdict(self.pixels),
        }


def _agreed(
    processor: Mapping[str, Any], name: str, vision: Mapping[str, Any], vision_name: str, usual: int
) -> int:
    """A size on which processor and tower must agree. Raises CheckpointError."""
    size = positive(vision, vision_name, usual)
    written = {name: positive(processor, name, usual)}
    check_agreed(written, name, f"the vision tower's {vision_name}", size)
    return size


def _pixel_bounds(processor: Mapping[str, Any], usual: Mapping[str, int]) -> tuple[int, int]:
    """(min, max) pixels, written as min_pixels/max_pixels or as a size of two edges."""
    size = processor.get("size")
    size = size if isinstance(size, Mapping) else {}
    low = positive(size, "shortest_edge", positive(size, "min_pixels", usual["min_pixels"]))
    high = positive(size, "longest_edge", positive(size, "max_pixels", usual["max_pixels"]))
    low, high = positive(processor, "min_pixels", low), positive(processor, "max_pixels", high)
    if low > high:
        raise CheckpointError(
            f"the image processor makes pictures of at least {low} pixels and at most {high}; "
            "fetch preprocessor_config.json again"
        )
    return low, high
