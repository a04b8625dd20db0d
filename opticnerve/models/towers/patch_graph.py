"""The graph of towers that take patches of any grid, such as Qwen2-VL's.

A picture's patches are one row of the batch, padded to the bucket. The layers are transformers'
own, except that attention is products and a softmax over padded pictures, which every engine fuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from opticnerve.errors import PlanMismatch
from opticnerve.models.towers.graph import (
    CLOSED,
    PATCHES,
    PICTURES,
    GraphInput,
    Tensors,
    TowerGraph,
    attend_by_products,
    share_weights,
)
from opticnerve.models.towers.pixels import check_pixels, upload
from opticnerve.models.towers.tower import PatchTower, position_ids

if TYPE_CHECKING:
    from opticnerve.media.plan import Grid, Plan


class PaddedAttention(nn.Module):  # type: ignore[misc]
    """Attention with the weights of transformers' module, over rows of one length: pictures or
    windows."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads: int = attention.num_heads

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """``hidden`` [rows * length, width]; cosines and sines float32 [rows, length, 1, dim], as
        ``rotary_tables`` makes them; ``mask`` [rows, 1, 1 or length, length]."""
        cos, sin = position_embeddings
        heads = self.num_heads
        qkv = self.qkv(hidden).view(-1, cos.shape[1], 3 * heads, cos.shape[3])
        query_key, value = qkv.split([2 * heads, heads], dim=2)
        wide = query_key.float()
        first, second = wide.chunk(2, dim=-1)
        turned = wide * cos + torch.cat([second, first], dim=-1) * sin
        query, key = turned.to(hidden.dtype).chunk(2, dim=2)
        output = attend_by_products(query, key, value, mask)
        rows: torch.Tensor = self.proj(output.reshape(hidden.shape))
        return rows


