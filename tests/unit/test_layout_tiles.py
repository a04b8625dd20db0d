"""The layouts of LLaVA-NeXT and LLaVA-OneVision against transformers: tiles, tokens, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidRequest
from opticnerve.media.plan import Grid, Overrides, Structure, planned_as_several
from opticnerve.models import registry
from opticnerve.models.towers.pixels import PixelTable
from tests.checkpoints import make_checkpoint
from tests.families import samples
from tests.reference import load_reference, picture

# As llava-v1.6-mistral-7b-hf and llava-onevision-qwen2-7b-ov-hf are published.
NEXT: dict[str, Any] = {
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "text_config": {"model_type": "mistral", "max_position_embeddings": 32768},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
ONEVISION: dict[str, Any] = {
    "model_type": "llava_onevision",
    "image_token_index": 151646,
    "text_config": {"model_type": "qwen2", "hidden_size": 3584},
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
SIZES = {
    "llava_next": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "llava_onevision": {"size": {"height": 384, "width": 384}},
}
BOTH = pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=list(SIZES))


def layout(path: Path, config: dict[str, Any], **processor: Any) -> Any:
    (path / "config.json").write_text(json.dumps(config))
    pinpoints = config.get("image_grid_pinpoints")
    settings = {"resample": 3, "image_grid_pinpoints": pinpoints, **SIZES[config["model_type"]]}
    (path / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return registry.make_layout(Checkpoint.open(str(path)))


def tokens_of_the_reference(config: dict[str, Any], made: Any, size: tuple[int, int]) -> int:
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    kind = LlavaNextProcessor if config is NEXT else LlavaOnevisionProcessor
    processor = kind.__new__(kind)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=list(made.pinpoints))
    processor.patch_size, processor.image_token = 14, "x"
    processor.vision_feature_select_strategy = config["vision_feature_select_strategy"]
    processor.num_additional_image_tokens, processor.num_image_tokens = 1, 27 * 27
    processor.vision_aspect_ratio = "anyres_max_9"
    side = made.image_size
    given = {"image_sizes": [size[::-1]], "pixel_values": [[np.empty((3, side, side))]]}
    written = processor.replace_image_token(given | {"batch_num_images": [1]}, 0)
    return len(written)


@BOTH
def test_tokens_equal_the_processors_on_random_sizes(
    config: dict[str, Any], tmp_path: Path
) -> None:
    made, rng = layout(tmp_path, config), random.Random(8)
    for _ in range(200):
        width = round(10 ** rng.uniform(0.5, 3.7))
        height = min(max(round(width * 10 ** rng.uniform(-2, 2)), 1 + width // 200), 5000)
        plan = made.plan(Structure("png", width, height))
        assert plan.num_tokens == tokens_of_the_reference(config, made, (width, height))
        assert (plan.resized_height, plan.resized_width) in made.pinpoints
        assert plan.grid.t == 1 + plan.resized_width * plan.resized_height // made.image_size**2


def test_published_configurations(tmp_path: Path) -> None:
    made = layout(tmp_path, NEXT)
    assert (made.side, made.hidden_size, made.max_positions) == (24, 4096, 32768)
    plan = made.plan(Structure("png", 1000, 500))
    assert (plan.grid, plan.num_tokens) == (Grid(3, 24, 24), 576 + 24 * (48 + 1))
    made = layout(tmp_path, ONEVISION)
    assert (made.side, made.hidden_size, made.max_positions) == (27, 3584, 32768)
    assert len(made.pinpoints) == 36
    assert made.placeholder_ids == {"image_token": 151646, "video_token": 151647}
    several = made.plan(Structure("png", 1000, 500), Overrides(one_of_several=True))
    assert (several.grid, several.num_tokens) == (Grid(1, 27, 27), 730)


def test_only_onevision_sees_several_pictures_in_another_way(tmp_path: Path) -> None:
    for config, several in ((NEXT, False), (ONEVISION, True)):
        settings = layout(tmp_path, config).settings()
        assert planned_as_several(2, settings) == several
        assert not planned_as_several(1, settings)


@BOTH
def test_bounds_of_pixels_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="sizes are fixed"):
        layout(tmp_path, config).plan(Structure("png", 50, 50), Overrides(max_pixels=9))


@pytest.mark.parametrize(
    ("config", "processor", "said"),
    [
        (NEXT | {"vision_feature_select_strategy": "full"}, {}, "default is served"),
        (ONEVISION | {"vision_feature_select_strategy": "default"}, {}, "full is served"),
        (ONEVISION | {"vision_aspect_ratio": "anyres"}, {}, "anyres_max_"),
        (NEXT | {"image_grid_pinpoints": [[336, 700]]}, {}, "tiles of 336x336"),
        (NEXT | {"image_grid_pinpoints": [[336 * 17, 336 * 17]]}, {}, "289 tiles; more than 256"),
        (NEXT | {"image_grid_pinpoints": 5}, {}, "no list"),
        (NEXT, {"image_grid_pinpoints": [[336, 336]]}, "differ"),
        (NEXT, {"size": {"shortest_edge": 224}}, "takes 336x336"),
        (NEXT | {"vision_config": {"model_type": "dinov2"}}, {}, "'dinov2'"),
    ],
)
def test_what_is_not_served_is_refused(
    config: dict[str, Any], processor: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        layout(tmp_path, config, **processor)


@pytest.mark.parametrize(
    ("config", "name", "value", "said"),
    [
        (NEXT, "patch_size", 16, "is 16 but .* is 14"),
        (NEXT, "num_additional_image_tokens", 0, "is 0 but .* is 1"),
        (NEXT, "vision_feature_select_strategy", "full", "is 'full' but .* is 'default'"),
        (ONEVISION, "vision_aspect_ratio", "anyres_max_4", "is 'anyres_max_4' but .*_9'"),
        (ONEVISION, "num_image_tokens", 576, "is 576 but .* is 729"),
        (ONEVISION, "num_additional_image_tokens", 1, "is 1 but .* is 0"),
    ],
)
def test_a_processor_that_writes_other_tokens_is_refused(
    config: dict[str, Any], name: str, value: Any, said: str, tmp_path: Path
) -> None:
    layout(tmp_path, config)
    (tmp_path / "processor_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=f"the processor's {name} {said}"):
        layout(tmp_path, config)


@pytest.mark.parametrize("size", [(84, 84), (150, 90), (90, 150), (400, 30), (10, 12)])
def test_one_of_several_pictures_is_a_padded_square(size: tuple[int, int], tmp_path: Path) -> None:
    """As a chat template gives them to the processor: in one list for one prompt."""
    sample = samples()["llava_onevision"]
    path = make_checkpoint("llava_onevision", tmp_path)
    checkpoint = Checkpoint.open(str(path), side="encoder")
    made = registry.make_layout(checkpoint)
    tower = registry.load_tower(checkpoint, "float32", "cpu")
    image = picture(*size)
    plan = made.plan(Structure("png", *size), Overrides(one_of_several=True))
    pixels = registry.make_preprocessor(checkpoint, made)(image, plan)
    inputs = sample.image_processor(path)([[image, image]], return_tensors="pt")
    values = PixelTable(made.pixels, torch.float32, "cpu")(torch.from_numpy(pixels.copy()))
    assert torch.equal(values.permute(0, 3, 1, 2), inputs["pixel_values"][0])
    [item] = tower.encode([pixels], [plan])
    with torch.inference_mode():
        features = load_reference(path).model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(item["rows"], features[0], rtol=0, atol=1e-3)


def test_a_long_strip_never_becomes_an_enormous_square(tmp_path: Path) -> None:
    path = make_checkpoint("llava_onevision", tmp_path)
    checkpoint = Checkpoint.open(str(path), side="encoder")
    made = registry.make_layout(checkpoint)
    preprocess = registry.make_preprocessor(checkpoint, made)
    for size in ((20_000, 100), (100, 20_000)):
        plan = made.plan(Structure("png", *size), Overrides(one_of_several=True))
        assert preprocess(picture(*size), plan).shape == (1, 42, 42, 3)
