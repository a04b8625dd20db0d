"""Vision towers: their declaration by a family, their loading, and the tower that takes patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from opticnerve.checkpoints.loader import (
    Recompute,
    check_module,
    load_module,
    rotary_buffers,
)
from opticnerve.media.plan import Modality
from opticnerve.models.towers import varlen
from opticnerve.models.towers.patches import PatchEmbedding, use_products
from opticnerve.models.towers.pixels import PixelTable, check_pixels, upload

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.checkpoints.json_files import PixelSettings
    from opticnerve.checkpoints.sizes import HalfSize
    from opticnerve.media.plan import Grid, Plan
    from opticnerve.models.family import KeyMap, Tower


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A tower's module and what runs it. ``load`` makes it a ``family.Tower``."""

    make_module: Callable[[], nn.Module]
    make_tower: Callable[[Any], Tower]  # Called with the loaded module.
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

    def check(self, checkpoint: Checkpoint, keys: KeyMap) -> HalfSize:
        """The size of what ``load`` would load. Raises its errors; see ``loader.check_module``."""
        return check_module(self.make_module, checkpoint, keys, ignored=self.ignored)


class ModuleTower:
    """Shared by all towers: a torch module, its device and dtype, and the table (``table``) that
    turns pixels into its floats."""

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        use_products(module)
        self.module = module
        self.hidden_size = hidden_size
        weight = next(module.parameters())
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self.table = PixelTable(pixels, self.dtype, self.device)


def without_batch(rows: torch.Tensor) -> torch.Tensor:
    """``rows``, copied if they are a view on the CPU, which would keep the whole batch's memory
    alive. Rows on a device stay as they are; the encoder copies them to the host, batch by
    batch."""
    whole = rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()
    return rows if whole or rows.device.type != "cpu" else rows.clone()


class PatchTower(ModuleTower):
    """Implements ``opticnerve.models.family.Tower`` over a transformers tower such as Qwen2-VL's.

    ``module``: forward(patches, grid_thw=..., **precomputed), with merged rows as its
    ``pooler_output``; its ``patch_embed`` has the convolution ``proj``.
    """

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        super().__init__(module, pixels, hidden_size)
        self.patch_size: int = module.config.patch_size
        self.frames: int = getattr(module.config, "temporal_patch_size", 1)
        self.merge_size: int = module.config.spatial_merge_size
        self.embed_by_product()
        varlen.use(module)

    def embed_by_product(self) -> None:
        """Replaces the module's patch embedding by a PatchEmbedding."""
        self.module.patch_embed = PatchEmbedding(self.module.patch_embed.proj)

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """See ``family.Tower``. Raises PlanMismatch when patches and plan differ."""
        for patches, plan in zip(pixels, plans, strict=True):
            frames = (self.frames,) if plan.modality is Modality.VIDEO else ()
            check_pixels(patches, plan.num_patches, *frames, self.patch_size, self.patch_size, 3)
        with torch.inference_mode():
            patches = self.table(upload(self._alike(pixels), self.device))
            named = self.forward(patches, [plan.grid for plan in plans])
            lengths = [plan.num_tokens for plan in plans]
            items: list[dict[str, torch.Tensor]] = [{} for _ in plans]
            for name, rows in named.items():
                for item, own in zip(items, rows.split(lengths), strict=True):
                    item[name] = without_batch(own)
        return items

    def _alike(self, pixels: Sequence[NDArray[np.uint8]]) -> Sequence[NDArray[np.uint8]]:
        """``pixels`` in one form: in a batch with videos, a still picture's frame is repeated,
        without a copy."""
        if len({item.ndim for item in pixels}) == 1:
            return pixels
        shape = (self.frames, self.patch_size, self.patch_size, 3)
        return [
            np.broadcast_to(item[:, None], (len(item), *shape)) if item.ndim == 4 else item
            for item in pixels
        ]

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        """Runs the module on the patches of all pictures, in the form that ``PatchEmbedding``
        takes. Returns named tensors, each [tokens, hidden_size]."""
        sizes = grid_sizes(grids).to(self.device, non_blocking=True)
        output = self.module(patches, grid_thw=sizes, **self.precompute(grids))
        return self.named_rows(output)

    def named_rows(self, output: Any) -> dict[str, torch.Tensor]:
        """Picks an embedding's named tensors from the module's output for the whole batch."""
        return {"rows": output.pooler_output}

    def precompute(self, grids: Sequence[Grid]) -> dict[str, Any]:
        """Keyword arguments of the tower that follow from the grids, so that it need not read the
        grids back from the device."""
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
    """The declaration of a transformers tower: ``module_class(config)``. ``config``: its vision
    configuration."""
    return TowerSpec(
        make_module=lambda: module_class(config),
        make_tower=lambda module: tower_class(module, pixels, hidden_size),
        recomputed=rotary_buffers("rotary_pos_emb"),
    )


def grid_sizes(grids: Sequence[Grid]) -> torch.Tensor:
    """int64 [pictures, 3]: time, height and width, on the CPU."""
    return torch.tensor([(grid.t, grid.h, grid.w) for grid in grids])


class Interpolation:
    """Interpolates a square ``table`` of learned positions to any grid, as transformers' towers do.
    Keeps the table's settings, not the table."""

    def __init__(self, table: Any, merge: int, device: torch.device) -> None:
        self._settings = {
            "num_grid_per_side": table.num_grid_per_side,
            "mode": table.interpolation_mode,
            "align_corners": table.interpolation_align_corners,
            "spatial_merge_size": merge,
        }
        self._device = device

    def __call__(self, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
        """Keyword arguments of the tower: for every patch, in the order of merge blocks, entries of
        the table, int64 [patches, 4], and their weights, [patches, 4]."""
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_sizes(grids), **self._settings
        )
        return {
            "interp_indices": indices.to(self._device, non_blocking=True),
            "interp_weights": weights.to(self._device, non_blocking=True),
        }


@lru_cache(maxsize=256)
def position_ids(t: int, h: int, w: int, merge: int) -> NDArray[np.int64]:
    """int64 [t * h * w, 2]: row and column, in the order of patches: by merge blocks."""
    rows, columns = np.indices((h, w), dtype=np.int64)
    pair = np.stack([rows, columns], axis=-1)
    blocks = pair.reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.tile(blocks.reshape(-1, 2), (t, 1))
