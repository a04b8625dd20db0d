"""Qwen2.5-VL's vision tower and merger: most of its layers attend within windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.picture_sizes import processor_settings
from opticnerve.models.towers import varlen
from opticnerve.models.towers.tower import PatchTower, TowerSpec, patch_tower

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Grid


class WindowTower(PatchTower):
    """A PatchTower whose windowed layers see merge blocks ordered by windows."""

    def __init__(self, module: Any, pixels: PixelSettings, hidden_size: int) -> None:
        super().__init__(module, pixels, hidden_size)
        config = module.config
        self.window = config.window_size // config.patch_size // config.spatial_merge_size

    def precompute(self, grids: Sequence[Grid]) -> dict[str, Any]:
        arguments = super().precompute(grids)
        merge = self.merge_size
        orders, lengths, offset = [], [], 0
        for grid in grids:
            order, counts = window_order(grid.h // merge, grid.w // merge, self.window)
            for _ in range(grid.t):
                orders.append(order + offset)
                lengths += [count * merge * merge for count in counts]
                offset += len(order)
        windows = varlen.Packing.of(lengths, self.device)
        index = torch.from_numpy(np.concatenate(orders)).to(self.device, non_blocking=True)
        return arguments | {
            "window_index": index,
            "cu_window_seqlens": windows.cu_seqlens,
            "max_window_seqlen": windows.max_seqlen,
            "packings": (*arguments["packings"], windows),
        }


@lru_cache(maxsize=256)
def window_order(h: int, w: int, window: int) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The merge blocks of a frame of ``h`` x ``w`` blocks, window by window, and each window's
    size.

    Windows are sorted by size (whole ones first, then those that an edge or a corner cuts), so that
    attention takes each size in one batch. The order of windows does not matter: the tower undoes
    it at the end, and its other layers attend to the whole frame.
    """
    blocks = np.arange(h * w, dtype=np.int64).reshape(h, w)
    windows = [
        blocks[top : top + window, left : left + window].ravel()
        for top in range(0, h, window)
        for left in range(0, w, window)
    ]
    windows.sort(key=len, reverse=True)
    return np.concatenate(windows), tuple(len(part) for part in windows)


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = transformers_config(Qwen2_5_VLConfig, checkpoint).vision_config
    return patch_tower(
        Qwen2_5_VisionTransformerPretrainedModel,
        config,
        PixelSettings.read(processor_settings(checkpoint)),
        config.out_hidden_size,
        WindowTower,
    )
