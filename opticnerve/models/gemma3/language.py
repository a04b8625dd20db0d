"""Gemma 3's decoder: five layers with a sliding window for each one without, with a rotary table
for each of the two kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Gemma3Config, Gemma3TextModel

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.fused import LayerForm
from opticnerve.models.decoders.spec import DecoderSpec, LayerSpec, layer_windows

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

FORM = LayerForm(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    centred=True,
)


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    """Applies the configuration's soft caps. Published checkpoints have none, and transformers'
    Gemma 3 with pictures ignores them."""
    config = transformers_config(Gemma3Config, checkpoint)
    text = config.text_config
    layers = zip(layer_windows(text), text.layer_types, strict=True)
    return DecoderSpec(
        Gemma3TextModel,
        text,
        tied=config.tie_word_embeddings,
        position_dims=1,
        layers=tuple(
            LayerSpec(window, kind, text.attn_logit_softcapping) for window, kind in layers
        ),
        fusable=True,
        form=FORM,
        embedding_scale=text.hidden_size**0.5,
        logit_soft_cap=text.final_logit_softcapping,
        recomputed={"model.embed_tokens.embed_scale": _embed_scale},
    )


def _embed_scale(embedding: Any) -> torch.Tensor:
    return torch.tensor(embedding.scalar_embed_scale)
