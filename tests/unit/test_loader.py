"""Each side loads its half of a checkpoint whole, or says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from opticnerve.checkpoints import loader
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.loader import (
    load_module,
    module_name,
    resolve_device,
    resolve_dtype,
    rotary_buffers,
)
from opticnerve.errors import CheckpointError, ConfigError
from opticnerve.models import registry
from opticnerve.models.decoders import decoder, linear
from opticnerve.models.family import wanted
from tests.checkpoints import FAMILIES, make_checkpoint, write_weights
from tests.families import samples, tensors_of
from tests.reference import CAUSAL, load_reference

MakeCheckpoint = Callable[..., Path]
Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

TEXT_KEY = "model.language_model.layers.1.mlp.down_proj.weight"
VISION_PREFIXES = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")


def first_key(path: Path, side: str) -> str:
    """A tensor of a layer of that half, in the checkpoint's own layout."""
    family = registry.find_family(Checkpoint.open(str(path)).config)
    is_ours = wanted(family.vision_keys if side == "encoder" else family.language_keys)
    keys = [k for k in load_file(path / "model.safetensors") if is_ours(k)]
    return min(k for k in keys if ".layers.1." in k or (side == "encoder" and k.count(".") > 2))


class _Loaded:
    def __init__(self, module: Any) -> None:
        self.module = module


def load_side(path: Path, side: Any) -> Any:
    checkpoint = Checkpoint.open(str(path), side=side)
    if side == "encoder":  # The module as loaded: a tower may turn its weights for products.
        spec = replace(registry.describe_tower(checkpoint), make_tower=_Loaded)
        keys = registry.find_family(checkpoint.config).vision_keys
        return spec.load(checkpoint, keys, "float32", "cpu")
    return registry.load_language(checkpoint, "float32", "cpu", CAUSAL)


