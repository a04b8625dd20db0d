"""Qwen3-VL's decoder: dense, or with a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

MODELS: dict[str, tuple[Any, Any]] = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLTextModel),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeTextModel),
}


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    config_class, model_class = MODELS[checkpoint.config["model_type"]]
    config = transformers_config(config_class, checkpoint)
    return llama_like(config, model_class, position_dims=3)
