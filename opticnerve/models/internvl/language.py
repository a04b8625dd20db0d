"""InternVL's decoder, which is one of several text models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import InternVLConfig, LlamaModel, Qwen2Model, Qwen3Model, Qwen3MoeModel

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

MODELS: dict[str, Any] = {
    "qwen2": Qwen2Model,
    "qwen3": Qwen3Model,
    "qwen3_moe": Qwen3MoeModel,
    "llama": LlamaModel,
}


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    """Raises UnsupportedCheckpoint for a text model of another kind."""
    config = transformers_config(InternVLConfig, checkpoint)
    kind = config.text_config.model_type
    if kind not in MODELS:
        raise UnsupportedCheckpoint(
            f"this InternVL checkpoint's language model is {kind!r}; supported are "
            f"{', '.join(MODELS)}"
        )
    _keep_frequencies(config.text_config)
    return llama_like(config, MODELS[kind], position_dims=1)


def _keep_frequencies(text: Any) -> None:
    """Makes "dynamic" rotary embeddings, as InternVL 2.5 and 3 publish them, plain ones. They
    differ only beyond max_position_embeddings, which is the longest prompt."""
    rope = text.rope_parameters or {}
    if rope.get("rope_type") == "dynamic":
        text.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
