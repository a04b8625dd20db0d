"""Engines of real checkpoints: built, opened, served, and refused where they should be."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder_service.backends import tensorrt_library
from encoder_service.backends.base import Bucket
from encoder_service.backends.onnx_runtime import OnnxRuntime
from encoder_service.engines import gate, opening
from encoder_service.engines.sidecar import (
    GRAPH_FILE,
    PLAN_FILE,
    PROBES_FILE,
    Sidecar,
    describe_files,
)
from encoder_service.model import open_model
from encoder_service.pictures.largest_picture import largest_plan, permitted_patches
from opticnerve.cli.commands import main
from opticnerve.config import EncoderConfig, ModelConfig
from opticnerve.config.encoder import SIDECAR
from opticnerve.errors import ConfigError, InvalidRequest, StartupError, UnusableEngine
from opticnerve.media.plan import Overrides, Plan, Structure
from tests.engines import build_engine
from tests.reference import picture

pytestmark = pytest.mark.slow
SIZES = ((84, 84), (112, 84), (60, 84), (20, 1500))  # The last is a strip: the most patches.
BUCKETS = (64, 96)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the demo for onnxruntime. Read only."""
    directory = tmp_path_factory.mktemp("engines") / "demo"
    build_engine(None, directory, buckets=BUCKETS)
    return directory


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "demo"))


def settings(directory: Path | None, **options: Any) -> EncoderConfig:
    model = {"device": "cpu", "threads": 1, **options.pop("model", {})}
    engine = None if directory is None else str(directory)
    return EncoderConfig(model=ModelConfig(**model), vision_engine=engine, **options)


def items(model: Any) -> tuple[list[Any], list[Plan]]:
    plans = [model.layout.plan(Structure("png", *size)) for size in SIZES]
    pairs = zip(SIZES, plans, strict=True)
    return [model.backend.preprocess(picture(*size), plan) for size, plan in pairs], plans


# ---- served


def test_rows_are_the_torch_tower_s_and_the_fingerprint_is_not(demo: Path) -> None:
    torch_model = open_model(settings(None, model={"dtype": "float32"}))
    model = open_model(settings(demo))
    with closing(model.backend):
        assert (model.backend.name, model.backend.precision) == ("onnx", "float32")
        assert model.backend.device == "cpu" and model.backend.dtype == "F32"
        pixels, plans = items(model)
        assert plans[-1].num_patches > BUCKETS[-1] > plans[1].num_patches
        for got, want in zip(
            model.backend.encode(pixels, plans),
            torch_model.backend.encode(pixels, plans),
            strict=True,
        ):
            torch.testing.assert_close(got["rows"], want["rows"], rtol=1e-4, atol=1e-4)
    assert model.pair_id == torch_model.pair_id
    assert model.fingerprint != torch_model.fingerprint


def test_what_no_bucket_holds_can_be_refused(demo: Path) -> None:
    model = open_model(settings(demo, beyond_buckets="refuse"))
    with closing(model.backend):
        assert model.backend.reference is None
        pixels, plans = items(model)
        assert len(model.backend.encode(pixels[:-1], plans[:-1])) == len(plans) - 1
        with pytest.raises(InvalidRequest, match="takes up to 96"):
            model.backend.encode(pixels, plans)
        assert model.backend.warm(plans[-1], 0).max_item_patches == 96


def test_the_torch_tower_stays_only_where_it_is_needed(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For pictures beyond the buckets, or for an audit. The graph's weights never stay."""
    for held, share, kept in ((False, 0.0, True), (True, 0.0, False), (True, 0.5, True)):
        monkeypatch.setattr(opening, "hold_all", lambda *_, answer=held: answer)
        model = open_model(settings(demo, audit_share=share))
        with closing(model.backend):
            assert (model.backend.reference is not None) is kept
            assert model.backend._graph.module is None


def test_torch_encodes_what_a_request_may_ask_for_beyond_the_checkpoint_s_settings(
    demo: Path,
) -> None:
    model = open_model(settings(demo))
    with closing(model.backend):
        largest = largest_plan(model.layout, 10**6)
        plan = model.layout.plan(Structure("png", 640, 480), Overrides(max_pixels=100_000))
        assert plan.num_patches > permitted_patches(largest)
        assert plan.num_patches <= model.backend.warm(largest, 0).max_item_patches
        pixels = model.backend.preprocess(picture(640, 480), plan)
        assert model.backend.encode([pixels], [plan])[0]["rows"].shape[0] == plan.num_tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "tensorrt"}, "is for onnx"),
        ({"backend": "torch"}, "is for onnx"),
        ({"model": {"dtype": "bfloat16"}}, "computes in float32"),
        ({"model": {"device": "cuda"}}, "runs on cpu|is not there"),
    ],
)
def test_settings_that_disagree_with_the_engine_are_refused(
    demo: Path, options: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        open_model(settings(demo, **options))


def test_a_backend_of_engines_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"`opticnerve engine build --backend onnx -o DIR`"):
        open_model(settings(None, backend="onnx"))


