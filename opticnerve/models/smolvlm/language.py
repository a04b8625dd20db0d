"""SmolVLM's decoder, a Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import SmolVLMConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.idefics3.language import llama_decoder

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.decoders.spec import DecoderSpec


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    return llama_decoder(transformers_config(SmolVLMConfig, checkpoint), "SmolVLM")
