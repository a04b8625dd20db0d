"""The layout of Idefics3 and SmolVLM against transformers: tiles, their tokens, bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gateway.api.schemas.messages import ItemSource
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidRequest, PlanMismatch, UnsupportedCheckpoint
from opticnerve.media.plan import Grid, Overrides, Structure
from opticnerve.models import registry
from opticnerve.models.towers.pixels import PixelTable
from tests import published
from tests.checkpoints import make_checkpoint
from tests.families import samples
from tests.reference import CAUSAL, picture

SIZES = [(84, 84), (9, 13), (300, 40), (40, 300), (57, 201), (113, 112), (1, 150), (640, 480)]


def open_layout(path: Path, side: Any = "gateway") -> Any:
    return registry.make_layout(Checkpoint.open(str(path), side=side))


@pytest.fixture
def layout(tmp_path: Path) -> Any:
    published.write("smolvlm-256m-instruct", tmp_path, weights=False)
    return open_layout(tmp_path)


def test_published_configuration(layout: Any) -> None:
    assert layout.family == "idefics3"  # As the first SmolVLM is published.
    plan = layout.plan(Structure("jpeg", 1024, 768))
    assert (plan.resized_width, plan.resized_height) == (4 * 512, 3 * 512)
    assert plan.grid == Grid(13, 32, 32) and plan.num_tokens == 13 * 64
    ids = layout.expand(plan).token_ids
    fake, image, whole, row_1, row_2 = 49189, 49190, 49152, 49153, 49159
    assert ids[:3] == (fake, row_1, image) and ids[-1] == fake
    assert ids.count(fake) == 14 and ids.count(whole) == 1 and row_2 in ids


def test_a_tile_may_have_pixels_that_no_patch_sees(tmp_path: Path) -> None:
    """SmolVLM2-2.2B: 27 patches of 14 pixels in 384."""
    published.write("smolvlm2-2.2b-instruct", tmp_path, weights=False)
    layout = open_layout(tmp_path)
    assert layout.plan(Structure("png", 10, 10)).grid == Grid(17, 27, 27)
    assert layout.tile_tokens == 81


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_image_splitting": False},
        {"size": {"longest_edge": 200}},  # No whole number of tiles.
        {"size": {"longest_edge": 111}},  # The other edge may become longer.
        {"size": {"longest_edge": 40}},
    ],
    ids=repr,
)
def test_ids_and_pixels_equal_the_processors(
    family: str, settings: dict[str, Any], random_checkpoint: Callable[..., Path]
) -> None:
    """Tokens of rows and columns beyond those that the tokenizer has are text."""
    path = random_checkpoint(family, **settings)
    sample = samples()[family]
    theirs, layout = sample.processor(path), open_layout(path)
    preprocess = registry.make_preprocessor(Checkpoint.open(str(path)), layout)
    table = PixelTable(layout.pixels, torch.float32, "cpu")
    for size in SIZES:
        image = picture(*size)
        given = sample.process(theirs, "<image>", [image])
        plan = layout.plan(Structure("png", *size))
        assert list(layout.expand(plan).token_ids) == given["input_ids"][0].tolist()
        assert bool(given["pixel_attention_mask"].all())  # Every tile is whole.
        values = table(torch.tensor(preprocess(image, plan))).permute(0, 3, 1, 2)
        assert torch.equal(values, given["pixel_values"][0])


@pytest.mark.parametrize("longest", [4096, 5000, 5001])
def test_no_edge_is_longer_than_the_references_bound(longest: int, tmp_path: Path) -> None:
    from transformers.models.idefics3 import image_processing_pil_idefics3 as theirs

    published.write("smolvlm-256m-instruct", tmp_path, weights=False)
    change(tmp_path / "preprocessor_config.json", {"size": {"longest_edge": longest}})
    layout = open_layout(tmp_path)
    for width, height in SIZES:
        plan = layout.plan(Structure("png", width, height))
        image = np.empty((3, height, width), np.uint8)
        first = theirs.get_resize_output_image_size(image, longest)
        assert layout.first_size(width, height, plan) == first[::-1]
        tiles = theirs.Idefics3ImageProcessorPil(
            size={"longest_edge": longest}, max_image_size={"longest_edge": 512}
        ).get_number_of_image_patches(height, width)[0]
        assert plan.grid.t == tiles <= 65


@pytest.mark.parametrize("most", [1, 56**2, 2 * 56**2, 4 * 56**2, 10**12])
def test_max_pixels_lowers_the_longest_edge(most: int, tmp_path: Path) -> None:
    path = make_checkpoint("smolvlm", tmp_path, size={"longest_edge": 168})
    layout: Any = open_layout(path)
    theirs = samples()["smolvlm"].image_processor(path)
    for size in SIZES:
        plan = layout.plan(Structure("png", *size), Overrides(max_pixels=most))
        columns, rows = layout.shape(plan)
        assert columns * rows * 56**2 <= max(most, 56**2)
        longest = max(columns, rows) * 56
        given = theirs([[picture(*size)]], size={"longest_edge": longest}, return_tensors="np")
        assert len(given["pixel_values"][0]) == plan.grid.t
        if longest < 168:  # One tile more along the longest edge would be too many.
            larger = layout._shape(*size, longest + 56)
            assert larger[0] * larger[1] * 56**2 > most


def test_low_detail_is_one_tile(layout: Any) -> None:
    asked = ItemSource("", "", low_detail=True).overrides(layout.settings()["max_pixels"])
    plan = layout.plan(Structure("png", 4000, 3000), asked)
    assert plan.grid == Grid(1, 32, 32)
    assert len(layout.expand(plan).token_ids) == 64 + 3


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (60_000, 300), (12_000, 12_000)])
def test_no_picture_has_more_tiles_than_the_processor_allows(
    layout: Any, size: tuple[int, int]
) -> None:
    assert 1 <= layout.plan(Structure("png", *size)).grid.t <= 17


def test_min_pixels_is_refused(layout: Any) -> None:
    with pytest.raises(InvalidRequest, match="leave out min_pixels"):
        layout.plan(Structure("png", 100, 100), Overrides(min_pixels=10))


def test_a_picture_that_does_not_fit_its_plan(layout: Any, tmp_path: Path) -> None:
    preprocess = registry.make_preprocessor(Checkpoint.open(str(tmp_path)), layout)
    plan = layout.plan(Structure("png", 400, 400))
    wide = layout.plan(Structure("png", 400, 100))
    with pytest.raises(PlanMismatch):
        preprocess(Image.new("RGB", (400, 100)), plan)
    with pytest.raises(PlanMismatch, match="does not fit its plan"):
        layout.first_size(400, 400, wide)


# ---- refusals


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"scale_factor": 5}, "cannot be merged 5 by 5"),
        ("processor_config.json", {"image_seq_len": 169}, "writes 169 placeholders a tile"),
        ("preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "lacks longest_edge"),
        ("tokenizer_config.json", {"fake_image_token": "<fake>"}, "lacks <fake>"),
        ("config.json", {"image_token_id": -1}, "image_token_id = -1"),
        ("preprocessor_config.json", {"resample": 6}, "resample = 6"),
    ],
)
def test_files_that_do_not_fit_are_named(
    file: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    published.write("smolvlm-256m-instruct", tmp_path, weights=False)
    change(tmp_path / file, changes)
    with pytest.raises(CheckpointError, match=said):
        open_layout(tmp_path)


def test_tiles_are_bounded(tmp_path: Path) -> None:
    published.write("smolvlm-256m-instruct", tmp_path, weights=False)
    change(tmp_path / "preprocessor_config.json", {"max_image_size": {"longest_edge": 128}})
    change(tmp_path / "processor_config.json", {"image_seq_len": 4})
    open_layout(tmp_path)
    change(tmp_path / "preprocessor_config.json", {"size": {"longest_edge": 2049}})
    with pytest.raises(UnsupportedCheckpoint, match="289 tiles; more than 256"):
        open_layout(tmp_path)


def test_only_gateways_read_the_tokenizer(tmp_path: Path) -> None:
    published.write("smolvlm-256m-instruct", tmp_path, weights=False)
    (tmp_path / "tokenizer.json").write_text("{")
    open_layout(tmp_path, side="encoder")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        open_layout(tmp_path)


def test_another_text_model_is_refused_by_name(tmp_path: Path) -> None:
    path = make_checkpoint("smolvlm", tmp_path)
    change(path / "config.json", {"text_config": {"model_type": "qwen2"}})
    with pytest.raises(UnsupportedCheckpoint, match=r"SmolVLM .* language model is 'qwen2'"):
        registry.load_language(Checkpoint.open(str(path)), "float32", "cpu", CAUSAL)


def change(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
