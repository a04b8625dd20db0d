"""Qwen layouts against transformers: sizes, grids, tokens, positions, and refusals."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidMedia, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import Grid, Modality, Overrides, Span, Structure
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout, smart_resize
from opticnerve.models.registry import make_layout

VISION = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
TEXT = {"hidden_size": 64, "max_position_embeddings": 4096}
PROCESSOR: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def write(
    path: Path, config: dict[str, Any] | None = None, processor: dict[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint of configuration alone."""
    path.mkdir(parents=True, exist_ok=True)
    given = {"model_type": "qwen2_vl", "text_config": TEXT, "vision_config": VISION}
    given.update(config or {})
    (path / "config.json").write_text(json.dumps(given))
    settings = PROCESSOR if processor is None else processor
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return Checkpoint.open(str(path))


def layout(path: Path, **arguments: Any) -> Any:
    return make_layout(write(path, **arguments))


@pytest.fixture
def qwen2(tmp_path: Path) -> Any:
    return layout(tmp_path)


@pytest.fixture
def qwen25(tmp_path: Path) -> Any:
    config = {"model_type": "qwen2_5_vl", "vision_config": {**VISION, "tokens_per_second": 2}}
    return layout(tmp_path, config=config)


# ---- sizes


def test_smart_resize_is_that_of_the_reference() -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

    rng = random.Random(1)
    bounds = [(3136, 1003520), (3136, 12845056), (7056, 9408), (256 * 784, 1280 * 784), (1, 784)]
    sizes = [(rng.randint(1, 6000), rng.randint(1, 6000)) for _ in range(4000)]
    sizes += [(14 * a, 14 * b) for a in range(1, 40) for b in range(1, 40)]  # Halves of a factor.
    for width, height in sizes:
        if max(width, height) / min(width, height) > 200:
            continue
        low, high = rng.choice(bounds)
        factor = rng.choice([28, 28, 32])
        expected = reference.smart_resize(height, width, factor, low, high)
        assert smart_resize(width, height, factor, low, high) == expected[::-1], (width, height)


def test_grids_and_tokens_are_those_of_the_reference(qwen2: Any) -> None:
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(**PROCESSOR)
    rng = random.Random(2)
    for _ in range(500):
        width, height = rng.randint(10, 2000), rng.randint(10, 2000)
        plan = qwen2.plan(Structure("png", width, height))
        assert plan.num_patches == processor.get_number_of_image_patches(height, width)
        assert plan.num_tokens == plan.num_patches // 4
        assert (plan.grid.w * 14, plan.grid.h * 14) == (plan.resized_width, plan.resized_height)


def test_pixels_give_the_planned_grid(qwen2: Any) -> None:
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(**PROCESSOR)
    for size in [(1, 1), (37, 91), (500, 300), (199, 1)]:
        grid = processor(Image.new("RGB", size), return_tensors="np")["image_grid_thw"][0]
        assert qwen2.plan(Structure("png", *size)).grid == Grid(*map(int, grid))


def test_quarter_turns_swap_sides(qwen2: Any) -> None:
    lying = qwen2.plan(Structure("jpeg", 600, 300))
    standing = qwen2.plan(Structure("jpeg", 600, 300, orientation=6))
    assert (standing.resized_width, standing.resized_height) == (
        lying.resized_height,
        lying.resized_width,
    )
    assert (standing.width, standing.height, standing.orientation) == (600, 300, 6)


@pytest.mark.parametrize("size", [(1, 201), (4001, 20)])
def test_extreme_aspects_are_refused(qwen2: Any, size: tuple[int, int]) -> None:
    with pytest.raises(InvalidMedia, match="200 times"):
        qwen2.plan(Structure("png", *size))


def test_a_single_pixel_is_a_picture(qwen2: Any) -> None:
    plan = qwen2.plan(Structure("png", 1, 1))
    assert (plan.resized_width, plan.resized_height, plan.num_tokens) == (56, 56, 4)


def test_overrides(qwen2: Any) -> None:
    structure = Structure("png", 1000, 800)

    def pixels(**bounds: int) -> int:
        plan = qwen2.plan(structure, Overrides(**bounds))
        return int(plan.resized_width * plan.resized_height)

    assert pixels(max_pixels=100_000) <= 100_000
    assert pixels(min_pixels=2_000_000) >= 2_000_000  # Above the model's own maximum.
    assert pixels(max_pixels=1_000) <= 1_000  # Below the model's own minimum.
    with pytest.raises(InvalidRequest, match="larger than max_pixels"):
        qwen2.plan(structure, Overrides(min_pixels=200, max_pixels=100))
    with pytest.raises(InvalidRequest, match="at least 1"):
        qwen2.plan(structure, Overrides(max_pixels=-5))