def test_an_audit_without_torch_is_refused_before_anything_is_loaded(demo: Path) -> None:
    with pytest.raises(ConfigError, match="use --beyond-buckets torch"):
        settings(demo, audit_share=0.1, beyond_buckets="refuse")


# ---- refused


def refused(directory: Path, said: str, model: Path | None = None) -> None:
    given = {"model": None if model is None else str(model)}
    with pytest.raises(UnusableEngine, match=said) as caught:
        open_model(settings(directory, model=given))
    assert "\n" not in caught.value.message


def rewrite(directory: Path, **changes: Any) -> None:
    replace(Sidecar.read(directory), **changes).write(directory)


def test_an_engine_of_another_checkpoint_is_refused(
    demo: Path, random_checkpoint: Callable[..., Path]
) -> None:
    other = random_checkpoint(Sidecar.read(demo).family)
    refused(demo, f"from another checkpoint.*opticnerve engine build {other} --backend onnx", other)


def test_an_engine_of_another_library_version_is_refused(copied: Path) -> None:
    rewrite(copied, library_version="1.0.0")
    refused(copied, r"onnxruntime 1\.0\.0, here is .* Build it again: opticnerve engine build")


def test_an_engine_whose_settings_of_pixels_changed_is_refused(
    tmp_path: Path, demo: Path, random_checkpoint: Callable[..., Path]
) -> None:
    from tests.checkpoints import DEMO

    checkpoint = Path(shutil.copytree(DEMO, tmp_path / "model"))
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.4, 0.4, 0.4]}))
    refused(demo, "other processor settings", checkpoint)