class PatchLayers(nn.Module):  # type: ignore[misc]
    """A transformers patch tower and its merger over padded pictures.

    ``module``: the tower, from ``share_weights``. ``windowed``: indices of the layers that attend
    within bins of ``bin_size`` patches. ``levels``: the merger of each DeepStack output, by the
    index of the layer that it reads.
    """

    def __init__(
        self,
        module: Any,
        *,
        windowed: Sequence[int] = (),
        bin_size: int = 1,
        levels: Mapping[int, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = module.patch_embed
        self.merge_size: int = module.config.spatial_merge_size
        self.blocks, self.merger = module.blocks, module.merger
        for block in self.blocks:
            block.attn = PaddedAttention(block.attn)
        self.windowed, self.bin_size = frozenset(windowed), bin_size
        self.level_layers = tuple(levels or ())
        self.level_mergers = nn.ModuleList((levels or {}).values())

    def forward(
        self,
        pixels: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key_mask: torch.Tensor,
        window_mask: torch.Tensor | None = None,
        position_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Takes ``PatchGraph.inputs``. Returns the rows, then the DeepStack levels, each [pictures,
        tokens, hidden_size]."""
        embed = self.patch_embed
        hidden = F.linear(pixels.flatten(0, 1), embed.still_weight, embed.bias)
        if position_rows is not None:
            hidden = hidden + position_rows.flatten(0, 1)
        whole = {"position_embeddings": (cos, sin), "mask": key_mask}
        within = whole if window_mask is None else self._bins(cos, sin, window_mask)
        levels = []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, cu_seqlens=None, **(within if i in self.windowed else whole))
            if i in self.level_layers:
                levels.append(self.level_mergers[self.level_layers.index(i)](hidden))
        tokens = pixels.shape[1] // self.merge_size**2
        outputs = [self.merger(hidden), *levels]
        return tuple(output.view(-1, tokens, output.shape[-1]) for output in outputs)

    def _bins(
        self, cos: torch.Tensor, sin: torch.Tensor, window_mask: torch.Tensor
    ) -> dict[str, Any]:
        """The keyword arguments of windowed layers, for which every bin is a row."""
        tables = tuple(table.view(-1, self.bin_size, 1, table.shape[-1]) for table in (cos, sin))
        mask = window_mask.view(-1, 1, self.bin_size, self.bin_size)
        return {"position_embeddings": tables, "mask": mask}


class PatchGraph(TowerGraph):
    """The graph of a ``PatchTower`` whose layers attend to whole frames; for still pictures.

    Inputs: "pixels", a patch's normalised pixels; "cos" and "sin", see ``rotary_tables``;
    "key_mask", 0 for patches and ``CLOSED`` for padding.
    """

    def __init__(self, tower: PatchTower, **layers: Any) -> None:
        """``layers``: further arguments of ``PatchLayers``."""
        module = share_weights(tower.module)
        attention = module.blocks[0].attn
        self._scaling: float = attention.scaling
        self._rotary = module.rotary_pos_emb
        self._table, self._patch_size = tower.table, tower.patch_size
        self._merge_size = tower.merge_size
        self.dtype, self.device = tower.dtype, tower.device
        self.hidden_size, self.unit = tower.hidden_size, tower.merge_size**2
        table = GraphInput(
            (PICTURES, PATCHES, 1, attention.qkv.in_features // attention.num_heads), torch.float32
        )
        self.inputs = {
            "pixels": GraphInput((PICTURES, PATCHES, tower.patch_size**2 * 3), self.dtype),
            "cos": table,
            "sin": table,
            "key_mask": GraphInput((PICTURES, 1, 1, PATCHES), self.dtype),
        }
        self.output_names = ("rows",)
        self.module = PatchLayers(module, **layers).eval()

    def tokens(self, patches: int) -> int:
        return patches // self._merge_size**2

    def pictures(self, plan: Plan) -> int:
        return plan.grid.t

    def patches(self, plan: Plan) -> int:
        length = self.row_length(plan.grid.h, plan.grid.w)
        return -(-length // self.unit) * self.unit

    # ---- where a frame's patches lie in its row

    def row_length(self, h: int, w: int) -> int:
        """Places in a row that a frame of ``h`` x ``w`` patches takes, gaps included."""
        return h * w

    def row_places(self, h: int, w: int) -> NDArray[np.int64]:
        """int64 [h * w]: the place of each patch. Merge blocks stay whole and in order."""
        return np.arange(h * w, dtype=np.int64)

    def _places(self, plans: Sequence[Plan], patches: int) -> list[NDArray[np.int64]]:
        """For each item, int64: the places of its patches in a batch of rows of ``patches``."""
        places, start = [], 0
        for plan in plans:
            frame = self.row_places(plan.grid.h, plan.grid.w)
            end = start + plan.grid.t * patches
            places.append((frame + np.arange(start, end, patches)[:, None]).ravel())
            start = end
        return places

    # ---- calls

    def prepare(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan], patches: int
    ) -> dict[str, torch.Tensor]:
        for picture, plan in zip(pixels, plans, strict=True):
            check_pixels(picture, plan.num_patches, self._patch_size, self._patch_size, 3)
            if self.patches(plan) > patches:
                raise PlanMismatch(f"a bucket of {patches} patches is too small for {plan.grid}")
        grids = [plan.grid for plan in plans]
        places = self._upload(np.concatenate(self._places(plans, patches)))
        shapes = self.shapes(sum(grid.t for grid in grids), patches)
        with torch.inference_mode():
            packed = {"pixels": self._table(upload(pixels, self.device)).flatten(1)}
            packed |= self.packed_inputs(grids)
            inputs = {name: values.new_zeros(shapes[name]) for name, values in packed.items()}
            for name, values in packed.items():
                inputs[name].flatten(0, 1).index_copy_(0, places, values)
            inputs |= self.masks(grids, places, shapes)
        return {name: inputs[name] for name in self.inputs}

    def packed_inputs(self, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        """The inputs that have a value for every patch, [patches of all grids, ...], unpadded."""
        parts = [position_ids(grid.t, grid.h, grid.w, self._merge_size) for grid in grids]
        cos, sin = rotary_tables(self._rotary, self._upload(np.concatenate(parts)), self._scaling)
        return {"cos": cos, "sin": sin}

    def masks(
        self, grids: Sequence[Grid], places: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """The inputs that mask padding. ``places``: where the patches of ``grids`` are."""
        key_mask = torch.full(shapes["key_mask"], CLOSED, dtype=self.dtype, device=self.device)
        key_mask.view(-1).index_fill_(0, places, 0)
        return {"key_mask": key_mask}

    def split(self, outputs: Tensors, plans: Sequence[Plan]) -> list[dict[str, torch.Tensor]]:
        block = self._merge_size**2
        items = []
        for places in self._places(plans, outputs["rows"].shape[1] * block):
            rows = self._upload(places[::block] // block)
            items.append(
                {name: each.flatten(0, 1).index_select(0, rows) for name, each in outputs.items()}
            )
        return items

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def rotary_tables(
    rotary: Any, positions: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [patches, 1, dim] each, of ``positions``, int64 [patches, 2].

    A vector x is rotated by ``x * cos + swap_halves(x) * sin``, for which the first half's sines
    are negated. Both are multiplied by the square root of attention's ``scaling``, so that the
    product of a rotated query and a rotated key is scaled already, as TensorRT requires.
    """
    cos, sin = rotary(positions, positions)
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return cos[:, None] * scaling**0.5, sin[:, None] * scaling**0.5
