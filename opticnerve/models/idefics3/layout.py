"""Idefics3's layout: a picture's longest edge is resized, and both edges to whole tiles.

Each tile has placeholders of its own, after a token that says its row and column. Rows end in line
breaks, and the whole picture, in one tile, comes last. Positions are one-dimensional and count up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from opticnerve.checkpoints.json_files import PixelSettings, positive, read_object, token_id
from opticnerve.checkpoints.tokenizer_files import (
    encode_texts,
    named_tokens,
    read_tokenizer_config,
)
from opticnerve.errors import CheckpointError, PlanMismatch
from opticnerve.media.plan import Modality, Plan
from opticnerve.models.family import Expansion, RowRun
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.text_models import text_sizes
from opticnerve.models.tiles import TiledLayout, check_tiles

if TYPE_CHECKING:
    from pathlib import Path

    from opticnerve.checkpoints.checkpoint import Checkpoint

LONGEST_EDGE = 4096  # The reference's own bound, whatever the processor's settings say.
USUAL_PIXELS = {"resample": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Idefics3Layout(TiledLayout):
    """Implements ``opticnerve.models.family.Layout``. ``max_pixels`` bounds the canvas; if it
    allows only one tile, that is the whole picture.

    The preprocessor also reads ``first_size``.
    """

    family = "idefics3"

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, vision = checkpoint.config, checkpoint.vision_config
        processor = processor_settings(checkpoint)
        tile = processor.get("max_image_size", {"longest_edge": 364})
        super().__init__(
            PixelSettings.read({**USUAL_PIXELS, **processor}),
            positive(tile if isinstance(tile, Mapping) else {}, "longest_edge"),
            positive(vision, "patch_size", 32),
            positive(config, "scale_factor", 2),
        )
        size = processor.get("size", {"longest_edge": 4 * 364})
        self.longest_edge = positive(size if isinstance(size, Mapping) else {}, "longest_edge")
        self.splits = bool(processor.get("do_image_splitting", True))
        check_tiles(self._most_tiles**2, "the image processor's size over its max_image_size")
        self._check_tokens(checkpoint)
        self.hidden_size, self.max_positions = text_sizes(checkpoint)
        image_token_id = token_id(config, "image_token_id", 128257)
        self.item_token_ids = {Modality.IMAGE: image_token_id}
        self._path = checkpoint.path
        if checkpoint.side == "gateway":
            _ = self.placeholder_ids

    def _check_tokens(self, checkpoint: Checkpoint) -> None:
        whole = read_object(checkpoint.path / "processor_config.json") or {}
        written = positive(whole, "image_seq_len", 169)
        if written != self.tile_tokens:
            raise CheckpointError(
                f"the processor writes {written} placeholders a tile (image_seq_len) but the "
                f"vision tower makes {self.tile_tokens} rows of it; the files are not of one "
                "checkpoint"
            )

    # ---- pictures

    @property
    def max_pixels(self) -> int:
        return (self._most_tiles * self.tile_size) ** 2

    @property
    def _most_tiles(self) -> int:
        """Tiles along the longest edge of the largest canvas."""
        longest = min(self.longest_edge, LONGEST_EDGE)
        return math.ceil(longest / self.tile_size) if self.splits else 1

    def canvas(self, width: int, height: int, max_pixels: int) -> tuple[int, int]:
        shape = (1, 1)
        for longest in self._longest_edges():
            shape = self._shape(width, height, longest)
            if shape[0] * shape[1] * self.tile_size**2 <= max_pixels:
                break
        return shape

    def first_size(self, width: int, height: int, plan: Plan) -> tuple[int, int]:
        """(width, height) of a displayed picture after its first resize, which keeps the aspect;
        the second resize is to the plan's canvas. Raises PlanMismatch."""
        for longest in self._longest_edges():
            if self._shape(width, height, longest) == self.shape(plan):
                return _scaled(width, height, longest)
        raise PlanMismatch(f"a picture of {width}x{height} does not fit its plan")

    def _longest_edges(self) -> Iterator[int]:
        """The processor's longest edge, then shorter ones for canvases of fewer tiles."""
        yield self.longest_edge
        yield from (n * self.tile_size for n in range(self._most_tiles - 1, 0, -1))

    def _shape(self, width: int, height: int, longest: int) -> tuple[int, int]:
        """(columns, rows) of the canvas after a first resize to the longest edge ``longest``."""
        if not self.splits:
            return 1, 1
        width, height = _scaled(width, height, longest)
        aspect = width / height
        if width >= height:
            columns = self._tiles(width)
            return columns, self._tiles(int(columns * self.tile_size / aspect))
        rows = self._tiles(height)
        return self._tiles(int(rows * self.tile_size * aspect)), rows

    def _tiles(self, pixels: int) -> int:
        return math.ceil(pixels / self.tile_size)

    # ---- tokens

    def expand(self, plan: Plan) -> Expansion:
        """Before each tile, the token that marks a picture and the tile's place; at the end, the
        mark again."""
        columns, rows = self.shape(plan)
        marks, token = self._separators, self.item_token_ids[plan.modality]
        ids: list[int] = []
        runs: list[RowRun] = []

        def add_tile(place: tuple[int, ...]) -> None:
            ids.extend((marks.fake, *place))
            runs.append(RowRun(len(ids), self.tile_tokens, len(runs) * self.tile_tokens))
            ids.extend([token] * self.tile_tokens)

        if columns * rows > 1:
            for row in range(rows):
                for column in range(columns):
                    add_tile(marks.places[row, column])
                ids.extend(marks.row_end if row < rows - 1 else marks.last_row_end)
        add_tile(marks.whole)
        return Expansion((*ids, marks.fake), tuple(runs))

    @cached_property
    def placeholder_ids(self) -> Mapping[str, int]:
        """Read on first use, since an encoder may have no tokenizer. Places that the tokenizer
        writes in several tokens are ordinary text and left out. Raises CheckpointError."""
        marks = self._separators
        pieces = {"global_image_token": marks.whole} | {
            f"row_{row + 1}_col_{column + 1}_token": ids
            for (row, column), ids in marks.places.items()
        }
        return {
            "image_token": self.item_token_ids[Modality.IMAGE],
            "fake_image_token": marks.fake,
            **{name: ids[0] for name, ids in pieces.items() if len(ids) == 1},
        }

    @cached_property
    def _separators(self) -> Separators:
        return Separators.read(self._path, self._most_tiles)

    # ---- identity

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "longest_edge": self.longest_edge, "splits": self.splits}


