"""The layouts of Mistral 3 and Pixtral against transformers: sizes, tokens, rows and refusals."""

from __future__ import annotations

import json
import random
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidMedia, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import Modality, Overrides, Structure
from opticnerve.models.registry import make_layout

IMAGE, BREAK, END = 10, 12, 13
NAMES = {IMAGE: "[IMG]", BREAK: "[IMG_BREAK]", END: "[IMG_END]"}

# As Mistral-Small-3.1-24B and pixtral-12b are published.
MISTRAL: dict[str, Any] = {
    "model_type": "mistral3",
    "image_token_index": IMAGE,
    "spatial_merge_size": 2,
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "max_position_embeddings": 131072,
        "sliding_window": None,
    },
    "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
    "vision_feature_layer": -1,
}
PIXTRAL: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": IMAGE,
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "max_position_embeddings": 1024000,
        "sliding_window": None,
    },
    "vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
SIZES = {"mistral3": 1540, "llava": 1024}


def layout(path: Path, config: dict[str, Any], tokens: bool = True, **processor: Any) -> Any:
    (path / "config.json").write_text(json.dumps(config))
    settings = {"resample": 3, "size": {"longest_edge": SIZES[config["model_type"]]}, **processor}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    if tokens:
        added = [{"id": token_id, "content": text} for token_id, text in NAMES.items()]
        (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return make_layout(Checkpoint.open(str(path)))


def expanded(config: dict[str, Any], width: int, height: int) -> list[int]:
    """What transformers' processor writes for a picture of that size."""
    package = "transformers.models.pixtral"
    sizing = import_module(f"{package}.image_processing_pil_pixtral")
    sys.modules.setdefault(f"{package}.image_processing_pixtral", sizing)
    processor = import_module(f"{package}.processing_pixtral").PixtralProcessor
    patch, merge = config["vision_config"]["patch_size"], config.get("spatial_merge_size", 1)
    resized = sizing.get_resize_output_image_size(
        np.empty((3, height, width), np.uint8),
        size=SIZES[config["model_type"]],
        patch_size=patch * merge,
        input_data_format="channels_first",
    )
    named = dict(zip(("image_token", "image_break_token", "image_end_token"), "abc", strict=True))
    me = SimpleNamespace(patch_size=patch, spatial_merge_size=merge, **named)
    written = processor.replace_image_token(me, {"image_sizes": [resized]}, 0)
    return [{"a": IMAGE, "b": BREAK, "c": END}[letter] for letter in written]


@pytest.mark.parametrize("config", [MISTRAL, PIXTRAL], ids=["mistral3", "pixtral"])
def test_ids_equal_the_processors_on_random_sizes(config: dict[str, Any], tmp_path: Path) -> None:
    made = layout(tmp_path, config)
    rng = random.Random(7)
    for _ in range(200):
        width = round(10 ** rng.uniform(0.5, 3.7))
        height = min(max(round(width * 10 ** rng.uniform(-2, 2)), 1 + width // 200), 5000)
        plan = made.plan(Structure("png", width, height))
        expansion = made.expand(plan)
        assert list(expansion.token_ids) == expanded(config, width, height), (width, height)
        assert expansion.token_ids.count(IMAGE) == plan.num_tokens


def test_published_configurations(tmp_path: Path) -> None:
    mistral = layout(tmp_path, MISTRAL)
    assert (mistral.family, mistral.hidden_size, mistral.max_positions) == (
        "mistral3",
        5120,
        131072,
    )
    assert (mistral.patch_size, mistral.merge_size) == (14, 2)
    names = {"image_token": IMAGE, "image_break_token": BREAK, "image_end_token": END}
    assert mistral.placeholder_ids == names
    assert mistral.item_token_ids == {Modality.IMAGE: IMAGE}
    pixtral = layout(tmp_path, PIXTRAL)
    assert (pixtral.family, pixtral.merge_size) == ("pixtral", 1)
    assert pixtral.settings() != mistral.settings()


def test_no_picture_has_more_tokens_than_a_square(tmp_path: Path) -> None:
    made = layout(tmp_path, MISTRAL)
    largest = made.plan(Structure("png", 9000, 9000))
    assert largest.num_tokens == 55 * 55
    for size in ((9000, 45), (45, 9000), (1, 200), (7000, 9000)):
        assert made.plan(Structure("png", *size)).num_tokens <= largest.num_tokens
    with pytest.raises(InvalidMedia, match="200 times"):
        made.plan(Structure("png", 201, 1))


def test_max_pixels_shrinks_and_nothing_enlarges(tmp_path: Path) -> None:
    made = layout(tmp_path, MISTRAL)
    picture = Structure("png", 1400, 700)
    plan = made.plan(picture, Overrides(max_pixels=280 * 280))
    assert (plan.resized_width, plan.resized_height) == (420, 224)  # Of 395 x 197, rounded up.
    assert made.plan(picture, Overrides(max_pixels=1)).num_tokens == 1
    assert made.plan(picture, Overrides(max_pixels=10**9)) == made.plan(picture)
    for bounds in (Overrides(min_pixels=9), Overrides(max_pixels=0)):
        with pytest.raises(InvalidRequest):
            made.plan(picture, bounds)


def test_a_tokenizer_that_is_tekken_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no token \[IMG_BREAK\] or \[IMG_END\]"):
        layout(tmp_path, MISTRAL, tokens=False)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match=r"tekken\.json only"):
        layout(tmp_path, MISTRAL, tokens=False)


@pytest.mark.parametrize(
    ("config", "processor", "said"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, {}, "'siglip_vision_model'"),
        ({}, {"do_center_crop": True}, "do_center_crop"),
        ({}, {"size": "large"}, "no known form"),
        ({}, {"patch_size": 16}, "patch_size is 16 but .* is 14"),
        ({}, {"patch_size": {"height": 14, "width": 28}}, "patch_size is 28 but .* is 14"),
        ({"image_token_index": -1}, {}, "image_token_index = -1"),
    ],
)
def test_what_is_not_served_is_refused(
    config: dict[str, Any], processor: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        layout(tmp_path, MISTRAL | config, **processor)


@pytest.mark.parametrize("config", [MISTRAL, PIXTRAL], ids=["mistral3", "pixtral"])
@pytest.mark.parametrize(("name", "value"), [("patch_size", 28), ("spatial_merge_size", 3)])
def test_a_processor_that_writes_other_tokens_is_refused(
    config: dict[str, Any], name: str, value: int, tmp_path: Path
) -> None:
    layout(tmp_path, config)
    (tmp_path / "processor_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(CheckpointError, match=f"the processor's {name} is {value} but"):
        layout(tmp_path, config)
