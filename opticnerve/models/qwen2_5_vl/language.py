"""Qwen2.5-VL's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    config = transformers_config(Qwen2_5_VLConfig, checkpoint)
    return llama_like(config, Qwen2_5_VLTextModel, position_dims=3)