def expect_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_half_equals_the_same_tensors_of_the_full_model(
    family: str,
    shards: int,
    layout: str,
    random_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = random_checkpoint(family, layout=layout, shards=shards)
    reference = load_reference(path)
    expect_equal(
        tensors_of(load_side(path, "encoder").module), samples()[family].tower_tensors(reference)
    )

    monkeypatch.setattr(decoder, "fuse", lambda *_: None)  # Fused layers hold joined tensors,
    monkeypatch.setattr(linear, "can_pack", lambda dtype: False)  # packed weights no storage.
    text = samples()[family].language_tensors(reference)
    language = load_side(path, "llm")
    (head,) = language._head.tensors()
    ours = {**tensors_of(language.decoder), "lm_head.weight": head}
    expect_equal(ours, text | {"lm_head.weight": reference.lm_head.weight})


def test_llava_with_the_middle_key_layout(tmp_path: Path) -> None:
    """Some conversions say ``model.vision_tower.vision_model.``."""
    path = edited(
        make_checkpoint("llava", tmp_path),
        lambda w: {
            k.replace("model.vision_tower.", "model.vision_tower.vision_model."): v
            for k, v in w.items()
        },
    )
    expect_equal(
        tensors_of(load_side(path, "encoder").module),
        samples()["llava"].tower_tensors(load_reference(path)),
    )


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_is_the_embedding(family: str, layout: str, tmp_path: Path) -> None:
    language = load_side(make_checkpoint(family, tmp_path, layout=layout, tied=True), "llm")
    model = language.decoder
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_is_neither_tied_nor_there_is_missing(tmp_path: Path) -> None:
    path = edited(make_checkpoint("qwen2_vl", tmp_path), without("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        load_side(path, "llm")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["encoder", "llm"])
def test_a_missing_tensor_is_named(family: str, side: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    key = first_key(path, side)
    edited(path, without(key))
    leaf = key.rpartition(".")[2]  # What is before it may have another name in the module.
    with pytest.raises(CheckpointError, match=rf"lacks .*\.{leaf}"):
        load_side(path, side)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["encoder", "llm"])
def test_a_tensor_of_another_shape_is_named(family: str, side: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    key = first_key(path, side)
    edited(path, lambda w: w | {key: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=rf"{key} \(shape \[3\], the model's is \["):
        load_side(path, side)


EXPERTS = "model.language_model.layers.1.mlp.experts."


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda w: {k: v for k, v in pieces(w).items() if k != f"{EXPERTS}2.up_proj.weight"},
            r"partly, or twice: model\.layers\.1\.mlp\.experts\.gate_up_proj \(28160 of 30720",
        ),
        (
            lambda w: w | {f"{EXPERTS}2.up_proj.weight": torch.zeros(40, 64)},
            r"partly, or twice: .*experts\.gate_up_proj \(33280 of 30720",
        ),
        (
            lambda w: w | {f"{EXPERTS}6.down_proj.weight": torch.zeros(64, 40)},
            r"no place in the model: .*experts\.6\.down_proj",
        ),
        (
            lambda w: pieces(w) | {f"{EXPERTS}2.down_proj.weight": torch.zeros(40, 64)},
            r"2\.down_proj\.weight \(shape \[40, 64\], the model's is \[64, 40\]\)",
        ),
        (
            lambda w: w | {f"{EXPERTS}down_proj": torch.zeros(64, 40, 6)},
            r"experts\.down_proj \(shape \[64, 40, 6\], the model's is \[6, 64, 40\]\)",
        ),
    ],
    ids=["one too few", "one twice", "one too many", "exchanged", "other stack"],
)
def test_experts_of_a_layer_are_all_there_once(edit: Edit, said: str, tmp_path: Path) -> None:
    path = edited(make_checkpoint("glm4v_moe", tmp_path), edit)
    with pytest.raises(CheckpointError, match=said):
        load_side(path, "llm")


def test_a_square_stack_of_experts_is_refused(tmp_path: Path) -> None:
    """It has the same shape as published and as transformers 5 saves it, with other weights."""
    path = make_checkpoint("qwen3_vl_moe", tmp_path, text={"moe_intermediate_size": 32})
    with pytest.raises(CheckpointError, match=r"square stacks of experts.*experts\.gate_up_proj"):
        load_side(path, "llm")
    with pytest.raises(CheckpointError, match="square stacks of experts"):
        registry.check_halves(Checkpoint.open(str(path)))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_experts": 0}, "num_experts = 0"),
        ({"num_local_experts": 0}, "num_local_experts = 0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
        ({"num_experts_per_tok": 7}, "asks 7 experts .* of 6"),
    ],
)
def test_numbers_of_experts_are_checked(sizes: dict[str, int], said: str, tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_vl_moe", tmp_path)
    change_text(path, sizes)
    with pytest.raises(CheckpointError, match=said):
        load_side(path, "llm")


def test_what_must_be_float32_is_not_narrowed(random_checkpoint: MakeCheckpoint) -> None:
    """GLM-4V's router adds a correction to its scores."""
    checkpoint = Checkpoint.open(str(random_checkpoint("glm4v_moe")), side="llm")
    language: Any = registry.load_language(checkpoint, "bfloat16", "cpu", CAUSAL)
    router = language.decoder.model.layers[1].mlp.gate
    assert router.e_score_correction_bias.dtype is torch.float32
    assert router.weight.dtype is torch.bfloat16


def test_a_layer_that_predicts_a_token_ahead_is_left_aside(tmp_path: Path) -> None:
    key = "model.language_model.layers.3.enorm.weight"  # The layers are 0 to 2.
    path = edited(make_checkpoint("glm4v_moe", tmp_path), lambda w: w | {key: torch.zeros(64)})
    load_side(path, "llm")


@pytest.mark.parametrize(
    ("side", "key"),
    [("encoder", "model.visual.blocks.9.norm1.weight"), ("llm", "model.language_model.extra")],
)
def test_a_tensor_of_this_half_without_a_place_is_named(
    side: str, key: str, tmp_path: Path
) -> None:
    path = edited(make_checkpoint("qwen2_vl", tmp_path), lambda w: w | {key: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"no place in the model: {key}"):
        load_side(path, side)


def test_a_tensor_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = edited(
        make_checkpoint("qwen2_vl", tmp_path),
        lambda w: w | {"visual.merger.mlp.2.bias": w["model.visual.merger.mlp.2.bias"].clone()},
    )
    with pytest.raises(CheckpointError, match=r"merger\.mlp\.2\.bias twice"):
        load_side(path, "encoder")


def test_integers_are_not_weights(tmp_path: Path) -> None:
    path = edited(
        make_checkpoint("qwen2_vl", tmp_path),
        lambda w: w | {TEXT_KEY: torch.zeros(w[TEXT_KEY].shape, dtype=torch.int8)},
    )
    with pytest.raises(CheckpointError, match=r"not floating point: .*down_proj\.weight \(I8\)"):
        load_side(path, "llm")


@pytest.mark.parametrize("side", ["encoder", "llm"])
def test_a_side_never_reads_the_other_half(side: str, tmp_path: Path) -> None:
    """The other half's shard is not there at all."""
    path = make_checkpoint("qwen2_5_vl", tmp_path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    vision = {k: v for k, v in weights.items() if k.startswith(VISION_PREFIXES)}
    text = {k: v for k, v in weights.items() if k not in vision}
    save_file(vision if side == "encoder" else text, path / f"{side}.safetensors")
    files = dict.fromkeys(vision, "encoder.safetensors") | dict.fromkeys(text, "llm.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    load_side(path, side)


def test_buffers_that_old_checkpoints_carry_are_left_aside(tmp_path: Path) -> None:
    carried = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.int64),
    }
    path = edited(make_checkpoint("llava", tmp_path, layout="old"), lambda w: w | carried)
    buffers = dict(load_side(path, "encoder").module.named_buffers())
    assert buffers["tower.embeddings.position_ids"].tolist() == [list(range(17))]
    load_side(path, "llm")


def test_a_file_cut_short_is_one_clear_error(tmp_path: Path) -> None:
    path = make_checkpoint("qwen2_vl", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or was not downloaded whole"):
        load_side(path, "llm")


def test_what_is_not_recomputed_is_reported(random_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(str(random_checkpoint("qwen2_vl")), side="encoder")
    from opticnerve.models.qwen2_vl import FAMILY, vision

    config = vision.transformers_config(vision.Qwen2VLConfig, checkpoint).vision_config

    def load(recomputed: Any) -> nn.Module:
        return load_module(
            lambda: vision.Qwen2VisionTransformerPretrainedModel(config),
            checkpoint,
            FAMILY.vision_keys,
            dtype=torch.float32,
            device=torch.device("cpu"),
            recomputed=recomputed,
        )

    with pytest.raises(CheckpointError, match=r"uninitialised: rotary_pos_emb\.inv_freq"):
        load({})
    assert not any(t.is_meta for t in tensors_of(load(rotary_buffers("rotary_pos_emb"))).values())


def test_loading_copies_so_that_a_replaced_file_changes_nothing(tmp_path: Path) -> None:
    path = make_checkpoint("qwen2_vl", tmp_path)
    tower = load_side(path, "encoder").module
    before = tower.merger.mlp[2].weight.clone()
    size = (path / "model.safetensors").stat().st_size
    with (path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(tower.merger.mlp[2].weight, before)


def test_the_first_pattern_renames() -> None:
    qwen, llava = (registry.families()[name].language_keys for name in ("qwen2_vl", "llava"))
    assert module_name(qwen, "model.language_model.norm.weight") == "model.norm.weight"
    assert module_name(llava, "model.language_model.norm.weight") == "model.norm.weight"
    assert module_name(llava, "language_model.model.norm.weight") == "model.norm.weight"
    assert module_name(llava, "language_model.lm_head.weight") == "lm_head.weight"
    assert module_name(qwen, "model.layers.0.x") == "model.layers.0.x"
    for key in ("visual.x", "model.visual.x"):
        with pytest.raises(KeyError):
            module_name(qwen, key)
    for key in ("model.vision_tower.x", "multi_modal_projector.x"):
        with pytest.raises(KeyError):
            module_name(llava, key)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_dtype_is_the_checkpoints(random_checkpoint: MakeCheckpoint) -> None:
    for layout in ("new", "old"):
        path = random_checkpoint("qwen2_vl", layout=layout, dtype=torch.bfloat16)
        checkpoint = Checkpoint.open(str(path))
        assert resolve_dtype("auto", checkpoint, CUDA) is torch.bfloat16
        assert resolve_dtype("float32", checkpoint, CUDA) is torch.float32
        with pytest.raises(ConfigError, match="int8"):
            resolve_dtype("int8", checkpoint, CPU)


@pytest.mark.parametrize("native", [True, False])
def test_auto_dtype_is_one_that_the_cpu_computes(
    native: bool, random_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "cpu_computes", lambda dtype: native)
    checkpoint = Checkpoint.open(str(random_checkpoint("qwen2_vl", dtype=torch.bfloat16)))
    own = torch.bfloat16 if native else torch.float32
    assert resolve_dtype("auto", checkpoint, CPU) is own
    assert resolve_dtype("auto", checkpoint, CUDA) is torch.bfloat16
    assert resolve_dtype("bfloat16", checkpoint, CPU) is torch.bfloat16


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="cuda:99"):
        resolve_device("cuda:99")
    with pytest.raises(ConfigError, match="gpu"):
        resolve_device("gpu")


def test_an_unusable_configuration_is_one_clear_error(tmp_path: Path) -> None:
    path = make_checkpoint("qwen2_vl", tmp_path)
    change_text(path, {"num_hidden_layers": "many"})
    with pytest.raises(CheckpointError, match=r"config\.json is no usable Qwen2VLConfig"):
        load_side(path, "llm")


@pytest.mark.parametrize(
    ("section", "changes", "side"),
    [
        ("text_config", {"rope_parameters": {"rope_type": "zzz", "rope_theta": 1e4}}, "llm"),
        ("text_config", {"hidden_act": "zzz"}, "llm"),
        ("vision_config", {"hidden_act": "zzz"}, "encoder"),
    ],
)
def test_what_transformers_does_not_know_is_one_clear_error(
    section: str, changes: dict[str, Any], side: str, tmp_path: Path
) -> None:
    path = make_checkpoint("mistral3", tmp_path)
    change_text(path, changes, section)
    said = r"config\.json describes a model that transformers cannot make: .*zzz"
    with pytest.raises(CheckpointError, match=said):
        load_side(path, side)
    with pytest.raises(CheckpointError, match=said):
        registry.check_halves(Checkpoint.open(str(path)))


def change_text(path: Path, changes: dict[str, Any], section: str = "text_config") -> None:
    config = json.loads((path / "config.json").read_text())
    config[section].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def edited(path: Path, edit: Edit) -> Path:
    """The single-file checkpoint at ``path`` with other weights."""
    write_weights(edit(load_file(path / "model.safetensors")), path)
    return path


def pieces(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked experts of a checkpoint of ``glm4v_moe``, each by itself."""
    sample = samples()["glm4v_moe"]
    return {
        k: v for name, each in weights.items() for k, v in sample.old_tensors(name, each).items()
    }


def without(key: str) -> Edit:
    def edit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del weights[key]
        return weights

    return edit
