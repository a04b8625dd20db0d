"""LLaVA-1.5's language model and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaModel, LlavaConfig, MistralModel, Qwen2Model

from opticnerve.checkpoints.loader import read_config
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.models.decoders.decoder import PackedLanguage, load_decoder

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

MODELS: dict[str, Any] = {"llama": LlamaModel, "mistral": MistralModel, "qwen2": Qwen2Model}


def load_language(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device, attention: str
) -> PackedLanguage:
    """Raises CheckpointError for a checkpoint without these weights, whole."""
    config = read_config(LlavaConfig, checkpoint)
    kind = config.text_config.model_type
    if kind not in MODELS:
        raise UnsupportedCheckpoint(
            f"this LLaVA checkpoint's language model is {kind!r}; supported are {', '.join(MODELS)}"
        )
    return load_decoder(
        checkpoint,
        MODELS[kind],
        config.text_config,
        tied=config.tie_word_embeddings,
        dtype=dtype,
        device=device,
        attention=attention,
        position_dims=1,
    )