def test_expansion(qwen2: Any) -> None:
    plan = qwen2.plan(Structure("png", 100, 60))
    expansion = qwen2.expand(plan)
    assert expansion.token_ids == (151655,) * plan.num_tokens
    assert [(run.offset, run.num_tokens, run.row_start) for run in expansion.runs] == [
        (0, plan.num_tokens, 0)
    ]
    video = qwen2.expand(replace(plan, modality=Modality.VIDEO))
    assert set(video.token_ids) == {151656}


# ---- positions


def prompt(
    rng: random.Random, video: bool
) -> tuple[list[int], list[Span], dict[int, list[list[int]]], list[float]]:
    """(token types, spans, grids by type, seconds of videos) of text with media in between."""
    types: list[int] = [0] * rng.randint(0, 5)
    spans: list[Span] = []
    grids: dict[int, list[list[int]]] = {1: [], 2: []}
    seconds: list[float] = []
    for item in range(rng.randint(0, 4)):
        moving = video and rng.random() < 0.5
        t = rng.randint(1, 6) if moving else 1
        grid = Grid(t, 2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
        tokens = grid.num_patches // 4
        pace = rng.choice([0.5, 1.0, 0.7, 2 / 3, 1.9]) if moving else 0.0
        modality = Modality.VIDEO if moving else Modality.IMAGE
        spans.append(Span(len(types), tokens, item, 0, modality, grid, pace))
        kind = 2 if moving else 1
        grids[kind].append([grid.t, grid.h, grid.w])
        if moving:
            seconds.append(pace)
        types += [kind] * tokens + [0] * rng.randint(1, 6)
    return [*types, 0], spans, grids, seconds


@pytest.mark.parametrize("family", ["qwen2", "qwen25"])
@pytest.mark.parametrize("seed", range(40))
def test_positions_are_those_of_the_reference(
    family: str, seed: int, request: pytest.FixtureRequest
) -> None:
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    ours = request.getfixturevalue(family)
    cls: Any = Qwen2VLModel if family == "qwen2" else Qwen2_5_VLModel
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
        )
    )
    model.get_vision_position_ids = lambda *args, **kwargs: cls.get_vision_position_ids(
        model, *args, **kwargs
    )
    types, spans, grids, seconds = prompt(random.Random(seed), video=True)
    ids = torch.zeros(1, len(types), dtype=torch.long)
    expected, delta = cls.get_rope_index(
        model,
        ids,
        torch.tensor([types]),
        image_grid_thw=torch.tensor(grids[1]) if grids[1] else None,
        video_grid_thw=torch.tensor(grids[2]) if grids[2] else None,
        **({"second_per_grid_ts": torch.tensor(seconds)} if family == "qwen25" else {}),
    )
    positions, our_delta = ours.positions(len(types), spans)
    assert positions.dtype == np.int64
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert our_delta == int(delta)


def test_positions_of_text_and_of_nothing(qwen2: Any) -> None:
    positions, delta = qwen2.positions(5, [])
    assert positions.tolist() == [list(range(5))] * 3
    assert delta == 0
    assert qwen2.positions(0, [])[0].shape == (3, 0)
    assert qwen2.positions(0, [])[1] == 0


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, 5, 0, 0, Modality.IMAGE, Grid(1, 4, 4))],
        [Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 3, 5))],
        [Span(8, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))],
        [Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))] * 2,
        [Span(0, 0, 0, 0, Modality.IMAGE, Grid(0, 0, 0))],
        [Span(0, 4, 0, 0, Modality.VIDEO, Grid(1, 4, 4), float("nan"))],
    ],
    ids=["too long", "odd grid", "leaves the prompt", "overlap", "empty", "no time"],
)
def test_spans_that_do_not_fit_are_refused(qwen2: Any, spans: list[Span]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        qwen2.positions(10, spans)
    assert caught.value.param == "spans"


# ---- configuration


def test_flat_and_nested_configurations_agree(tmp_path: Path) -> None:
    nested = layout(tmp_path / "nested")
    flat_config = {
        "text_config": None,
        **TEXT,
        "vision_config": {"in_chans": 3, "spatial_patch_size": 14, "hidden_size": 64},
    }
    flat = layout(tmp_path / "flat", config=flat_config)
    assert (flat.hidden_size, flat.max_positions) == (64, 4096)
    assert (nested.hidden_size, nested.max_positions) == (64, 4096)
    assert flat.settings() == nested.settings()


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_pixels": 100, "max_pixels": 200},
        {"size": {"shortest_edge": 100, "longest_edge": 200}},
        {"size": {"min_pixels": 100, "max_pixels": 200}},
        {"min_pixels": 100, "max_pixels": 200, "size": {"shortest_edge": 5, "longest_edge": 6}},
    ],
)
def test_pixel_bounds_in_every_form(tmp_path: Path, bounds: dict[str, Any]) -> None:
    found: Qwen2VLLayout = layout(tmp_path, processor={"patch_size": 14, **bounds})
    assert (found.min_pixels, found.max_pixels) == (100, 200)


