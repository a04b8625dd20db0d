"""A vision tower as one static graph, for engines that run without torch's own kernels.

Everything that depends on a picture's size is an input, computed by torch on the device: rotary
tables, masks, the places of patches. The graph itself has dense layers and two dynamic sizes,
``pictures`` and ``patches``; ``towers.export`` writes it as ONNX, one file for TensorRT, TensorRT
for RTX and onnxruntime.

Every picture of a call is padded to the call's bucket, a number of ``patches``. Padded keys are
masked, so padding changes no row. Towers attend only within pictures, so frames of a video and
tiles of a picture are pictures of the graph, too.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.media.plan import Plan

CLOSED = -30000.0
"""Added to the score of a masked key; its softmax is then 0 in every precision. Finite even in
float16, so that a row in which all keys are masked (a padded query) stays finite."""

PICTURES, PATCHES = "pictures", "patches"
MAX_PICTURES, MAX_PATCHES = 4096, 2**20  # Bounds in the export; engines have smaller ones.

Sizes = tuple[int | str, ...]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class GraphInput:
    """``shape``: numbers, and ``PICTURES`` or ``PATCHES`` for sizes that differ between calls."""

    shape: Sizes
    dtype: torch.dtype


class TowerGraph(ABC):
    """Tower and projector of one checkpoint as a graph, and how its inputs are made and its outputs
    split.

    Outputs are "rows" and "deepstack.<i>", each [pictures, tokens, hidden_size], of the padded
    pictures.
    """

    module: nn.Module | None  # forward(**inputs) -> outputs in order; None once released.
    dtype: torch.dtype  # Of weights and outputs.
    device: torch.device  # Where ``prepare`` computes.
    hidden_size: int
    inputs: Mapping[str, GraphInput]  # In the graph's order.
    output_names: tuple[str, ...]
    unit: int = 1  # A bucket is a multiple of it.
    fixed_patches: int | None = None  # The only bucket of a tower of one picture size.

    # ---- shapes

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    def shapes(self, pictures: int, patches: int) -> dict[str, tuple[int, ...]]:
        """The shape of each input, for optimization profiles."""
        sizes = {PICTURES: pictures, PATCHES: patches}
        return {
            name: tuple(sizes[size] if isinstance(size, str) else size for size in each.shape)
            for name, each in self.inputs.items()
        }

    def output_shapes(self, pictures: int, patches: int) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        shape = (pictures, self.tokens(patches), self.hidden_size)
        return dict.fromkeys(self.output_names, shape)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """``torch.export``'s dimensions by input; their maxima are far beyond any engine's."""
        sizes = {
            PICTURES: torch.export.Dim(PICTURES, min=1, max=MAX_PICTURES),
            PATCHES: self.unit
            * torch.export.Dim("units", min=1, max=max(MAX_PATCHES // self.unit, 2)),
        }
        return {
            name: {i: sizes[size] for i, size in enumerate(each.shape) if isinstance(size, str)}
            for name, each in self.inputs.items()
        }

    def example(self, pictures: int, patches: int) -> dict[str, torch.Tensor]:
        """Inputs of zeros for a call of that size, on ``device``."""
        return {
            name: torch.zeros(shape, dtype=self.inputs[name].dtype, device=self.device)
            for name, shape in self.shapes(pictures, patches).items()
        }

    @abstractmethod
    def tokens(self, patches: int) -> int:
        """Rows of a picture of ``patches``, padding included."""

    # ---- calls

    @abstractmethod
    def pictures(self, plan: Plan) -> int:
        """The number of the graph's pictures in an item: its frames or tiles."""

    @abstractmethod
    def patches(self, plan: Plan) -> int:
        """The smallest bucket, a multiple of ``unit``, that holds each of the item's pictures."""

    @abstractmethod
    def prepare(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan], patches: int
    ) -> dict[str, torch.Tensor]:
        """Inputs of one call, contiguous, on ``device``: the items' pictures one after the other,
        each padded to a bucket of ``patches``. Raises PlanMismatch when pixels and plan differ."""

    @abstractmethod
    def split(self, outputs: Tensors, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        """Named tensors of each item, [num_tokens, hidden_size] and without padding, from the
        outputs of the call that was prepared from the same plans. They are copies: the outputs may
        be overwritten afterwards."""

    def release(self) -> None:
        """Drops ``module`` and its weights; ``prepare`` and ``split`` still work."""
        self.module = None


def share_weights(module: Any) -> Any:
    """A copy of ``module`` that shares its weights, and whose submodules may be replaced.
    transformers' RMS norms, which take several primitive operations, become torch's one."""
    tensors = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for name, part in list(twin.named_modules()):
        if hasattr(part, "variance_epsilon"):
            norm = nn.RMSNorm(part.weight.shape, part.variance_epsilon, device="meta")
            norm.weight = part.weight
            twin.set_submodule(name, norm)
    return twin.eval()


def attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention as two products and a softmax, which every engine knows how to fuse.

    [rows, length, heads, dim] each -> the same. The scale of scores is already part of query and
    key. ``mask``, [rows, 1, 1 or length, length], is added to the scores. ONNX's Attention would be
    one node, but onnxruntime requires a mask for every query there, and TensorRT for RTX takes no
    float32.
    """
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2)
