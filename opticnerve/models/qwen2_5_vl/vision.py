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

from opticnerve.checkpoints.loader import (
    load_module,
    read_config,
    resolve_device,
    resolve_dtype,
    rotary_buffers,
)
from opticnerve.models.qwen2_5_vl.layout import make_layout
from opticnerve.models.towers import varlen
from opticnerve.models.towers.patch_tower import PatchTower
from opticnerve.models.towers.pixels import Patchify

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Grid
    from opticnerve.models.family import Preprocessor

KEY_MAP = ((r"(?:model\.)?visual\.", ""),)
"""Published as ``visual.*``, since transformers 5 ``model.visual.*``."""


class WindowTower(PatchTower):
    """Adds to PatchTower the order in which merge blocks fall into windows."""

    def __init__(self, module: Any, hidden_size: int, preprocess: Preprocessor) -> None:
        super().__init__(module, hidden_size, preprocess)
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
    """Merge blocks of one frame of ``h`` x ``w``, window by window, and each window's size.

    Windows of one size stand together (whole ones, those cut off at an edge, at both), so that
    attention takes each kind in one batch. Within its frame their order changes nothing: the
    tower undoes it, and its other layers attend to the whole frame.
    """
    blocks = np.arange(h * w, dtype=np.int64).reshape(h, w)
    windows = [
        blocks[top : top + window, left : left + window].ravel()
        for top in range(0, h, window)
        for left in range(0, w, window)
    ]
    windows.sort(key=len, reverse=True)
    return np.concatenate(windows), tuple(len(part) for part in windows)


def load_tower(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device
) -> WindowTower:
    """Raises CheckpointError for a checkpoint without this tower's weights, whole."""
    config = read_config(Qwen2_5_VLConfig, checkpoint).vision_config
    module = load_module(
        lambda: Qwen2_5_VisionTransformerPretrainedModel(config),
        checkpoint,
        KEY_MAP,
        dtype=resolve_dtype(dtype, checkpoint, resolve_device(device)),
        device=resolve_device(device),
        recomputed=rotary_buffers("rotary_pos_emb"),
    )
    varlen.use(module)
    layout = make_layout(checkpoint)
    preprocess = Patchify(
        layout.pixels, layout.patch_size, layout.merge_size, layout.temporal_patch_size
    )
    return WindowTower(module, config.out_hidden_size, preprocess)
