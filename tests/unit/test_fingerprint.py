"""An encoder's fingerprint covers what decides a row, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.fingerprint import encoder_fingerprint, language_fingerprint
from tests.checkpoints import FAMILIES, make_checkpoint, write_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint("qwen2_vl", tmp_path / "checkpoint")


def encoder(path: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> str:
    checkpoint = Checkpoint.open(str(path), side="encoder")
    return encoder_fingerprint(checkpoint, dtype, options.pop("backend", "torch"), **options)


def change_weight(path: Path, key: str) -> None:
    weights = load_file(path / "model.safetensors")
    weights[key].view(-1)[3] += 1
    write_weights(weights, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_64_hex_digits_and_the_same_however_weights_are_sharded(
    family: str, tmp_path: Path
) -> None:
    one = encoder(make_checkpoint(family, tmp_path / "one"))
    three = encoder(make_checkpoint(family, tmp_path / "three", shards=3))
    assert len(one) == 64
    assert int(one, 16)
    assert one == three


def test_every_byte_of_the_tower_counts_and_none_of_the_language_model(path: Path) -> None:
    before = encoder(path)
    change_weight(path, "model.language_model.layers.0.mlp.up_proj.weight")
    assert encoder(path) == before
    change_weight(path, "model.visual.blocks.0.mlp.fc1.weight")
    assert encoder(path) != before


def test_settings_dtype_backend_and_precision_count(path: Path) -> None:
    seen = {
        encoder(path),
        encoder(path, dtype=torch.bfloat16),
        encoder(path, backend="tensorrt"),
        encoder(path, precision="float16"),
    }
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.5, 0.5, 0.5]
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    seen.add(encoder(path))
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (path / "config.json").write_text(json.dumps(config))
    seen.add(encoder(path))
    assert len(seen) == 6
    assert encoder(path, precision="float32") == encoder(path)


def test_the_language_models_covers_checkpoint_and_dtype(path: Path, tmp_path: Path) -> None:
    def language(path: Path, dtype: torch.dtype = torch.float32) -> str:
        return language_fingerprint(Checkpoint.open(str(path), side="llm"), dtype)

    other = make_checkpoint("qwen2_vl", tmp_path / "other", seed=1)
    found = {language(path), language(path, torch.bfloat16), language(other)}
    assert len(found) == 3
    assert language(path) == language(path)