@dataclass(frozen=True, slots=True)
class Separators:
    """The tokens of an expansion that are not placeholders."""

    fake: int  # Marks a picture.
    places: Mapping[tuple[int, int], tuple[int, ...]]  # By (row, column), from 0.
    whole: tuple[int, ...]  # In the place of (row, column), for the whole picture.
    row_end: tuple[int, ...]
    last_row_end: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, most_tiles: int) -> Separators:
        """Encodes them by the tokenizer in ``path``, for canvases of up to ``most_tiles`` tiles a
        side. Raises CheckpointError."""
        named = named_tokens(read_tokenizer_config(path))
        fake = named.get("fake_image_token", "<fake_token_around_image>")
        places = [(row, column) for row in range(most_tiles) for column in range(most_tiles)]
        texts = [
            named.get("global_image_token", "<global-img>"),
            "\n",
            "\n\n",
            *(f"<row_{row + 1}_col_{column + 1}>" for row, column in places),
        ]
        # Encoded between two marks, as in a prompt: some tokenizers treat the start of a text
        # differently.
        (mark, *others), *found = encode_texts(path, [fake, *(fake + t + fake for t in texts)])
        if others:
            raise CheckpointError(
                f"the tokenizer lacks {fake}, which stands before pictures; fetch its files again"
            )
        whole, row_end, last_row_end, *placed = (ids[1:-1] for ids in found)
        return cls(mark, dict(zip(places, placed, strict=True)), whole, row_end, last_row_end)


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) of about the same aspect, with the longest edge ``longest``, or LONGEST_EDGE
    if that is shorter. The other edge is made even, as in the reference."""
    aspect = width / height
    if width >= height:
        width, height = longest, _even(int(longest / aspect))
    else:
        width, height = _even(int(longest * aspect)), longest
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > LONGEST_EDGE:
        width, height = LONGEST_EDGE, int(LONGEST_EDGE / aspect)
    elif height > width and height > LONGEST_EDGE:
        width, height = int(LONGEST_EDGE * aspect), LONGEST_EDGE
    return max(width, 1), max(height, 1)


def _even(pixels: int) -> int:
    return pixels + pixels % 2
