"""Qwen3-VL's layout and tower: what its configuration may say, and DeepStack's levels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError
from opticnerve.media.plan import Modality
from opticnerve.models import registry
from tests.checkpoints import make_checkpoint


def changed(path: Path, section: str | None = None, **fields: Any) -> Checkpoint:
    """The checkpoint with other fields in config.json; None: without the field."""
    config = json.loads((path / "config.json").read_text())
    part = config if section is None else config[section]
    for name, value in fields.items():
        part[name] = value
        if value is None:
            del part[name]
    (path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(str(path))


@pytest.mark.parametrize(("kind", "hidden_size"), [("qwen3_vl", 4096), ("qwen3_vl_moe", 2048)])
def test_defaults_are_those_of_the_reference(kind: str, hidden_size: int, tmp_path: Path) -> None:
    path = make_checkpoint(kind, tmp_path)
    changed(path, "text_config", hidden_size=None, max_position_embeddings=None)
    changed(path, "vision_config", patch_size=None, deepstack_visual_indexes=None)
    layout: Any = registry.make_layout(Checkpoint.open(str(path)))
    assert (layout.hidden_size, layout.max_positions) == (hidden_size, 128000)
    assert (layout.patch_size, layout.deepstack_levels) == (16, 3)


def test_a_video_is_no_item_and_its_token_a_placeholder(tmp_path: Path) -> None:
    """Its frames would stand between timestamps."""
    path = make_checkpoint("qwen3_vl", tmp_path)
    layout = registry.make_layout(Checkpoint.open(str(path)))
    assert Modality.VIDEO not in layout.item_token_ids
    assert "video_token" in layout.placeholder_ids


@pytest.mark.parametrize("layers", [[2, 0], [0, 0], [0, 4], [-1]])
def test_levels_of_layers_that_the_tower_has_not_are_refused(
    layers: list[int], tmp_path: Path
) -> None:
    """A tower of four layers."""
    path = make_checkpoint("qwen3_vl", tmp_path)
    checkpoint = changed(path, "vision_config", deepstack_visual_indexes=layers)
    with pytest.raises(CheckpointError, match="ascending layers of a tower of 4"):
        registry.load_tower(checkpoint, "float32", "cpu")


def test_levels_that_are_no_list_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_vl", tmp_path)
    checkpoint = changed(path, "vision_config", deepstack_visual_indexes=3)
    with pytest.raises(CheckpointError, match="deepstack_visual_indexes = 3"):
        registry.make_layout(checkpoint)


def test_a_model_without_levels_has_rows_alone(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_vl", tmp_path, vision={"deepstack_visual_indexes": []})
    assert registry.make_layout(Checkpoint.open(str(path))).deepstack_levels == 0
    registry.load_tower(Checkpoint.open(str(path)), "float32", "cpu")
