"""The graph of towers that see squares of one size, such as CLIP's: only their number varies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from opticnerve.models.towers.graph import (
    PICTURES,
    GraphInput,
    Tensors,
    TowerGraph,
    attend_by_products,
    share_weights,
)
from opticnerve.models.towers.pixels import check_pixels, upload
from opticnerve.models.towers.tower import ModuleTower

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.media.plan import Plan


class JoinedAttention(nn.Module):  # type: ignore[misc]
    """Replaces a transformers attention such as CLIP's: its three products are joined into one, and
    the scale of scores is multiplied into the query's weights."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.out_proj = attention.out_proj
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        scales = [attention.scale, 1.0, 1.0]
        self.weight = _joined([part.weight for part in parts], scales)
        self.bias = _joined([part.bias for part in parts], scales)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[tiles, patches, width] -> the same."""
        tiles, patches, _ = hidden_states.shape
        heads = self.num_heads
        joined = F.linear(hidden_states, self.weight, self.bias)
        query, key, value = joined.view(tiles, patches, 3 * heads, -1).chunk(3, dim=2)
        output = attend_by_products(query, key, value)
        return self.out_proj(output.flatten(2)), None


def _joined(parts: Sequence[torch.Tensor], scales: Sequence[float]) -> nn.Parameter:
    scaled = [
        (part.float() * scale).to(part.dtype) for part, scale in zip(parts, scales, strict=True)
    ]
    return nn.Parameter(torch.cat(scaled), requires_grad=False)


class TileLayers(nn.Module):  # type: ignore[misc]
    """``module``, which takes [tiles, 3, height, width], for pixels with channels last."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.layers = module
        for name, part in list(module.named_modules()):
            if hasattr(part, "q_proj"):
                module.set_submodule(name, JoinedAttention(part))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layers(pixels.permute(0, 3, 1, 2)),)


class TileGraph(TowerGraph):
    """The graph of a tower whose module takes [tiles, 3, size, size], and whose rows are those of
    one tile after the other. A plan's ``grid.t`` is its number of tiles.

    Input: "pixels", a tile's normalised pixels, channels last.
    """

    def __init__(self, tower: ModuleTower, size: int, patches: int, tokens: int) -> None:
        """``patches``, ``tokens``: of one tile."""
        self._table, self._size, self._tokens = tower.table, size, tokens
        self.dtype, self.device, self.hidden_size = tower.dtype, tower.device, tower.hidden_size
        self.fixed_patches = self._patches = patches
        self.inputs = {"pixels": GraphInput((PICTURES, size, size, 3), self.dtype)}
        self.output_names = ("rows",)
        self.module = TileLayers(share_weights(tower.module)).eval()

    def tokens(self, patches: int) -> int:
        return self._tokens

    def pictures(self, plan: Plan) -> int:
        return plan.grid.t

    def patches(self, plan: Plan) -> int:
        return self._patches

    def prepare(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan], patches: int
    ) -> dict[str, torch.Tensor]:
        for tiles, plan in zip(pixels, plans, strict=True):
            check_pixels(tiles, plan.grid.t, self._size, self._size, 3)
        with torch.inference_mode():
            return {"pixels": self._table(upload(pixels, self.device))}

    def split(self, outputs: Tensors, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        items = outputs["rows"].split([plan.grid.t for plan in plans])
        return [{"rows": item.flatten(0, 1).clone()} for item in items]
