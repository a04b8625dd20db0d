"""Mistral 3's decoder: Mistral's, or Ministral 3's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Ministral3Model, Mistral3Config
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from opticnerve.checkpoints.json_files import number, positive
from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.spec import DecoderSpec, llama_like
from opticnerve.models.llava.language import text_decoder

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    """Raises UnsupportedCheckpoint for a text model of another kind."""
    config = transformers_config(Mistral3Config, checkpoint)
    text = config.text_config
    if text.model_type != "ministral3":
        return text_decoder(config)
    spec = llama_like(config, Ministral3Model, position_dims=1)
    return replace(spec, query_scale=_query_scale(text.rope_parameters))


def _query_scale(rope: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ministral 3's queries grow with the logarithm of their positions. Raises CheckpointError."""
    beta = number(rope, "llama_4_scaling_beta")
    length = positive(rope, "original_max_position_embeddings")

    def scale(positions: torch.Tensor) -> torch.Tensor:
        factors: torch.Tensor = get_llama_4_attn_scale(positions[None], beta, length)
        return factors.flatten()

    return scale
