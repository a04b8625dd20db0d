"""Decoders of several kinds over paged keys and values equal transformers' own, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from llm_service.device.attention.base import (
    ATTENTION_NAME,
    AttentionStep,
    BlockShape,
    Chunk,
    active,
)
from llm_service.device.attention.sdpa import SdpaBackend
from opticnerve.errors import FamilyError
from opticnerve.models.decoders.decoder import PackedLanguage
from opticnerve.models.decoders.fused import PRE_NORM, LayerForm, Norm
from opticnerve.models.decoders.spec import Decoder, DecoderSpec, LayerSpec, llama_like

BLOCK = 16
GEMMA = LayerForm(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    centred=True,
)
GLM = LayerForm(
    after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm", neighbours=True
)
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
    return replace(_plain(config, model_class), fusable=False)


def _glm(config: Any, model_class: Any) -> DecoderSpec:
    return replace(_plain(config, model_class), form=GLM)


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
        fusable=True,
        form=GEMMA,
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
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Model", "Qwen3Config", {}, _plain),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeConfig", MOE, _plain),
    "glm4": Kind("Glm4ForCausalLM", "Glm4Model", "Glm4Config", {}, _glm),
    "cohere2": Kind(
        "Cohere2ForCausalLM",
        "Cohere2Model",
        "Cohere2Config",
        {
            "sliding_window": 9,
            "layer_types": ALTERNATING,
            "logit_scale": 1.0,
            "tie_word_embeddings": False,
        },
        _unfused,
    ),
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


def make(name: str, fused: bool = True) -> tuple[Any, PackedLanguage]:
    """(transformers' model, ours with its weights)."""
    kind = KINDS[name]
    config = getattr(transformers, kind.config)(**SIZES, **kind.settings)
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    whole = getattr(transformers, kind.causal_lm)(config).eval().requires_grad_(False)
    _draw(whole)
    ours = getattr(transformers, kind.config)(**SIZES, **kind.settings)
    model_class = getattr(transformers, kind.model)
    module: Any = Decoder(model_class, ours).eval().requires_grad_(False)
    module.load_state_dict(whole.state_dict())
    ours._attn_implementation = ATTENTION_NAME
    spec = kind.describe(ours, model_class)
    return whole, PackedLanguage(module, spec if fused else replace(spec, fusable=False))


def _draw(model: Any) -> None:
    """Weights of deviations at which every part matters."""
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
HALF = MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
SHARED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
SPATIAL: dict[str, tuple[dict[str, Any], LayerForm]] = {
    "Qwen2VLText": ({"rope_parameters": MROPE}, PRE_NORM),
    "Qwen3VLText": ({"rope_parameters": MROPE}, PRE_NORM),
    "Qwen3VLMoeText": ({"rope_parameters": MROPE, **MOE}, PRE_NORM),
    "Glm4vText": ({"rope_parameters": HALF}, GLM),
    "Glm4vMoeText": ({"rope_parameters": HALF, **SHARED}, PRE_NORM),
}


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
        self,
        ids: torch.Tensor,
        bidirectional: tuple[tuple[int, int], ...] = (),
        positions: torch.Tensor | None = None,
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
            if positions is None:
                positions = torch.from_numpy(places)[None]
            hidden = self.language.forward(self.language.embed(ids), positions)
            return self.language.logits(hidden)


def in_steps(language: PackedLanguage, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    pages = Pages(language)
    return torch.cat([pages.logits(part) for part in ids.split(list(lengths))])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers of transformers"])
@pytest.mark.parametrize("name", KINDS)
def test_chunks_and_tokens_equal_the_whole_model(name: str, fused: bool) -> None:
    whole, language = make(name, fused)
    assert (language.fused is not None) == (fused and KINDS[name].describe is not _unfused)
    ids = torch.randint(3, 200, (70,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = whole(ids[None]).logits[0]
    for lengths in ([70], [5, 1, 1, 30, 1, 12, 20], [33, 30, *[1] * 7]):
        got = in_steps(language, ids, lengths)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers of transformers"])
@pytest.mark.parametrize("name", SPATIAL)
def test_positions_of_three_dimensions_equal_the_whole_model(name: str, fused: bool) -> None:
    settings, form = SPATIAL[name]
    model_class = getattr(transformers, f"{name}Model")
    whole, ours = (getattr(transformers, f"{name}Config")(**SIZES, **settings) for _ in range(2))
    whole._attn_implementation = "eager"
    torch.manual_seed(6)
    model = model_class(whole).eval().requires_grad_(False)
    _draw(model)
    module: Any = Decoder(model_class, ours).eval().requires_grad_(False)
    module.model.load_state_dict(model.state_dict())
    ours._attn_implementation = ATTENTION_NAME
    layers = (LayerSpec(),) * ours.num_hidden_layers
    language = PackedLanguage(
        module, DecoderSpec(model_class, ours, False, 3, layers, fusable=fused, form=form)
    )
    ids = torch.randint(3, 200, (40,))
    positions = torch.randint(0, 60, (3, 40))
    with torch.inference_mode():
        hidden = model(input_ids=ids[None], position_ids=positions[:, None]).last_hidden_state[0]
        expected = language.logits(hidden)
    got = Pages(language).logits(ids, positions=positions)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_a_norm_that_counts_from_one_keeps_its_digits_in_half_precision() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    module = Gemma3RMSNorm(64).to(torch.bfloat16).requires_grad_(False)
    module.weight.copy_(torch.randn(64) / 50)
    x = torch.randn(30, 64).to(torch.bfloat16)
    torch.testing.assert_close(Norm(module, centred=True).forward(x), module(x), rtol=0, atol=0)


def test_a_layer_is_few_operations() -> None:
    """Of a kind that needs no norm beside its two: views and copies included."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Counter.count += 1
            return function(*args, **(kwargs or {}))

    _, language = make("llama")
    pages = Pages(language)
    pages.logits(torch.arange(3, 20))
    with torch.inference_mode(), Counter():
        pages.logits(torch.tensor([7]))
    assert Counter.count <= 35 * language.num_layers + 10


def test_layers_without_a_declared_norm_are_told_before_they_are_loaded() -> None:
    config = transformers.Cohere2Config(**SIZES)
    with pytest.raises(FamilyError, match="Cohere2DecoderLayer has no 'post_attention_layernorm'"):
        _plain(config, transformers.Cohere2Model)._make_module()
    _unfused(config, transformers.Cohere2Model)._make_module()
