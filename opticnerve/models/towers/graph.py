"""A vision tower as one static graph, for engines that run without torch's own kernels.

Everything that depends on a picture's size is an input, computed outside by torch on the device:
rotary tables, masks, the places of patches. What is left is a graph of dense layers with two
dynamic sizes, ``pictures`` and ``patches``, that ``towers.export`` writes as ONNX: one file for
TensorRT, TensorRT for RTX and onnxruntime.

A call has a bucket: ``patches``, to which every picture of the call is padded. A padded key is
masked, so padding changes no row. Where towers attend within pictures only, the frames of a video
and the tiles of a picture are pictures of the graph, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.media.plan import Plan

CLOSED = -30000.0
"""What is added to the score of a key that may not be attended. The softmax of such a score is 0
in every precision. It is finite, even in float16, so that a row of closed keys alone (padding's
own) stays finite."""

PICTURES, PATCHES = "pictures", "patches"
MAX_PICTURES, MAX_PATCHES = 4096, 2**20  # Bounds of the export's dimensions, not of an engine.

Tensors = Mapping[str, torch.Tensor]


class TowerGraph(Protocol):
    """Tower and projector of one checkpoint as a graph, and the way to it and from it.

    Outputs are "rows" and "deepstack.<i>", each [pictures, tokens, hidden_size], of the padded
    pictures.
    """

    module: nn.Module | None  # forward(**inputs) -> outputs in order; None once released.
    dtype: torch.dtype  # Of weights and outputs, and of inputs unless ``example`` says otherwise.
    device: torch.device  # Where ``prepare`` computes.
    hidden_size: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    unit: int  # A bucket is a multiple of it.
    fixed_patches: int | None  # The one bucket of a tower that sees one size; else None.

    def pictures(self, plan: Plan) -> int:
        """How many of a call's pictures an item takes: its frames or tiles."""
        ...

    def patches(self, plan: Plan) -> int:
        """The smallest bucket, a multiple of ``unit``, that holds each of the item's pictures."""
        ...

    def example(self, patches: int, pictures: int) -> dict[str, torch.Tensor]:
        """Inputs of that bucket, random and unmasked, by name."""
        ...

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """``torch.export``'s dimensions by input."""
        ...

    def shapes(self, pictures: int, patches: int) -> dict[str, tuple[int, ...]]:
        """The shape of each input, for optimization profiles."""
        ...

    def output_shapes(self, pictures: int, patches: int) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        ...

    def prepare(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan], patches: int
    ) -> dict[str, torch.Tensor]:
        """Inputs of one call, contiguous, on ``device``: the items' pictures, padded to a bucket of
        ``patches``. Raises PlanMismatch when pixels and plan differ."""
        ...

    def split(self, outputs: Tensors, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        """Named tensors of each item, [num_tokens, hidden_size] and without padding, from the
        outputs of the call that ``prepare`` made of the same plans. Copies: outputs may be
        overwritten afterwards."""
        ...

    def release(self) -> None:
        """Drops ``module`` and its weights; ``prepare`` and ``split`` go on working."""
        ...