def test_defaults_are_those_of_the_reference(tmp_path: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    found: Qwen2VLLayout = layout(tmp_path, processor={"image_processor_type": "x"})
    reference = Qwen2VLImageProcessorPil()
    assert found.min_pixels == reference.size["shortest_edge"]
    assert found.max_pixels == reference.size["longest_edge"]
    assert list(found.pixels.mean) == list(reference.image_mean)
    assert list(found.pixels.std) == list(reference.image_std)
    assert found.pixels.resample == int(reference.resample)
    assert found.pixels.rescale_factor == reference.rescale_factor
    assert found.patch_size == reference.patch_size


def test_settings_change_with_what_changes_pixels(tmp_path: Path) -> None:
    base = layout(tmp_path / "a").settings()
    for name, value in [("max_pixels", 9999), ("image_mean", [0, 0, 0]), ("resample", 2)]:
        other = layout(tmp_path / name, processor={**PROCESSOR, name: value}).settings()
        assert other != base
    json.dumps(base)


def test_every_vision_token_is_a_placeholder(tmp_path: Path) -> None:
    """As Qwen2-VL's published config.json has them."""
    ids = {
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
    }
    found = layout(tmp_path, config=ids).placeholder_ids
    assert found == {name.removesuffix("_id"): token_id for name, token_id in ids.items()}
    with pytest.raises(CheckpointError, match="vision_end_token_id"):
        layout(tmp_path, config={"vision_end_token_id": "<|vision_end|>"})


@pytest.mark.parametrize(
    ("config", "processor", "said"),
    [
        ({}, {}, "no preprocessor_config.json"),
        ({}, {**PROCESSOR, "patch_size": 16}, "not of one checkpoint"),
        ({}, {**PROCESSOR, "merge_size": "two"}, "whole number"),
        ({}, {**PROCESSOR, "image_mean": [1, 2]}, "three numbers"),
        ({"text_config": {"hidden_size": 0}}, PROCESSOR, "positive"),
        ({"image_token_id": -1}, PROCESSOR, "image_token_id = -1"),
        ({"vision_start_token_id": -1}, PROCESSOR, "vision_start_token_id = -1"),
        ({}, {**PROCESSOR, "min_pixels": 9999, "max_pixels": 999}, "at least 9999 .* most 999"),
        ({}, {"size": {"shortest_edge": 9999, "longest_edge": 999}}, "at least 9999"),
        ({}, {**PROCESSOR, "resample": 6}, "resample = 6"),
        ({}, {**PROCESSOR, "resample": -1}, "resample = -1"),
        ({}, {**PROCESSOR, "image_std": [0.5, 0, 0.5]}, "image_std"),
        ({}, {**PROCESSOR, "image_std": [0.5, float("inf"), 0.5]}, "image_std = inf"),
        ({}, {**PROCESSOR, "image_mean": float("nan")}, "image_mean = nan"),
        ({}, {**PROCESSOR, "rescale_factor": float("nan")}, "rescale_factor = nan"),
        ({}, {**PROCESSOR, "rescale_factor": 10**400}, "finite"),
    ],
)
def test_configurations_that_contradict_themselves(
    tmp_path: Path, config: dict[str, Any], processor: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        layout(tmp_path, config=config, processor=processor)


def test_a_processor_that_does_not_resize_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="do_resize"):
        layout(tmp_path, processor={**PROCESSOR, "do_resize": False})
