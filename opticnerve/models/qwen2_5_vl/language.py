"""Qwen2.5-VL's language model and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from opticnerve.checkpoints.loader import read_config
from opticnerve.models.decoders.decoder import PackedLanguage, load_decoder

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def load_language(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device, attention: str
) -> PackedLanguage:
    """Raises CheckpointError for a checkpoint without these weights, whole."""
    config = read_config(Qwen2_5_VLConfig, checkpoint)
    return load_decoder(
        checkpoint,
        Qwen2_5_VLTextModel,
        config.text_config,
        tied=config.tie_word_embeddings,
        dtype=dtype,
        device=device,
        attention=attention,
        position_dims=3,
    )
