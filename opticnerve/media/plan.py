"""What is known of a media item before any pixel is decoded, and how it will be encoded.

Plain frozen values. The gateway makes plans, the encoder follows them, and the LLM worker sees only
spans. Imports neither torch nor grpc.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

WHITE = 0xFFFFFF
LIGHT_PASSES = 2**25  # A picture is heavy if its decode cost is larger (some tenths of a second),
LIGHT_MEMORY = 2**28  # or if decoding takes more bytes.


class Modality(StrEnum):
    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"


class SpanAttention(StrEnum):
    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"  # Computed in one chunk.


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches along time, height and width, before merging."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True, slots=True)
class Structure:
    """A picture's properties, from its headers.

    ``width`` and ``height`` are in pixels, as stored; ``orientation`` is EXIF's, 1 to 8.
    ``decode_cost`` is pixels times decoding passes: for a baseline JPEG about its number of pixels,
    for a progressive one that times its scans. ``memory`` is the peak memory of decoding, in bytes.
    Both are estimates, and 0 if no file was read.
    """

    format: str  # "png", "jpeg", "webp", "gif", "bmp"
    width: int
    height: int
    orientation: int = 1
    frames: int = 1
    decode_cost: int = field(default=0, compare=False)
    memory: int = field(default=0, compare=False)

    @property
    def displayed_size(self) -> tuple[int, int]:
        """(width, height) after orientation; 5 to 8 turn the picture by 90 degrees."""
        if self.orientation >= 5:
            return self.height, self.width
        return self.width, self.height

    @property
    def is_heavy(self) -> bool:
        """Whether decoding takes so much time or memory that other pictures should not wait for
        it."""
        return self.decode_cost > LIGHT_PASSES or self.memory > LIGHT_MEMORY


@dataclass(frozen=True, slots=True)
class Overrides:
    """Processor settings that a request changes for one item; None keeps the model's own."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    # 0xRRGGBB, shown where the picture is transparent: white, as in transformers' image processors.
    # None: transparency is dropped, as its ``load_image`` does with files and URLs, and transparent
    # pixels show their colours.
    background: int | None = WHITE
    one_of_several: bool = False  # See ``planned_as_several``.


NO_OVERRIDES = Overrides()


def planned_as_several(pictures: int, settings: Mapping[str, Any]) -> bool:
    """Whether pictures are planned with ``Overrides.one_of_several`` in a prompt that has
    ``pictures`` of them.

    ``settings``: the model's ``Layout.settings()``. Without ``several_pictures`` there, pictures
    are planned alike in every prompt.
    """
    return pictures > 1 and "several_pictures" in settings


DEFAULT_MAX_PIXELS = 89_478_485
DEFAULT_MAX_PASSES = 2**30
"""A little more than the cost of the largest picture as a progressive JPEG with the usual ten
scans: some seconds of one core."""


def parse_background(text: str) -> int | None:
    """0xRRGGBB for a colour that Pillow's ImageColor reads (``white``, ``#ff8800``, ``rgb(0, 0,
    0)``), or None for ``none``.

    Raises ValueError for anything else, and for a colour that is itself transparent.
    """
    from PIL import ImageColor  # Not at the top: most importers of this module need no Pillow.

    text = text.strip()
    if text.lower() == "none":
        return None
    red, green, blue, *alpha = ImageColor.getrgb(text)
    if alpha not in ([], [255]):
        raise ValueError(f"the colour {text!r} is itself transparent")
    return int.from_bytes(bytes((red, green, blue)))


@dataclass(frozen=True, slots=True)
class Plan:
    """How one item will be decoded, resized, cut and counted. See ``embedding.proto``.

    ``decode_cost`` and ``is_heavy`` are the structure's, ``attention`` is the family's; messages to
    encoders and equality leave them out.
    """

    modality: Modality
    format: str
    width: int  # As stored, before orientation.
    height: int
    orientation: int
    resized_width: int  # What the tower sees, after orientation.
    resized_height: int
    grid: Grid
    num_tokens: int  # Embedding rows, and as many placeholder tokens.
    num_patches: int  # Encoding cost.
    frames: int = 1
    seconds_per_grid: float = 0.0
    decode_cost: int = field(default=0, compare=False)
    is_heavy: bool = field(default=False, compare=False)
    # Among the tokens of the item's spans.
    attention: SpanAttention = field(default=SpanAttention.CAUSAL, compare=False)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of placeholder positions that rows of one item overwrite. See ``llm.proto``."""

    token_offset: int
    num_tokens: int
    item: int
    row_start: int
    modality: Modality
    grid_thw: Grid
    seconds_per_grid: float = 0.0
    attention: SpanAttention = SpanAttention.CAUSAL

    def identity(self, key: str, start: int) -> bytes:
        """Everything that decides the span's keys and values in the KV cache, for hashes of tokens
        from position ``start`` on. ``key``: the item's content key. The span's length is included,
        since tokens of a bidirectional span depend on all of its rows."""
        grid, name = self.grid_thw, key.encode()
        fields = struct.pack(
            "<8qd?",
            self.token_offset - start,  # Negative if the span began earlier.
            self.num_tokens,
            self.row_start,
            grid.t,
            grid.h,
            grid.w,
            _MODALITY_NUMBER[self.modality.value],
            len(name),
            self.seconds_per_grid,
            self.attention is SpanAttention.BIDIRECTIONAL,
        )
        return fields + name


_MODALITY_NUMBER = {"image": 1, "video": 2, "audio": 3}
