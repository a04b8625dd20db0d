"""Qwen2-VL's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    return llama_like(
        transformers_config(Qwen2VLConfig, checkpoint), Qwen2VLTextModel, position_dims=3
    )