def test_a_damaged_engine_is_refused(copied: Path) -> None:
    data = bytearray((copied / GRAPH_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / GRAPH_FILE).write_bytes(data)
    refused(copied, f"{GRAPH_FILE} is not the file that was built")


def test_an_unknown_precision_is_refused(copied: Path) -> None:
    rewrite(copied, precision="float8")
    refused(copied, "cannot be read as an engine's sidecar")


def test_a_file_that_the_library_does_not_load_is_refused(copied: Path) -> None:
    (copied / GRAPH_FILE).write_bytes(b"no graph")
    rewrite(copied, files=describe_files(copied))
    refused(copied, "onnxruntime .* does not load")


def test_an_inaccurate_engine_is_refused_with_the_figure(copied: Path) -> None:
    weights = copied / f"{GRAPH_FILE}.data"
    values = np.fromfile(weights, dtype=np.float32)
    values[: len(values) // 2] *= 1.2
    values.tofile(weights)
    rewrite(copied, files=describe_files(copied))
    refused(copied, r"64 patches: cosine 0\.\d+ \(at least 0\.99999\), largest difference")


def test_a_file_that_the_sidecar_leaves_out_is_refused(copied: Path) -> None:
    rewrite(copied, files={})
    refused(copied, f"does not name {GRAPH_FILE}")


def test_buckets_that_no_picture_uses_or_that_the_tower_cannot_have_are_refused(
    copied: Path,
) -> None:
    held = Sidecar.read(copied).buckets
    rewrite(copied, buckets=(*held, Bucket(240, 1), Bucket(100_000, 4096)))
    refused(copied, r"buckets \[100000\], so their rows cannot be measured")
    rewrite(copied, buckets=(Bucket(63, 1), *held[1:]))
    refused(copied, r"buckets of \[63, 96\] patches, its tower needs multiples of 4")


def test_an_engine_of_other_probe_pixels_says_what_made_them(copied: Path) -> None:
    made_by = "OpticNerve 0.0.1 with Pillow 1.2"
    rewrite(copied, made_by=made_by, probes=("0" * 64,))
    with closing(open_model(settings(copied)).backend):
        pass  # Its rows are near enough all the same.
    probes = copied / PROBES_FILE
    gate.write_rows(probes, {name: -rows for name, rows in gate.read_rows(probes).items()})
    rewrite(copied, files=describe_files(copied))
    refused(copied, f"made by {made_by}, and OpticNerve .* other pixels .* engine build")


@pytest.mark.parametrize("fault", [RuntimeError("no\nkernel"), torch.OutOfMemoryError("no")])
def test_a_runtime_that_fails_is_refused(
    demo: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(OnnxRuntime, "run", fail)
    refused(demo, "does not run here: no. Build it with smaller --buckets, .* --backend torch")


def test_the_torch_tower_s_weights_are_gone_before_the_engine_is_loaded(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers: list[Any] = []
    load, open_runtime = opening.load_tower, opening.open_runtime

    def loaded(*given: Any) -> Any:
        tower = load(*given)
        towers.append(weakref.ref(next(tower.module.parameters())))
        return tower

    def opened(*given: Any) -> Any:
        assert towers and not any(tower() is not None for tower in towers)
        return open_runtime(*given)

    monkeypatch.setattr(opening, "load_tower", loaded)
    monkeypatch.setattr(opening, "open_runtime", opened)
    with closing(open_model(settings(demo, beyond_buckets="refuse")).backend):
        assert len(towers) == 1


# ---- the command


def test_the_command_builds_inspects_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(tmp_path / "engine")
    build = ["engine", "build", "--backend", "onnx", "--precision", "fp16", "--threads", "1"]
    assert main([*build, "--buckets", "96", "-o", directory]) == 0
    built = capsys.readouterr().out
    assert "onnx in float16" in built and re.search(r"96 patches: cosine (1|0\.999)", built)
    assert f"--vision-engine {directory}" in built
    assert main(["engine", "inspect", directory]) == 0
    assert "96 patches" in capsys.readouterr().out
    assert main(["engine", "check", directory, "--threads", "1"]) == 0
    assert "measured here, against torch in float32" in capsys.readouterr().out
    (tmp_path / "engine" / GRAPH_FILE).write_bytes(b"")
    assert main(["engine", "inspect", directory]) == 2
    assert f"damaged: {GRAPH_FILE}" in capsys.readouterr().out
    assert main(["engine", "check", directory]) == 2
    assert f"{GRAPH_FILE} is not the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backend", "onnx", "--precision", "bf16"], "does not compute in bfloat16"),
        (["--backend", "onnx", "--buckets", "4,96"], "would use buckets"),
        (["--backend", "onnx", "--compute-capability", "8.9"], "no compute capability"),
        (["--backend", "tensorrt_rtx"], "--compute-capability 8.9,12.0"),
        (["--backend", "tensorrt_rtx", "--compute-capability", "9.0"], "does for 7.5, 8.0"),
    ],
)
def test_what_cannot_be_built_is_said_before_it_is_tried(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--device", "cpu", "-o", str(tmp_path / "engine")]
    assert main(["engine", "build", *flags, *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "engine").exists() and not [*tmp_path.iterdir()]


def test_a_directory_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter").write_text("Dear reader")
    assert main(["engine", "build", "--backend", "onnx", "-o", str(tmp_path)]) == 2
    assert "holds no engine" in capsys.readouterr().err
    (tmp_path / SIDECAR).write_text("{}")
    assert main(["engine", "build", "--backend", "onnx", "-o", str(tmp_path)]) == 2
    assert "holds no engine" in capsys.readouterr().err
    assert (tmp_path / "letter").read_text() == "Dear reader"


def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorrt_library, "find_spec", lambda name: None)
    for backend, package in (("tensorrt", "tensorrt-cu13"), ("tensorrt_rtx", "tensorrt-rtx")):
        with pytest.raises(ConfigError, match=f"--backend {backend} needs .*{package}"):
            opening.load_library(backend)
    monkeypatch.setattr("opticnerve.extras.find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"opticnerve\[onnx\]"):
        opening.load_library("onnx")


# ---- TensorRT for RTX, ahead of time


@pytest.fixture
def rtx() -> Iterator[tensorrt_library.TensorrtLibrary]:
    if not any(map(find_spec, tensorrt_library.MODULES["tensorrt_rtx"])):
        pytest.skip("TensorRT for RTX is not installed")
    yield tensorrt_library.TensorrtLibrary("tensorrt_rtx")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("family", "precision"), [("llava", "bfloat16"), ("qwen2_5_vl", "float16")]
)
def test_an_engine_is_built_for_devices_that_are_not_here(
    family: str, precision: str, random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "engine"
    made = build_engine(
        random_checkpoint(family), directory, "tensorrt_rtx", precision, (), ("8.9", "12.0")
    )
    assert Sidecar.read(directory) == made
    assert (made.compute_capabilities, made.precision) == (("8.9", "12.0"), precision)
    assert made.parity is None and made.files[PLAN_FILE].num_bytes > 10**5
    assert not [*made.damage(directory)]
    assert {path.name for path in directory.iterdir()} == {SIDECAR, *made.files}
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="runs on cuda"):
            open_model(settings(directory, model={"model": str(random_checkpoint(family))}))
