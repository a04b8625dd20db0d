"""LLaVA-OneVision's decoder, which is one of several text models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import LlavaOnevisionConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.llava.language import text_decoder

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.decoders.spec import DecoderSpec


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    """Raises UnsupportedCheckpoint for a text model of another kind than LLaVA's."""
    return text_decoder(transformers_config(LlavaOnevisionConfig, checkpoint))
