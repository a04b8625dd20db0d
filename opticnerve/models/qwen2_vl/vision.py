"""Qwen2-VL's vision tower and merger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from opticnerve.checkpoints.loader import (
    load_module,
    read_config,
    resolve_device,
    resolve_dtype,
    rotary_buffers,
)
from opticnerve.models.qwen2_vl.layout import make_layout
from opticnerve.models.towers import varlen
from opticnerve.models.towers.patch_tower import PatchTower
from opticnerve.models.towers.pixels import Patchify

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

KEY_MAP = ((r"(?:model\.)?visual\.", ""),)
"""Published as ``visual.*``, since transformers 5 ``model.visual.*``."""


def load_tower(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device
) -> PatchTower:
    """Raises CheckpointError for a checkpoint without this tower's weights, whole."""
    config = read_config(Qwen2VLConfig, checkpoint).vision_config
    module = load_module(
        lambda: Qwen2VisionTransformerPretrainedModel(config),
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
    return PatchTower(module, config.hidden_size, preprocess)
