"""``opticnerve check``: what it says of a checkpoint, and of one that cannot be served."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.cli import check, commands
from opticnerve.errors import CheckpointError
from opticnerve.models import registry
from opticnerve.models.family import Expansion, RowRun
from tests.checkpoints import DEMO, make_checkpoint

WEIGHTS = DEMO / "model.safetensors"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the demo's checkpoint, to change."""
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The same in the hub's cache layout, in which weights may be missing."""
    return Path(shutil.copytree(DEMO, tmp_path / "models--o--m" / "snapshots" / ("0" * 40)))


def told(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    assert commands.main(["check", *map(str, argv), "--json"]) == status
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_it_tells_what_each_service_loads(capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys)
    assert report["served"] and report["family"] == "qwen2_vl" and report["dtype"] == "bfloat16"
    vision, language = report["vision"], report["language"]
    assert vision["source"] == language["source"] == "headers"
    tensors = Checkpoint.open(None).tensor_index()
    assert vision["tensors"] + language["tensors"] == len(tensors)
    stored = sum(entry.num_bytes for entry in tensors.values())  # In bf16 too.
    assert report["encoder_bytes"] + report["llm_bytes"] == stored
    assert report["prompt"]["template"] == "chat_template.jinja"
    assert report["prompt"]["placeholder"] == "<|image_pad|>"
    assert report["eos_token_ids"] == [629]
    assert [each["prompt_tokens"] for each in report["pictures"]] == [12, 12, 6]


def test_it_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["check", str(DEMO)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("checkpoint will be served\n")
    assert "KV cache       1 KiB a token" in text and "1600x400: 6 tokens" in text
    assert "3D positions" in text and "not checked here" not in text


def test_the_cache_is_what_the_engine_reserves() -> None:
    text = registry.describe_decoder(Checkpoint.open(None)).config.to_dict()
    language = registry.load_language(Checkpoint.open(None), "float32", "cpu", "eager")
    each = 2 * language.num_layers * language.num_kv_heads * language.head_dim
    assert check.cache_bytes_per_token(text, "bfloat16") == 2 * each


def test_without_weights_sizes_follow_from_the_configuration(
    cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = told(capsys, cached)
    (cached / WEIGHTS.name).unlink()
    report = told(capsys, cached)
    assert report["missing_weights"] == [WEIGHTS.name]
    for half in ("vision", "language"):
        assert report[half] == whole[half] | {"source": "configuration"}


def test_without_torch_it_says_what_it_could_not_check(
    cached: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(capsys, cached)
    monkeypatch.setitem(sys.modules, "torch", None)
    report = told(capsys, cached)
    assert "needs torch" in report["left_out"][0]
    for name in ("vision", "language", "cache_bytes_per_token", "pictures", "prompt"):
        assert report[name] == whole[name]
    (cached / WEIGHTS.name).unlink()
    report = told(capsys, cached)
    assert report["vision"] is None and report["encoder_bytes"] is None
    names = dict.fromkeys(Checkpoint.open(None).tensor_index(), "model-1.safetensors")
    (cached / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    report = told(capsys, cached)
    assert report["vision"] == whole["vision"] | {"elements": None, "source": "index"}


def test_what_loading_refuses_is_refused_in_its_words(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow = {**Checkpoint.open(None).vision_config, "depth": 3}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("config.json", {"model_type": "bert"}, "model_type 'bert'"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantized (awq)"),
        ("config.json", {"vision_config": shallow}, "tensors that have no place in the model"),
        ("config.json", {"image_token_id": 1}, "neither the tokenizer nor"),
        ("preprocessor_config.json", {"patch_size": 16}, "not of one checkpoint"),
    ]
    for file, fields, said in cases:
        before = (copy / file).read_text()
        edit(copy / file, **fields)
        error = told(capsys, copy, status=1)["error"]
        assert said in error["message"], error
        assert error["type"] in ("UnsupportedCheckpoint", "CheckpointError")
        (copy / file).write_text(before)


def test_a_template_without_pictures_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert commands.main(["check", str(copy)]) == 1
    assert "wrote 0 placeholders for pictures" in capsys.readouterr().out
    given = ["--chat-template", str(DEMO / "chat_template.jinja")]
    assert told(capsys, copy, *given)["prompt"]["template"] == given[1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_never_load_are_refused(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / WEIGHTS.name).unlink()
    (copy / name).write_bytes(WEIGHTS.read_bytes()[:1000])
    error = told(capsys, copy, status=1)["error"]
    said = "pickles only" if name.endswith(".bin") else "damaged or was not downloaded whole"
    assert said in error["message"]


@pytest.mark.parametrize("kind", ["loop", "directory", "pipe"])
@pytest.mark.parametrize("place", ["copy", "cached"])
def test_weights_that_are_no_file_are_refused(
    kind: str, place: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = request.getfixturevalue(place)
    weights = directory / WEIGHTS.name
    weights.unlink()
    if kind == "loop":
        weights.symlink_to(weights)
    elif kind == "directory":
        weights.mkdir()
    else:
        os.mkfifo(weights)
    message = told(capsys, directory, status=1)["error"]["message"]
    assert message.startswith(f"{weights} is no file")


def test_a_directory_without_its_weights_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / WEIGHTS.name).unlink()
    assert "fetch the weights" in told(capsys, copy, status=1)["error"]["message"]
    names = dict.fromkeys(Checkpoint.open(None).tensor_index(), "model-1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "lacks model-1.safetensors" in told(capsys, copy, status=1)["error"]["message"]


@pytest.mark.parametrize("torch", [True, False])
def test_an_index_of_other_tensors_is_refused(
    torch: bool,
    cached: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (cached / WEIGHTS.name).unlink()
    if not torch:
        monkeypatch.setitem(sys.modules, "torch", None)
    keys = list(Checkpoint.open(None).tensor_index())
    block = next(key for key in keys if "blocks.1." in key)

    def answer(keys: list[str], status: int) -> dict[str, Any]:
        index = {"weight_map": dict.fromkeys(keys, "model-1.safetensors")}
        (cached / "model.safetensors.index.json").write_text(json.dumps(index))
        return told(capsys, cached, status=status)

    assert answer(keys, 0)["missing_weights"] == ["model-1.safetensors"]
    error = answer([f"other.{i}" for i in range(3000)], 1)["error"]
    assert error["type"] == "CheckpointError"
    if torch:
        error = answer([key for key in keys if key != block], 1)["error"]
        assert "lacks blocks.1." in error["message"]
        more = [*keys, block.replace("blocks.1.", "blocks.77.")]
        assert "no place in the model" in answer(more, 1)["error"]["message"]


def test_tied_weights_are_counted_once() -> None:
    checkpoint = Checkpoint.open(None)
    spec = registry.describe_decoder(checkpoint)
    keys = registry.find_family(checkpoint.config).language_keys
    assert spec.tied and spec.check(checkpoint, keys).elements == 1_698_752


@pytest.mark.parametrize(
    ("family", "bounds"), [("qwen2_vl", "min_pixels and max_pixels"), ("internvl", "max_pixels")]
)
def test_it_tells_which_bounds_a_request_may_set(
    family: str, bounds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["check", str(make_checkpoint(family, tmp_path))]) == 0
    assert capsys.readouterr().out.endswith(f"; a request may set {bounds}\n")


@pytest.mark.parametrize(
    ("part", "broken", "said"),
    [
        ("family", "other", "says family = 'other'; its package is 'qwen2_vl'"),
        ("hidden_size", None, "has no hidden_size; what a layout has"),
        ("expand", lambda plan: Expansion((1,), (RowRun(0, 1, 0),)), "expand() places 1; its"),
    ],
)
def test_a_layout_that_breaks_its_contract_is_told(
    part: str, broken: Any, said: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(checkpoint: Checkpoint) -> Any:
        layout = registry.make_layout(checkpoint)
        if broken is None:
            delattr(layout, part)
        else:
            setattr(layout, part, broken)
        return layout

    monkeypatch.setattr(check, "make_layout", damaged)
    error = told(capsys, status=1)["error"]
    assert error["type"] == "FamilyError" and said in error["message"], error


def test_a_buffer_that_is_not_recomputed_is_told() -> None:
    checkpoint = Checkpoint.open(None)
    keys = registry.find_family(checkpoint.config).vision_keys
    spec = replace(registry.describe_tower(checkpoint), recomputed={})
    with pytest.raises(CheckpointError, match=r"uninitialised: .*inv_freq.*as `recomputed`"):
        spec.load(checkpoint, keys, "float32", "cpu")


def test_a_broken_family_is_told_once(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / "config.json", model_type="bert")
    found = replace(registry.discover(), broken=("the family acme cannot be used: why",))
    monkeypatch.setattr(registry, "discover", lambda: found)
    monkeypatch.setattr(check, "discover", lambda: found)
    assert commands.main(["check", str(copy)]) == 1
    assert capsys.readouterr().out.count("the family acme cannot be used: why") == 1
