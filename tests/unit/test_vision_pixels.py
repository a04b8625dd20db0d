"""Pixels through a tower's table equal those of the Pillow-backed Hugging Face image processors,
bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.json_files import PixelSettings
from opticnerve.errors import PlanMismatch
from opticnerve.media.plan import Structure
from opticnerve.models import registry
from opticnerve.models.family import Preprocessor
from opticnerve.models.towers.pixels import PixelTable, upload, value_table
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.families import samples
from tests.reference import image_processor, picture, pixel_values

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")

SIZES = [(56, 56), (100, 80), (300, 200), (57, 201), (120, 120), (28, 400), (1024, 768), (9, 13)]


def open_side(path: Path) -> tuple[Any, Preprocessor]:
    checkpoint = Checkpoint.open(str(path), side="encoder")
    layout = registry.make_layout(checkpoint)
    return layout, registry.make_preprocessor(checkpoint, layout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_equal_the_reference(
    family: str, size: tuple[int, int], random_checkpoint: MakeCheckpoint
) -> None:
    path = random_checkpoint(family)
    layout, preprocess = open_side(path)
    image = picture(*size)
    plan = layout.plan(Structure("png", *size))
    sample = samples()[family]
    expected = sample.image_inputs(sample.image_processor(path), [image])
    pixels = preprocess(image, plan)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    values = PixelTable(layout.pixels, torch.float32, CPU)(upload([pixels], CPU))
    assert np.array_equal(values, samples()[family].pixels(expected))
    if "image_grid_thw" in expected:
        assert expected["image_grid_thw"].tolist() == [[plan.grid.t, plan.grid.h, plan.grid.w]]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.9, 0.8, 0.7]},
    ],
)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_other_settings_are_obeyed(
    family: str, settings: dict[str, object], tmp_path: Path
) -> None:
    path = make_checkpoint(family, tmp_path, **settings)
    layout, preprocess = open_side(path)
    image = picture(90, 130)
    expected = image_processor(path, family)(image, return_tensors="np")["pixel_values"]
    pixels = preprocess(image, layout.plan(Structure("png", 90, 130)))
    assert np.array_equal(pixel_values(layout, [pixels]), expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_a_picture_of_another_size_than_planned_is_refused(
    family: str, random_checkpoint: MakeCheckpoint
) -> None:
    layout, preprocess = open_side(random_checkpoint(family))
    plan = layout.plan(Structure("png", 100, 80))
    with pytest.raises(PlanMismatch, match="is 80x100, its header said 100x80"):
        preprocess(picture(80, 100), plan)
    with pytest.raises(PlanMismatch, match="mode L"):
        preprocess(Image.new("L", (100, 80)), plan)


def test_a_turned_picture_has_its_displayed_size(random_checkpoint: MakeCheckpoint) -> None:
    layout, preprocess = open_side(random_checkpoint("qwen2_vl"))
    plan = layout.plan(Structure("jpeg", 100, 80, orientation=6))
    upright = layout.plan(Structure("jpeg", 80, 100))
    assert replace(plan, width=80, height=100, orientation=1) == upright
    image = picture(80, 100)
    assert np.array_equal(preprocess(image, plan), preprocess(image, upright))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_is_uploaded_in_order_and_rounded_once(dtype: torch.dtype) -> None:
    """Every value of every channel, as two items, of which one cannot be written to."""
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(64, 2, 2, 3)
    values.flags.writeable = False
    batch = upload([values[:10], values[10:]], CPU)
    assert np.array_equal(batch, values)
    floats = PixelTable(PixelSettings(), dtype, CPU)(batch).reshape(256, 3)
    expected = torch.from_numpy(value_table(PixelSettings()).T.copy()).to(dtype)
    assert floats.dtype is dtype and torch.equal(floats, expected)
