"""The InternVL layout against transformers: tiles, bounds of a request, text models, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gateway.api.schemas.messages import ItemSource
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import Grid, Overrides, Structure
from opticnerve.models import registry
from opticnerve.models.towers.pixels import PixelTable
from tests import published
from tests.checkpoints import make_checkpoint
from tests.families import samples, tensors_of
from tests.reference import CAUSAL, image_rows, load_reference, picture

TILE = 448
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
CHAT = {"model_type": "internvl_chat", "auto_map": {}, "vision_config": {}}


@pytest.fixture
def layout(tmp_path: Path) -> Any:
    published.write("internvl3-8b-hf", tmp_path, weights=False)
    return registry.make_layout(Checkpoint.open(str(tmp_path)))


def test_published_configuration(layout: Any) -> None:
    assert (layout.hidden_size, layout.max_positions) == (3584, 32768)
    plan = layout.plan(Structure("jpeg", 1024, 768))
    assert (plan.resized_width, plan.resized_height) == (4 * TILE, 3 * TILE)
    assert plan.grid == Grid(13, 32, 32) and plan.num_patches == 13 * 1024
    expansion = layout.expand(plan)
    assert expansion.token_ids[0] == 151665 and expansion.token_ids[-1] == 151666
    assert set(expansion.token_ids[1:-1]) == {151667}
    assert len(expansion.token_ids) == 13 * 256 + 2


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (60_000, 300), (12_000, 12_000)])
def test_no_picture_has_more_tiles_than_the_processor_allows(
    layout: Any, size: tuple[int, int]
) -> None:
    assert 1 <= layout.plan(Structure("png", *size)).grid.t <= 13


@pytest.mark.parametrize("most", [1, TILE**2, 2 * TILE**2, 5 * TILE**2 + 1, 10**12])
def test_max_pixels_is_a_bound_on_tiles(layout: Any, tmp_path: Path, most: int) -> None:
    """As fewer ``max_patches`` of the image processor, never more than its own."""
    theirs = samples()["internvl"].image_processor(tmp_path)
    patches = min(max(most // TILE**2, 1), 12)
    for size in ((1024, 768), (300, 300), (200, 1000), (5000, 400)):
        tiles = theirs.get_number_of_image_patches(*size[::-1], {"max_patches": patches})
        plan = layout.plan(Structure("png", *size), Overrides(max_pixels=most))
        assert plan.grid.t == tiles


def test_low_detail_is_one_tile(layout: Any) -> None:
    asked = ItemSource("", "", low_detail=True).overrides(layout.settings()["max_pixels"])
    assert layout.plan(Structure("png", 4000, 3000), asked).grid == Grid(1, 32, 32)


def test_min_pixels_is_refused(layout: Any) -> None:
    with pytest.raises(InvalidRequest, match="leave out min_pixels"):
        layout.plan(Structure("png", 100, 100), Overrides(min_pixels=10))


@pytest.mark.parametrize("settings", [{"max_patches": 1}, {"min_patches": 3}])
def test_other_bounds_of_tiles(
    settings: dict[str, int], random_checkpoint: Callable[..., Path]
) -> None:
    path = random_checkpoint("internvl", **settings)
    checkpoint = Checkpoint.open(str(path))
    layout: Any = registry.make_layout(checkpoint)
    preprocess = registry.make_preprocessor(checkpoint, layout)
    for size in ((84, 84), (40, 300), (30, 20)):
        image = picture(*size)
        pixels = preprocess(image, layout.plan(Structure("png", *size)))
        theirs = samples()["internvl"].image_processor(path)(image, return_tensors="pt")
        values = PixelTable(layout.pixels, torch.float32, "cpu")(torch.tensor(pixels))
        assert torch.equal(values.permute(0, 3, 1, 2), theirs["pixel_values"])


# ---- towers and decoders of other published sizes


def test_a_tower_with_norms_of_q_and_k(random_checkpoint: Callable[..., Path]) -> None:
    """InternViT-6B."""
    vision = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
    path = random_checkpoint("internvl", vision=vision)
    checkpoint, image = Checkpoint.open(str(path), side="encoder"), picture(84, 84)
    layout = registry.make_layout(checkpoint)
    plan = layout.plan(Structure("png", 84, 84))
    tower: Any = registry.load_tower(checkpoint, "float32", "cpu")
    [item] = tower.encode([registry.make_preprocessor(checkpoint, layout)(image, plan)], [plan])
    sample, reference = samples()["internvl"], load_reference(path)
    given = sample.image_inputs(sample.image_processor(path), [image])
    torch.testing.assert_close(item["rows"], image_rows(reference, "internvl", given))
    assert tensors_of(tower.module).keys() == sample.tower_tensors(reference).keys()


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "qwen2", "rope_parameters": DYNAMIC},
        {"model_type": "llama", "rope_parameters": DYNAMIC},
        {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2},
    ],
    ids=lambda text: text["model_type"],
)
def test_other_text_models(text: dict[str, Any], random_checkpoint: Callable[..., Path]) -> None:
    """Dynamic rotary embeddings change beyond max_position_embeddings only."""
    path = random_checkpoint("internvl", text=text)
    checkpoint = Checkpoint.open(str(path), side="llm")
    language: Any = registry.load_language(checkpoint, "float32", "cpu", CAUSAL)
    assert language.fused is not None
    ids = torch.randint(0, 600, (50,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        hidden = language.forward(language.embed(ids), torch.arange(50)[None])
        expected = load_reference(path)(ids[None]).logits[0]
    torch.testing.assert_close(language.logits(hidden), expected, rtol=0, atol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"image_token_id": -1}, "image_token_id = -1"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({"vision_feature_select_strategy": "full"}, "'full'"),
        ({"downsample_ratio": 0}, "downsample_ratio is 0"),
        ({"vision_config": {"image_size": [448, 224]}}, "must be square"),
        ({"vision_config": {"image_size": 336}}, "takes 336x336"),
    ],
)
def test_what_is_not_served_is_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    published.write("internvl3-8b-hf", tmp_path, weights=False)
    edit(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=said):
        registry.make_layout(Checkpoint.open(str(tmp_path)))


def test_another_text_model_is_refused_by_name(tmp_path: Path) -> None:
    path = make_checkpoint("internvl", tmp_path)
    edit(path / "config.json", {"text_config": {"model_type": "gpt_oss"}})
    with pytest.raises(UnsupportedCheckpoint, match="language model is 'gpt_oss'"):
        registry.load_language(Checkpoint.open(str(path)), "float32", "cpu", CAUSAL)


def test_a_processor_of_other_tiles_is_named(tmp_path: Path) -> None:
    published.write("internvl3-8b-hf", tmp_path, weights=False)
    edit(tmp_path / "processor_config.json", {"image_seq_length": 64})
    with pytest.raises(CheckpointError, match="writes 64 placeholders a tile"):
        registry.make_layout(Checkpoint.open(str(tmp_path)))


def test_tiles_are_bounded(tmp_path: Path) -> None:
    published.write("internvl3-8b-hf", tmp_path, weights=False)
    edit(tmp_path / "preprocessor_config.json", {"max_patches": 257})
    with pytest.raises(UnsupportedCheckpoint, match="257 tiles; more than 256"):
        registry.make_layout(Checkpoint.open(str(tmp_path)))


def test_markers_are_the_gateways_only(tmp_path: Path) -> None:
    published.write("internvl3-8b-hf", tmp_path, weights=False)
    edit(tmp_path / "tokenizer_config.json", {"start_image_token": "<image>"})
    registry.make_layout(Checkpoint.open(str(tmp_path), side="encoder"))
    with pytest.raises(CheckpointError, match="lacks <image> or </img>"):
        registry.make_layout(Checkpoint.open(str(tmp_path)))


def test_the_authors_layout_is_refused_with_a_hint() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"conversion.*OpenGVLab/InternVL3-1B-hf"):
        registry.find_family(CHAT)


def edit(file: Path, changes: dict[str, Any]) -> None:
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        merged = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
        fields[name] = merged
    file.write_text(json.dumps(fields))
