"""An engine's sidecar: written, read, and held against the files and the machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encoder_service.backends.base import Bucket
from encoder_service.engines.sidecar import (
    FORMAT,
    PLAN_FILE,
    PROBES_FILE,
    Parity,
    Sidecar,
    describe_files,
)
from opticnerve.config.encoder import SIDECAR
from opticnerve.config.shared import CheckpointConfig
from opticnerve.errors import UnusableEngine
from opticnerve.tensors.distance import Distance

FINGERPRINT = "f" * 64


@pytest.fixture
def engine(tmp_path: Path) -> tuple[Path, Sidecar]:
    """A directory with two files and their sidecar."""
    (tmp_path / PLAN_FILE).write_bytes(b"kernels")
    (tmp_path / PROBES_FILE).write_bytes(b"rows")
    made = Sidecar(
        model="some/model",
        revision="v1",
        family="qwen2_vl",
        fingerprint=FINGERPRINT,
        backend="tensorrt_rtx",
        precision="float16",
        buckets=(Bucket(1024, 16), Bucket(4096, 4)),
        library="tensorrt_rtx",
        library_version="1.7.1",
        compute_capabilities=("8.9", "12.0"),
        made_by="a release",
        probes=("a" * 64,),
        files=describe_files(tmp_path),
        parity=(Parity(1024, Distance(0.9999, 0.01, 3.5)), Parity(4096, Distance(1.0, 0.0, 3.5))),
        format=FORMAT,
    )
    made.write(tmp_path)
    return tmp_path, made


def test_what_is_written_is_read(engine: tuple[Path, Sidecar]) -> None:
    directory, made = engine
    assert Sidecar.read(directory) == made
    replace(made, parity=None).write(directory)
    assert Sidecar.read(directory).parity is None
    assert SIDECAR not in describe_files(directory)


def test_a_directory_without_a_sidecar_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UnusableEngine, match="opticnerve engine build"):
        Sidecar.read(tmp_path)


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        drop("fingerprint"), drop("buckets"), drop("parity"), put("format", 1), put("buckets", []),
        drop("format"), put("buckets", [{"patches": 4}]),
        put("buckets", [{"patches": 4, "pictures": 0}]),
        put("buckets", [{"patches": -4, "pictures": 1}]),
        put("buckets", [{"patches": 8, "pictures": 1}, {"patches": 4, "pictures": 1}]),
        put("buckets", [{"patches": 8, "pictures": 1}, {"patches": 8, "pictures": 1}]),
        put("backend", "torch"), put("precision", "float64"), put("probes", "a"),
        put("files", []), put("parity", 3), put("model", 3), put("backend", 1),
    ],
)  # fmt: skip
def test_a_damaged_sidecar_is_refused(
    engine: tuple[Path, Sidecar], change: Callable[[dict[str, Any]], object]
) -> None:
    path = engine[0] / SIDECAR
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UnusableEngine, match="build the engine again"):
        Sidecar.read(engine[0])


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"a"'])
def test_what_is_no_sidecar_is_refused(engine: tuple[Path, Sidecar], text: str) -> None:
    (engine[0] / SIDECAR).write_text(text)
    with pytest.raises(UnusableEngine, match="build the engine again"):
        Sidecar.read(engine[0])


def test_files_are_held_against_their_digests(engine: tuple[Path, Sidecar]) -> None:
    directory, made = engine
    assert not [*made.damage(directory)]
    (directory / "tower.plan").write_bytes(b"kernelz")
    assert [*made.damage(directory)] == ["tower.plan is not the file that was built"]
    (directory / "tower.plan").unlink()
    assert [*made.damage(directory)] == ["tower.plan is missing or cannot be read"]
    elsewhere = replace(made, files={**made.files, "../tower.plan": made.files["tower.plan"]})
    assert "../tower.plan is no file of the directory" in [*elsewhere.damage(directory)]


def test_a_sidecar_that_leaves_files_out_is_damaged(engine: tuple[Path, Sidecar]) -> None:
    directory, made = engine
    assert [*replace(made, files={}).damage(directory)] == [
        "engine.json does not name tower.plan",
        "engine.json does not name probes.safetensors",
        "probes.safetensors is no file of the engine",
        "tower.plan is no file of the engine",
    ]
    of_onnx = [*replace(made, backend="onnx").damage(directory)]
    assert of_onnx == ["engine.json does not name tower.onnx"]
    (directory / "tower.onnx.data").write_bytes(b"weights")
    assert [*made.damage(directory)] == ["tower.onnx.data is no file of the engine"]


def test_an_engine_of_another_checkpoint_library_or_device_says_so(
    engine: tuple[Path, Sidecar],
) -> None:
    made = engine[1]
    right = {"library_version": "1.7.1", "fingerprint": FINGERPRINT, "capability": "12.0"}
    assert not [*made.obstacles(**right)]
    for name, value, said in (
        ("library_version", "1.8.0", "built with tensorrt_rtx 1.7.1, here is 1.8.0"),
        ("fingerprint", "0" * 64, "another checkpoint"),
        ("capability", "9.0", "built for compute capability 8.9, 12.0, this device has 9.0"),
    ):
        (obstacle,) = made.obstacles(**{**right, name: value})
        assert said in obstacle


def test_the_command_that_rebuilds_is_complete(engine: tuple[Path, Sidecar]) -> None:
    words = shlex.split(engine[1].rebuild_command(Path("my engine")))
    assert words == [
        "opticnerve", "engine", "build", "some/model", "--revision", "v1", "--backend",
        "tensorrt_rtx", "--precision", "fp16", "--buckets", "1024,4096", "--compute-capability",
        "8.9,12.0", "-o", "my engine",
    ]  # fmt: skip
    demo = replace(engine[1], model=None, revision=None).rebuild_command(Path("x"))
    assert demo.startswith("opticnerve engine build --backend tensorrt_rtx ")
    served = CheckpointConfig("another/model", download_dir="my models")
    assert (
        engine[1]
        .rebuild_command(Path("x"), None, served)
        .startswith("opticnerve engine build another/model --download-dir 'my models' --backend")
    )
    assert "--compute-capability 8.6" in engine[1].rebuild_command(Path("x"), "8.6")
