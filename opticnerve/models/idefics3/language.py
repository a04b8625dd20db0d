"""Idefics3's decoder, a Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Idefics3Config, LlamaModel

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    return llama_decoder(transformers_config(Idefics3Config, checkpoint), "Idefics3")


def llama_decoder(config: Any, title: str) -> DecoderSpec:
    """``config``: transformers' configuration of the whole model. Raises UnsupportedCheckpoint for
    a text model of another kind."""
    kind = config.text_config.model_type
    if kind != "llama":
        raise UnsupportedCheckpoint(
            f"this {title} checkpoint's language model is {kind!r}; supported is llama"
        )
    return llama_like(config, LlamaModel, position_dims=1)
