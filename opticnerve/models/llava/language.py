"""LLaVA's decoder, which is one of several text models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import LlamaModel, LlavaConfig, MistralModel, Qwen2Model

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

MODELS: dict[str, Any] = {"llama": LlamaModel, "mistral": MistralModel, "qwen2": Qwen2Model}


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    """Raises UnsupportedCheckpoint for a text model of another kind."""
    return text_decoder(transformers_config(LlavaConfig, checkpoint))


def text_decoder(config: Any) -> DecoderSpec:
    """The decoder of ``config``, transformers' configuration of a whole model. Raises
    UnsupportedCheckpoint for a text model that is none of MODELS."""
    kind = config.text_config.model_type
    if kind not in MODELS:
        raise UnsupportedCheckpoint(
            f"this checkpoint's language model is {kind!r}; supported are {', '.join(MODELS)}"
        )
    return llama_like(config, MODELS[kind], position_dims=1)
