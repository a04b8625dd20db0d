"""How ``make gpu`` runs its checks: alone, in time, told and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench import report
from bench.gpu import __main__ as gpu
from bench.gpu import figures
from bench.gpu.__main__ import Check, Outcome, Run
from bench.gpu.checks import CheckFailed, Seen, Skipped
from bench.gpu.models import TWIN, Room

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def fine(room: Room) -> Seen:
    return Seen("as it should be", {"value": 1})


def wrong(room: Room) -> Seen:
    raise CheckFailed("two is not three")


def absent(room: Room) -> Seen:
    raise Skipped("no such part here")


def checks(**functions) -> list[Check]:
    return [Check(name, function, "group") for name, function in functions.items()]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(torch.device("cpu"), TWIN, tmp_path)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_failing_check_leaves_the_others_going(room, capsys):
    outcomes = Run(room, 60.0)(checks(a=wrong, b=absent, c=fine))
    assert [each.result for each in outcomes] == ["FAILED", "skipped", "ok"]
    assert outcomes[0].said == "CheckFailed: two is not three"
    assert "raise CheckFailed" in outcomes[0].trace
    assert outcomes[1].said == "no such part here"
    assert outcomes[2].figures == {"value": 1}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[ 1/3] a ... FAILED")
    assert lines[2] == "[ 3/3] c ... ok, 0.0 s: as it should be"


def test_what_there_is_no_time_for_is_told(room):
    outcomes = Run(room, -1.0)(checks(a=fine, b=fine))
    assert [(each.result, each.said) for each in outcomes] == [("not run", "out of time")] * 2


def test_a_lost_device_ends_what_follows(room, monkeypatch):
    def lost(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def breaks(room: Room) -> Seen:
        monkeypatch.setattr(Room, "synchronize", lost)
        raise RuntimeError("CUDA error")

    outcomes = Run(room, 60.0)(checks(a=fine, b=breaks, c=fine))
    assert [each.result for each in outcomes] == ["ok", "FAILED", "not run"]
    assert outcomes[2].said == (
        "the device was lost in 'b': CUDA error: an illegal memory access was encountered"
    )


def test_results_are_kept_after_every_check(room):
    kept: list[list[Outcome]] = []
    Run(room, 60.0, lambda outcomes: kept.append(list(outcomes)))(checks(a=fine, b=wrong))
    assert [len(each) for each in kept] == [1, 2]


@pytest.mark.process
def test_the_command_tells_and_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "all_checks", lambda: checks(first=fine, second=wrong))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "out.json"
    assert gpu.main(["--only", "first", "--out", str(file)]) == 0
    assert "no CUDA device is visible" in capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["command"].startswith("python -m bench.gpu")
    assert document["commit"] and document["transformers"] and document["machine"]["torch"]
    assert document["dry"] is True
    assert [(each["name"], each["result"]) for each in document["checks"]] == [("first", "ok")]
    assert gpu.main(["--dry", "--out", str(file)]) == 1
    out = capsys.readouterr().out
    assert "no CUDA device" not in out and "| second" in out and "Traceback" in out
    assert gpu.main(["--dry", "--only", "third"]) == 2


@pytest.mark.process
def test_a_dry_run_keeps_nothing_unless_told_where(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "all_checks", lambda: checks(first=fine))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    assert gpu.main(["--dry"]) == 0
    assert not (tmp_path / "results").exists()


def test_on_cuda_results_are_kept_by_the_devices_name(tmp_path, monkeypatch):
    def warns(room: Room) -> Seen:
        assert room.on_cuda and room.dtype is torch.bfloat16
        waits = figures._waits(
            lambda: warnings.warn("called a synchronizing operation", stacklevel=1)
        )
        return Seen("seen", {"waits": waits, "ms": room.median_ms(lambda: None)})

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def elapsed_time(self, end: object) -> float:
            return 2.5

    for name, fake in {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)  # Asks the driver.
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "all_checks", lambda: checks(first=warns))
    assert gpu.main(["--commit", "abc"]) == 0
    document = json.loads((tmp_path / "gpu" / "nvidia-h100-80gb-hbm3.json").read_text())
    assert document["commit"] == "abc" and document["dry"] is False
    assert document["checks"][0]["figures"] == {"waits": 1, "ms": 2.5}


def test_every_check_has_a_name_of_its_own():
    names = [check.name for check in gpu.all_checks()]
    assert len(names) == len(set(names))


ALONE = """
import sys
for name in ("grpc", "grpc_health", "grpc_reflection", "redis", "fastapi", "starlette", "uvicorn",
             "prometheus_client", "opticnerve.pb", "pytest", "hypothesis"):
    sys.modules[name] = None
"""


@pytest.mark.process
@pytest.mark.slow
def test_make_gpu_needs_only_torch_and_transformers(tmp_path):
    """A Python that has torch is taken as it is; what it lacks is told, not silently left out."""
    (tmp_path / "sitecustomize.py").write_text(ALONE)
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", "ARGS=--dry --only stack"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stack in one process, 32 at once ... ok" in done.stdout
    assert "stack over services ... skipped" in done.stdout
    assert "this Python cannot run the services" in done.stdout
