"""The language half equals the unsplit model, fused or not, on packed tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, ConfigError, UnsupportedCheckpoint
from opticnerve.media.plan import Modality, Span, Structure
from opticnerve.models import registry
from opticnerve.models.decoders import decoder
from opticnerve.models.decoders.decoder import PackedLanguage
from opticnerve.models.decoders.linear import can_halve
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.families import samples
from tests.reference import CAUSAL, both_ways, load_reference, picture, place

MakeCheckpoint = Callable[..., Path]
DENSE = [name for name in FAMILIES if not samples()[name].has_experts]


def load(path: Path | None, dtype: str = "float32") -> PackedLanguage:
    checkpoint = Checkpoint.open(None if path is None else str(path), side="llm")
    language: Any = registry.load_language(checkpoint, dtype, "cpu", CAUSAL)
    return language


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "fuse", lambda *_: None)


def text_logits(language: PackedLanguage, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        positions = torch.arange(len(ids)).expand(language.position_dims, -1)
        hidden = language.forward(language.embed(ids), positions)
        return language.logits(hidden)


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_the_unsplit_model(
    family: str, layout: str, random_checkpoint: MakeCheckpoint
) -> None:
    path = random_checkpoint(family, layout=layout)
    ids = torch.randint(0, 600, (50,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = load_reference(path)(ids[None]).logits[0]
    logits = text_logits(load(path), ids)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not can_halve(), reason="this CPU keeps no weights in 16 bits")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DENSE)
def test_a_bf16_checkpoint_is_computed_in_float32_in_half_the_memory(
    family: str, tied: bool, random_checkpoint: MakeCheckpoint
) -> None:
    text = {
        "hidden_size": 1024,  # Large, and whole blocks of what FBGEMM lays out together.
        "intermediate_size": 1024,
        "vocab_size": 2000,
        "num_attention_heads": 64,
        "num_key_value_heads": 32,
    }
    path = random_checkpoint(family, dtype=torch.bfloat16, tied=tied, text=text)
    language, reference = load(path), load_reference(path)
    ids = torch.randint(0, 600, (50,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        embedded = reference.get_input_embeddings()(ids)
    assert torch.equal(language.embed(ids), embedded) and embedded.dtype is torch.float32
    torch.testing.assert_close(text_logits(language, ids), expected, rtol=1e-5, atol=2e-4)
    tensors = samples()[family].language_tensors(reference).values()
    parameters = sum(each.numel() for each in tensors if isinstance(each, torch.nn.Parameter))
    assert language.weight_bytes() < 2.02 * (parameters + reference.lm_head.weight.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_not_fused_give_the_same(
    family: str, random_checkpoint: MakeCheckpoint, unfused: None
) -> None:
    path = random_checkpoint(family)
    language = load(path)
    assert language.fused is None
    ids = torch.randint(0, 600, (50,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = load_reference(path)(ids[None]).logits[0]
    torch.testing.assert_close(text_logits(language, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_overwrite_placeholders_as_in_the_unsplit_model(
    family: str, random_checkpoint: MakeCheckpoint
) -> None:
    """Two pictures among text: rows from the tower, positions from the layout."""
    path = random_checkpoint(family)
    checkpoint = Checkpoint.open(str(path), side="llm")
    layout = registry.make_layout(checkpoint)
    preprocess = registry.make_preprocessor(checkpoint, layout)
    tower = registry.load_tower(Checkpoint.open(str(path), side="encoder"), "float32", "cpu")
    images = [picture(120, 80), picture(60, 140)]
    plans = [layout.plan(Structure("png", *image.size)) for image in images]
    ids: list[int] = [10, 11, 12]
    spans = []
    for i, plan in enumerate(plans):
        tokens, placed = place(layout, plan, len(ids), i)
        spans += placed
        ids += [*tokens, 20 + i, 30 + i]
    encoded = tower.encode([preprocess(*pair) for pair in zip(images, plans, strict=True)], plans)

    language = load(path)
    token_ids = torch.tensor(ids)
    with torch.inference_mode():
        embeds = language.embed(token_ids)
        indices = torch.cat([_tokens(span) for span in spans])
        embeds[indices] = torch.cat([item["rows"] for item in encoded])
        positions, _ = layout.positions(len(ids), spans)
        levels = [
            (indices, torch.cat([item[f"deepstack.{i}"] for item in encoded]))
            for i in range(layout.deepstack_levels)
        ]
        with both_ways(spans):
            hidden = language.forward(embeds, torch.from_numpy(positions), levels)
        logits = language.logits(hidden)

    sample = samples()[family]
    inputs = sample.image_inputs(sample.image_processor(path), images)
    inputs |= sample.token_inputs(token_ids[None], layout.item_token_ids[Modality.IMAGE])
    with torch.inference_mode():
        expected = load_reference(path)(**inputs).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def _tokens(span: Span) -> torch.Tensor:
    return torch.arange(span.token_offset, span.token_offset + span.num_tokens)


def test_the_demo_equals_the_unsplit_model() -> None:
    language = load(None)
    ids = torch.randint(0, 600, (70,), generator=torch.Generator().manual_seed(5))
    reference = load_reference(Checkpoint.open(None).path)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(text_logits(language, ids), expected, rtol=0, atol=1e-4)
    assert (language.num_layers, language.num_heads, language.num_kv_heads) == (4, 3, 1)
    assert (language.head_dim, language.hidden_size, language.vocab_size) == (64, 192, 640)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_half_precision_stays_close(family: str, random_checkpoint: MakeCheckpoint) -> None:
    path = random_checkpoint(family)
    ids = torch.randint(0, 600, (30,), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        expected = load_reference(path, torch.bfloat16)(ids[None]).logits[0].float()
    logits = text_logits(load(path, "bfloat16"), ids)
    assert logits.dtype is torch.float32
    exact = text_logits(load(path), ids)
    assert (logits - exact).square().mean() < 1.5 * (expected - exact).square().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_gets_one_call_a_layer_without_a_mask(
    family: str, random_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...], Any]] = []

    def record(module: Any, q: Any, k: Any, v: Any, mask: Any, *, scaling: float, **_: Any) -> Any:
        assert k.shape == v.shape
        assert scaling == module.scaling
        seen.append((module.layer_idx, tuple(q.shape), tuple(k.shape), mask))
        return q.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, CAUSAL, record)
    text_logits(load(random_checkpoint(family)), torch.arange(7))
    assert seen == [(i, (1, 4, 7, 16), (1, 2, 7, 16), None) for i in range(3)]


@pytest.mark.parametrize("is_fused", [True, False])
def test_deepstack_rows_are_added_after_their_layers(
    is_fused: bool, random_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_fused:
        monkeypatch.setattr(decoder, "fuse", lambda *_: None)
    path = random_checkpoint("qwen2_vl")
    language, reference = load(path), load_reference(path)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 600, (12,), generator=generator)
    indices = torch.tensor([2, 3, 7])
    levels = [torch.randn(3, 64, generator=generator) for _ in range(2)]

    def add(level: int) -> Callable[..., torch.Tensor]:
        return lambda module, args, output: output.index_add(1, indices, levels[level][None])

    for i in range(2):
        reference.model.language_model.layers[i].register_forward_hook(add(i))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        positions = torch.arange(12).expand(3, -1)
        embeds = language.embed(ids)
        untouched = embeds.clone()
        hidden = language.forward(embeds, positions, [(indices, level) for level in levels])
        torch.testing.assert_close(language.logits(hidden), expected, rtol=0, atol=1e-4)
        assert torch.equal(embeds, untouched)
    assert not torch.allclose(expected, text_logits(language, ids))


@pytest.mark.parametrize("levels", [0, 2, 3])  # Of three layers.
@pytest.mark.parametrize("is_fused", [True, False])
def test_only_the_rows_that_are_wanted_come_back(
    is_fused: bool, levels: int, random_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_fused:
        monkeypatch.setattr(decoder, "fuse", lambda *_: None)
    language = load(random_checkpoint("qwen2_vl"))
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 600, (12,), generator=generator)
    where = torch.tensor([1, 5])
    deepstack = [(where, torch.randn(2, 64, generator=generator)) for _ in range(levels)]
    positions = torch.arange(12).expand(3, -1)
    with torch.inference_mode():
        embeds = language.embed(ids)
        every = language.forward(embeds, positions, deepstack)
        for wanted in ([11], [5, 0, 11], []):
            rows = torch.tensor(wanted, dtype=torch.int64)
            some = language.forward(embeds, positions, deepstack, rows)
            torch.testing.assert_close(some, every[rows], rtol=0, atol=1e-5)


def changed(path: Path, section: str, fields: dict[str, Any]) -> Path:
    config = json.loads((path / "config.json").read_text())
    config[section].update(fields)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_rotary_types_that_look_at_the_batch_are_refused(family: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    if family == "qwen2_vl":
        rope["mrope_section"] = [2, 3, 3]
    path = changed(make_checkpoint(family, tmp_path), "text_config", {"rope_parameters": rope})
    with pytest.raises(CheckpointError, match="'dynamic'"):
        load(path)


def test_rotary_scaling_that_does_not_is_served(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    rope["original_max_position_embeddings"] = 512
    path = changed(make_checkpoint("llava", tmp_path), "text_config", {"rope_parameters": rope})
    ids = torch.randint(0, 600, (30,), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        expected = load_reference(path)(ids[None]).logits[0]
    torch.testing.assert_close(text_logits(load(path), ids), expected, rtol=0, atol=1e-4)


WINDOWS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen2_5_vl": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "llava": {"model_type": "mistral"},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_are_the_configurations(family: str, tmp_path: Path) -> None:
    fields = {"sliding_window": 16, **WINDOWS[family]}
    path = changed(make_checkpoint(family, tmp_path), "text_config", fields)
    language = load(path)
    windows = [layer.window for layer in language.layers]
    assert windows == ([16] * 3 if family == "llava" else [None, 16, 16])
    ids = torch.randint(0, 600, (40,), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        expected = load_reference(path)(ids[None]).logits[0]
    torch.testing.assert_close(text_logits(language, ids), expected, rtol=0, atol=1e-4)


def test_layers_that_attend_otherwise_are_refused(tmp_path: Path) -> None:
    kinds = ["full_attention", "chunked_attention", "full_attention"]
    path = changed(make_checkpoint("qwen2_vl", tmp_path), "text_config", {"layer_types": kinds})
    with pytest.raises(UnsupportedCheckpoint, match="chunked_attention"):
        load(path)


def test_an_unknown_attention_function_is_refused(random_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(str(random_checkpoint("qwen2_vl")), side="llm")
    with pytest.raises(ConfigError, match="'nowhere'"):
        registry.load_language(checkpoint, "float32", "cpu", "nowhere")


def test_another_language_model_in_llava_is_refused(tmp_path: Path) -> None:
    path = changed(make_checkpoint("llava", tmp_path), "text_config", {"model_type": "gpt2"})
    with pytest.raises(UnsupportedCheckpoint, match="gpt2"):
        load(path)


def test_another_activation_is_fused(random_checkpoint: MakeCheckpoint) -> None:
    path = random_checkpoint("llava", text={"hidden_act": "gelu"})
    language = load(path)
    assert language.fused is not None
    ids = torch.arange(9)
    with torch.inference_mode():
        expected = load_reference(path)(ids[None]).logits[0]
    torch.testing.assert_close(text_logits(language, ids), expected, rtol=0, atol=1e-4)
