"""Published checkpoints: `opticnerve check` answers right, and key maps take every tensor once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from opticnerve.cli import commands
from opticnerve.models import registry
from opticnerve.models.family import Family, wanted
from tests import published


def claimed(config: dict[str, Any]) -> str:
    """The most particular model_type by which a family may claim ``config``."""
    tower = config["vision_config"].get("model_type")
    kind = str(config["model_type"])
    return f"{kind}/{tower}" if (kind, tower) == ("llava", "pixtral") else kind


def family_of(fixture: dict[str, Any]) -> Family:
    family = registry.families().get(claimed(fixture["files"]["config.json"]))
    assert family is not None, f"no family serves {fixture['repository']}"
    return family


@pytest.mark.parametrize("name", published.NAMES)
def test_check_answers_right(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = family_of(published.read(name))
    fixture = published.write(name, tmp_path)
    status = commands.main(["check", str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0, report["error"]
    assert (report["family"], report["title"]) == (family.name, family.title)
    counted = [(each["rows"], each["prompt_tokens"]) for each in report["pictures"]]
    for right, (rows, tokens) in zip((fixture["pictures"] or {}).values(), counted, strict=False):
        assert right in (rows, tokens), (fixture["pictures"], counted)
    prompt = report["prompt"]
    assert prompt["template"] == fixture["template"]["file"]
    assert prompt["placeholder"] in fixture["template"]["picture"]
    assert prompt["placeholder_id"] == fixture["tokens"][prompt["placeholder"]]
    ends = fixture["files"]["generation_config.json"]["eos_token_id"]
    assert set(ends if isinstance(ends, list) else [ends]) <= set(report["eos_token_ids"])
    vision, language = report["vision"], report["language"]
    assert vision["source"] == language["source"] == "headers"
    shapes = published.tensors(fixture).values()
    unused = fixture["parameters"] - vision["elements"] - language["elements"]
    assert fixture["parameters"] == sum(map(math.prod, shapes))
    assert 0 <= unused < 0.01 * fixture["parameters"]
    assert report["cache_bytes_per_token"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", published.NAMES)
def test_an_index_alone_names_what_the_model_has(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family_of(published.read(name))
    snapshot = tmp_path / "models--o--m" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    fixture = published.write(name, snapshot)
    for file in snapshot.glob("*.safetensors"):
        file.unlink()
    index = {"weight_map": dict.fromkeys(published.tensors(fixture), "model-1.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    status = commands.main(["check", str(snapshot), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0, report["error"]
    assert report["vision"]["source"] == report["language"]["source"] == "configuration"


@pytest.mark.parametrize("layout", published.LAYOUTS)
@pytest.mark.parametrize("name", published.NAMES)
def test_every_key_belongs_to_one_half(name: str, layout: str) -> None:
    fixture = published.read(name)
    family = family_of(fixture)
    keys = published.tensors(fixture, layout)
    assert len(keys) == len(published.tensors(fixture))
    is_vision, is_language = wanted(family.vision_keys), wanted(family.language_keys)
    assert [key for key in keys if is_vision(key) == is_language(key)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", published.NAMES)
def test_the_layout_of_transformers_5_loads_too(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family_of(published.read(name))
    published.write(name, tmp_path, layout="transformers 5")
    status = commands.main(["check", str(tmp_path), "--json"])
    assert status == 0, capsys.readouterr().out
