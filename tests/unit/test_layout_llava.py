"""The LLaVA layout against transformers: sizes, tokens, positions, and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidMedia, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import Grid, Modality, Overrides, Span, Structure
from opticnerve.models.registry import make_layout

# As llava-1.5-7b is published: what equals the text model's defaults is left out.
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
}
PROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "resample": 3,
    "size": {"shortest_edge": 336},
}


def layout(
    path: Path, config: dict[str, Any] | None = None, processor: dict[str, Any] | None = None
) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    given = {**CONFIG, **(config or {})}
    (path / "config.json").write_text(json.dumps(given))
    settings = PROCESSOR if processor is None else processor
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return make_layout(Checkpoint.open(str(path)))


@pytest.fixture
def llava(tmp_path: Path) -> Any:
    return layout(tmp_path)


def test_published_configuration(llava: Any) -> None:
    from transformers import LlamaConfig

    assert llava.hidden_size == LlamaConfig().hidden_size == 4096
    assert llava.max_positions == 4096
    assert llava.item_token_ids[Modality.IMAGE] == 32000
    assert llava.placeholder_ids == {"image_token": 32000}
    assert llava.position_dims == 1


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_defaults_of_text_models_are_those_of_the_reference(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    reference = AutoConfig.for_model(kind)
    found = layout(tmp_path, config={"text_config": {"model_type": kind}})
    assert found.hidden_size == reference.hidden_size
    assert found.max_positions == reference.max_position_embeddings


def test_the_newer_name_of_the_image_token_wins(tmp_path: Path) -> None:
    assert layout(tmp_path, config={"image_token_id": 7}).item_token_ids[Modality.IMAGE] == 7


@pytest.mark.parametrize("size", [(1, 1), (30, 20), (640, 480), (4000, 3000), (200, 1)])
def test_every_picture_is_one_square(llava: Any, size: tuple[int, int]) -> None:
    plan = llava.plan(Structure("png", *size))
    assert (plan.resized_width, plan.resized_height) == (336, 336)
    assert (plan.grid, plan.num_tokens, plan.num_patches) == (Grid(1, 24, 24), 576, 576)
    expansion = llava.expand(plan)
    assert expansion.token_ids == (32000,) * 576
    assert [(run.offset, run.num_tokens, run.row_start) for run in expansion.runs] == [(0, 576, 0)]


def test_the_full_strategy_keeps_the_class_token(tmp_path: Path) -> None:
    found = layout(tmp_path, config={"vision_feature_select_strategy": "full"})
    assert found.plan(Structure("png", 9, 9)).num_tokens == 577


def test_sizes_before_the_crop_are_those_of_the_reference(llava: Any) -> None:
    from transformers.image_transforms import get_resize_output_image_size

    rng = random.Random(3)
    for _ in range(300):
        width, height = rng.randint(1, 900), rng.randint(1, 900)
        picture = np.empty((3, height, width), dtype=np.uint8)
        expected = get_resize_output_image_size(
            picture, 336, default_to_square=False, input_data_format="channels_first"
        )
        assert llava.resized_size(width, height) == expected[::-1]


def test_a_size_of_two_edges(tmp_path: Path) -> None:
    found = layout(
        tmp_path, processor={"size": {"height": 336, "width": 336}, "do_center_crop": False}
    )
    assert found.resized_size(20, 10) == (336, 336)
    assert found.crop_size is None


def test_positions_count(llava: Any) -> None:
    positions, delta = llava.positions(7, [Span(1, 4, 0, 0, Modality.IMAGE, Grid(1, 2, 2))])
    assert positions.tolist() == [list(range(7))]
    assert (positions.dtype, delta) == (np.int64, 0)
    with pytest.raises(InvalidRequest):
        llava.positions(7, [Span(6, 4, 0, 0, Modality.IMAGE, Grid(1, 2, 2))])


def test_pixel_bounds_mean_nothing_here(llava: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llava.plan(Structure("png", 9, 9), Overrides(max_pixels=100))
    assert caught.value.param == "max_pixels"


def test_extreme_aspects_are_refused(llava: Any) -> None:
    with pytest.raises(InvalidMedia, match="200 times"):
        llava.plan(Structure("png", 201, 1))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vision_config": None}, "original authors' layout"),
        ({"vision_config": {"model_type": "dinov2"}}, "'dinov2'"),
        ({"vision_feature_select_strategy": "pooled"}, "'pooled'"),
    ],
)
def test_unsupported_towers(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=said):
        layout(tmp_path, config=config)


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        ({}, "no preprocessor_config.json"),
        ({**PROCESSOR, "crop_size": {"height": 224, "width": 224}}, "336x336"),
        ({**PROCESSOR, "do_pad": True}, "do_pad"),
        ({**PROCESSOR, "size": "big"}, "no known form"),
    ],
)
def test_processors_that_do_not_fit(tmp_path: Path, processor: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        layout(tmp_path, processor=processor)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("patch_size", 16, "is 16 but the vision tower's patch_size is 14"),
        ("num_additional_image_tokens", 0, "is 0 but .* is 1"),
        ("vision_feature_select_strategy", "full", "is 'full' but .* is 'default'"),
    ],
)
def test_a_processor_that_writes_other_tokens_is_refused(
    tmp_path: Path, name: str, value: Any, said: str
) -> None:
    layout(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=f"the processor's {name} {said}"):
        layout(tmp_path)


def test_an_unknown_text_model_needs_its_sizes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks hidden_size"):
        layout(tmp_path, config={"text_config": {"model_type": "novel"}})
