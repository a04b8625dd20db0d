"""Patch embeddings as matrix products.

A convolution whose stride equals its kernel multiplies each patch by one matrix. As a convolution
that is slow: for the 3,996 patches of a 1036x756 picture a Conv3d of 1,280 channels took 419 ms of
a CPU core, the product for two frames 141 and for one 77. Weights are permuted once, to the order
of the pixels: row, column, channel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbedding(nn.Module):  # type: ignore[misc]
    """Replaces a transformers patch embedding whose ``proj``, a Conv3d, covers one patch of a few
    frames.

    A still picture stands for all of these frames, so one product with the sum of the frames'
    weights suffices: half the work for two frames. In float32, embeddings by random weights 1,280
    wide differ from the convolution's by at most 5.0e-6, of values up to 3.1. In bfloat16 the sum
    is rounded once more: the relative error against float32 is 0.0029, the convolution's 0.0023.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        if not tiles(convolution):
            raise ValueError(f"patches overlap or are not adjacent: {convolution}")
        weight = convolution.weight.detach().permute(0, 2, 3, 4, 1)  # [out, frames, p, p, 3]
        self.weight = _constant(weight.flatten(1))
        self.still_weight = _constant(weight.float().sum(1).flatten(1).to(weight.dtype))
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[patches, p, p, 3] of still pictures, or [patches, frames, p, p, 3] -> [patches, out]."""
        weight = self.still_weight if patches.ndim == 4 else self.weight
        return F.linear(patches.flatten(1), weight, self.bias)


class TileEmbedding(nn.Module):  # type: ignore[misc]
    """Replaces a Conv2d that embeds the patches of whole pictures or tiles."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.sides = cast(tuple[int, int], convolution.kernel_size)
        self.weight = _constant(convolution.weight.detach().permute(0, 2, 3, 1).flatten(1))
        self.bias = convolution.bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[tiles, channels, height, width], best with channels last in memory -> [tiles, out, rows,
        columns], a view with channels last. Pixels at the edges that fill no patch are ignored."""
        high, wide = self.sides
        rows, columns = pixels.shape[2] // high, pixels.shape[3] // wide
        whole = pixels[:, :, : rows * high, : columns * wide].permute(0, 2, 3, 1)
        patches = whole.unflatten(2, (columns, wide)).unflatten(1, (rows, high)).transpose(2, 3)
        embedded = F.linear(patches.flatten(3), self.weight, self.bias)
        return embedded.permute(0, 3, 1, 2)


def use_products(module: nn.Module) -> None:
    """Replaces each Conv2d in ``module`` whose patches tile the picture by a ``TileEmbedding``."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and tiles(child):
                setattr(parent, name, TileEmbedding(child))


def tiles(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether the convolution's patches lie side by side, so that it is one product for each."""
    ones = (1,) * len(convolution.kernel_size)
    padding: Any = convolution.padding
    return (
        convolution.stride == convolution.kernel_size
        and convolution.dilation == ones
        and convolution.groups == 1
        and padding in ("valid", (0,) * len(ones))
    )


def _constant(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
