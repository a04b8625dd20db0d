"""Vision towers: as a family declares them, their loading, and the one that takes patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from opticnerve.checkpoints.loader import (
    Recompute,
    load_module,
    rotary_buffers,
)
from opticnerve.models.towers import varlen
from opticnerve.models.towers.pixels import PixelTable, check_pixels, upload

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.checkpoints.json_files import PixelSettings
    from opticnerve.media.plan import Grid, Plan
    from opticnerve.models.family import KeyMap, Tower


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A tower's module and what runs it. ``load`` makes it a ``family.Tower``."""

    make_module: Callable[[], nn.Module]
    make_tower: Callable[[Any], Tower]  # From the loaded module.
    # As in ``loader.load_module``.
    recomputed: Mapping[str, Recompute] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    def load(
        self,
        checkpoint: Checkpoint,
        keys: KeyMap,
        dtype: str | torch.dtype,
        device: str | torch.device,
    ) -> Tower:
        """The vision half of ``checkpoint``, whose keys ``keys`` renames. Raises CheckpointError,
        see ``loader.load_module``."""
        module = load_module(
            self.make_module,
            checkpoint,
            keys,
            dtype=dtype,
            device=device,
            recomputed=self.recomputed,
            ignored=self.ignored,
        )
        return self.make_tower(module)


class ModuleTower:
    """What the towers here share: a torch module, and where and in what it computes."""

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        self.module = module
        self.hidden_size = hidden_size
        weight = next(module.parameters())
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.table = PixelTable(pixels, self.dtype, self.device)


def without_batch(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` in memory of their own: a view would keep the whole batch's alive."""
    whole = rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()
    return rows if whole else rows.clone()


class PatchTower(ModuleTower):
    """Implements ``opticnerve.models.family.Tower`` over a transformers tower such as Qwen2-VL's.

    ``module``: forward(patches, grid_thw=..., **precomputed), with merged rows as its
    ``pooler_output``.
    """

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        super().__init__(module, pixels, hidden_size)
        self.patch_size: int = module.config.patch_size
        self.frames: int = module.config.temporal_patch_size
        self.merge_size: int = module.config.spatial_merge_size
        varlen.use(module)

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """See ``family.Tower``. Raises PlanMismatch when patches and plan differ."""
        for patches, plan in zip(pixels, plans, strict=True):
            check_pixels(patches, plan.num_patches, self.patch_size, self.patch_size, 3)
        with torch.inference_mode():
            values = self.table(upload(pixels, self.device)).permute(0, 3, 1, 2)
            patches = values[:, :, None].expand(-1, -1, self.frames, -1, -1).flatten(1)
            rows = self.forward(patches, [plan.grid for plan in plans])
            items = rows.split([plan.num_tokens for plan in plans])
            return [{"rows": without_batch(item)} for item in items]

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """[patches, patch_dim] of all pictures -> [tokens, hidden_size]."""
        sizes = torch.tensor([(grid.t, grid.h, grid.w) for grid in grids])
        rows: torch.Tensor = self.module(
            patches, grid_thw=sizes, **self.precompute(grids)
        ).pooler_output
        return rows

    def precompute(self, grids: Sequence[Grid]) -> dict[str, Any]:
        """Keyword arguments of the tower that spare it from reading the grids on the device."""
        frames = [grid.h * grid.w for grid in grids for _ in range(grid.t)]
        packing = varlen.Packing.of(frames, self.device)
        return {
            "cu_seqlens": packing.cu_seqlens,
            "max_seqlen": packing.max_seqlen,
            "position_ids": self._position_ids(grids),
            "packings": (packing,),
        }

    def _position_ids(self, grids: Sequence[Grid]) -> torch.Tensor:
        """int64 [patches, 2]: row and column of every patch."""
        parts = [position_ids(grid.t, grid.h, grid.w, self.merge_size) for grid in grids]
        return torch.from_numpy(np.concatenate(parts)).to(self.device, non_blocking=True)


def patch_tower(
    module_class: Any,
    config: Any,
    pixels: PixelSettings,
    hidden_size: int,
    tower_class: type[PatchTower] = PatchTower,
) -> TowerSpec:
    """A transformers tower of ``module_class``, made from ``config``, its vision configuration."""
    return TowerSpec(
        make_module=lambda: module_class(config),
        make_tower=lambda module: tower_class(module, pixels, hidden_size),
        recomputed=rotary_buffers("rotary_pos_emb"),
    )


@lru_cache(maxsize=256)
def position_ids(t: int, h: int, w: int, merge: int) -> NDArray[np.int64]:
    """int64 [t * h * w, 2]: row and column, in the order of patches: by merge blocks."""
    rows, columns = np.indices((h, w), dtype=np.int64)
    pair = np.stack([rows, columns], axis=-1)
    blocks = pair.reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.tile(blocks.reshape(-1, 2), (t, 1))
