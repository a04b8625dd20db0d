"""Decoders of several kinds over paged keys and values equal transformers' own, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llm_service.device.attention.base import (
    ATTENTION_NAME,
    AttentionStep,
    BlockShape,
    Chunk,
    active,
)
from llm_service.device.attention.sdpa import SdpaBackend
from opticnerve.models.decoders.decoder import PackedLanguage
from opticnerve.models.decoders.spec import Decoder, DecoderSpec, LayerSpec, llama_like

BLOCK = 16
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """A text model of transformers, and how it is declared here."""

    causal_lm: str  # The class with its head.
    model: str
    config: str
    settings: dict[str, Any]
    describe: Callable[[Any, Any], DecoderSpec]


def _plain(config: Any, model_class: Any) -> DecoderSpec:
    whole = SimpleNamespace(text_config=config, tie_word_embeddings=False)
    return llama_like(whole, model_class, position_dims=1)


def _unfused(config: Any, model_class: Any) -> DecoderSpec:
    layers = (LayerSpec(),) * config.num_hidden_layers
    return DecoderSpec(model_class, config, False, 1, layers, fusable=False)


def _gemma(config: Any, model_class: Any) -> DecoderSpec:
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    several = "sliding_attention" in config.rope_parameters
    return DecoderSpec(
        model_class,
        config,
        tied=True,
        position_dims=1,
        layers=tuple(
            LayerSpec(windows[kind], kind if several else None, config.attn_logit_softcapping)
            for kind in config.layer_types
        ),
        fusable=False,
        embedding_scale=config.hidden_size**0.5,
        logit_soft_cap=config.final_logit_softcapping,
    )


MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "mlp_only_layers": [1],
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "llama": Kind("LlamaForCausalLM", "LlamaModel", "LlamaConfig", {}, _plain),
    "mistral": Kind(
        "MistralForCausalLM", "MistralModel", "MistralConfig", {"sliding_window": 9}, _plain
    ),
    "ministral": Kind(
        "MinistralForCausalLM",
        "MinistralModel",
        "MinistralConfig",
        {"sliding_window": 20, "layer_types": ALTERNATING},
        _plain,
    ),
    "ministral3": Kind(
        "Ministral3ForCausalLM",
        "Ministral3Model",
        "Ministral3Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1,
            }
        },
        _unfused,
    ),
    "qwen2": Kind(
        "Qwen2ForCausalLM",
        "Qwen2Model",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        _plain,
    ),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Model", "Qwen3Config", {}, _unfused),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeConfig", MOE, _unfused),
    "glm4": Kind("Glm4ForCausalLM", "Glm4Model", "Glm4Config", {}, _unfused),
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        "Gemma2Model",
        "Gemma2Config",
        {"sliding_window": 10, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0},
        _gemma,
    ),
    "gemma3": Kind(
        "Gemma3ForCausalLM",
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {
            "sliding_window": 10,
            "query_pre_attn_scalar": 20,
            "layer_types": ALTERNATING,
            "final_logit_softcapping": 3.0,
        },
        _gemma,
    ),
}


def make(name: str) -> tuple[Any, PackedLanguage]:
    """(transformers' model, ours with its weights)."""
    kind = KINDS[name]
    config = getattr(transformers, kind.config)(**SIZES, **kind.settings)
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    whole = getattr(transformers, kind.causal_lm)(config).eval().requires_grad_(False)
    for parameter in whole.parameters():  # Deviations at which every part matters.
        parameter.copy_(torch.randn_like(parameter) / max(parameter.shape[-1], 1) ** 0.5)
    ours = getattr(transformers, kind.config)(**SIZES, **kind.settings)
    model_class = getattr(transformers, kind.model)
    module: Any = Decoder(model_class, ours).eval().requires_grad_(False)
    module.load_state_dict(whole.state_dict())
    ours._attn_implementation = ATTENTION_NAME
    return whole, PackedLanguage(module, kind.describe(ours, model_class))


class Pages:
    """One sequence in the blocks of a backend, which come in no order."""

    def __init__(self, language: PackedLanguage) -> None:
        self.language = language
        self.backend = SdpaBackend()
        shape = BlockShape(language.num_layers, language.num_kv_heads, language.head_dim, BLOCK)
        device = torch.device("cpu")
        self.backend.allocate(shape, 12, torch.float32, device, language.layers)
        self.blocks = np.array([7, 2, 9, 4, 11, 0], dtype=np.int64)
        self.length = 0

    def logits(
        self, ids: torch.Tensor, bidirectional: tuple[tuple[int, int], ...] = ()
    ) -> torch.Tensor:
        """Of the sequence's next tokens."""
        places = np.arange(self.length, self.length + len(ids))
        slots = self.blocks[places // BLOCK] * BLOCK + places % BLOCK
        if len(ids) == 1:
            step = AttentionStep(slots, self.blocks[None], places + 1)
        else:
            used = self.blocks[: places[-1] // BLOCK + 1]
            chunk = Chunk(0, len(ids), self.length, used, bidirectional)
            empty = np.zeros((0, 0), dtype=np.int64)
            step = AttentionStep(slots, empty, np.zeros(0, dtype=np.int64), (chunk,))
        self.length += len(ids)
        with torch.inference_mode(), active(self.backend):
            self.backend.prepare(step)
            positions = torch.from_numpy(places)[None]
            hidden = self.language.forward(self.language.embed(ids), positions)
            return self.language.logits(hidden)


def in_steps(language: PackedLanguage, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    pages = Pages(language)
    return torch.cat([pages.logits(part) for part in ids.split(list(lengths))])


@pytest.mark.parametrize("name", KINDS)
def test_chunks_and_tokens_equal_the_whole_model(name: str) -> None:
    whole, language = make(name)
    ids = torch.randint(3, 200, (70,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = whole(ids[None]).logits[0]
    for lengths in ([70], [5, 1, 1, 30, 1, 12, 20], [33, 30, *[1] * 7]):
        got = in_steps(language, ids, lengths)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
