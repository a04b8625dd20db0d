"""PaddleOCR-VL's layout: its own sizes, and what its published files hold beside."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.media.plan import Modality, Structure
from opticnerve.models import registry
from tests.checkpoints import make_checkpoint, write_weights


def layout_of(path: Path) -> Any:
    return registry.make_layout(Checkpoint.open(str(path)))


def changed(path: Path, file: str, edit: Any) -> Path:
    content = json.loads((path / file).read_text())
    edit(content)
    (path / file).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("bounds", [(28 * 28, 40000), (147384, 2822400)])
def test_sizes_are_those_of_the_reference(bounds: tuple[int, int], tmp_path: Path) -> None:
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize

    path = make_checkpoint("paddleocr_vl", tmp_path, min_pixels=bounds[0], max_pixels=bounds[1])
    layout = layout_of(path)
    rng = random.Random(4)
    tops = (30, 300, 5000)
    drawn = [(rng.randint(1, top), rng.randint(1, top)) for top in tops for _ in range(300)]
    sizes = [size for size in drawn if max(size) <= 190 * min(size)]
    for width, height in [*sizes, (1, 1), (200, 1), (1, 200), (5600, 28)]:
        plan = layout.plan(Structure("png", width, height))
        expected = smart_resize(height, width, 28, *bounds)
        assert (plan.resized_height, plan.resized_width) == expected, (width, height)


def test_defaults_are_those_of_the_reference(tmp_path: Path) -> None:
    from transformers import PaddleOCRVLConfig
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
        PaddleOCRVLImageProcessorPil,
    )

    def strip(config: dict[str, Any]) -> None:
        for name in ("hidden_size", "max_position_embeddings"):
            del config["text_config"][name]
        del config["image_token_id"], config["vision_config"]["patch_size"]

    path = changed(make_checkpoint("paddleocr_vl", tmp_path), "config.json", strip)
    layout = layout_of(changed(path, "preprocessor_config.json", lambda c: c.pop("size")))
    config, processor = PaddleOCRVLConfig(), PaddleOCRVLImageProcessorPil()
    assert layout.item_token_ids == {Modality.IMAGE: config.image_token_id}
    assert layout.hidden_size == config.text_config.hidden_size
    assert layout.max_positions == config.text_config.max_position_embeddings
    assert layout.patch_size == config.vision_config.patch_size
    assert layout.min_pixels == processor.size["shortest_edge"]
    assert layout.max_pixels == processor.size["longest_edge"]


def test_what_the_tower_does_not_use_is_left_aside(tmp_path: Path) -> None:
    """The head that pools a picture, and positions of packed pictures."""
    path = make_checkpoint("paddleocr_vl", tmp_path, layout="old")
    weights = load_file(path / "model.safetensors")
    for name in ("head.probe", "embeddings.packing_position_embedding.weight"):
        weights[f"visual.vision_model.{name}"] = torch.zeros(3)
    write_weights(weights, path)
    registry.load_tower(Checkpoint.open(str(path), side="encoder"), "float32", "cpu")
