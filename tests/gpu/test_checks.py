"""The checks of ``make gpu``: on CUDA where there is one, and each one's CPU twin everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.__main__ import Check, all_checks, make_room
from bench.gpu.checks import (
    EXACT,
    CheckFailed,
    Skipped,
    decoder_attention,
    encoder_rows,
    prefix_equals_cold,
    split_equals_whole,
    tower_attention,
)
from bench.gpu.models import Room
from llm_service.device.attention.sdpa import SdpaBackend
from opticnerve.models.towers import varlen

pytestmark = pytest.mark.slow
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
ON_CUDA = pytest.param(False, id="cuda", marks=[pytest.mark.gpu, NO_CUDA])


@pytest.fixture(scope="module", params=[pytest.param(True, id="cpu-twin"), ON_CUDA])
def room(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Room]:
    threads = torch.get_num_threads()
    made = make_room(request.param, tmp_path_factory.mktemp("gpu"))
    yield made
    made.release()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.name)
def test_check(room: Room, check: Check) -> None:
    torch.manual_seed(0)
    try:
        seen = check.run(room)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert seen.text and seen.figures


# ---- the checks see what is wrong


def test_a_tower_that_attends_wrongly_is_seen(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    right = varlen._attend_by_runs
    monkeypatch.setattr(varlen, "_attend_by_runs", lambda *args: right(*args) * 1.02)
    with pytest.raises(CheckFailed, match="float32"):
        tower_attention(room)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_decoder_that_attends_wrongly_is_seen(
    room: Room, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Masks that hide nothing; and what is not finite."""
    right = SdpaBackend._additive
    monkeypatch.setattr(
        SdpaBackend, "_additive", lambda *args: torch.full_like(right(*args), value)
    )
    with pytest.raises(CheckFailed, match="decode ragged float32"):
        decoder_attention(room)


def test_rows_that_are_wrong_are_seen(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = room.split("demo", EXACT).backend
    right = backend.encode

    def wrong(*args: Any) -> Any:
        return [{"rows": item["rows"] * 1.05} for item in right(*args)]

    monkeypatch.setattr(backend, "encode", wrong)
    with pytest.raises(CheckFailed):
        encoder_rows(room, "demo", EXACT)
    with pytest.raises(CheckFailed):
        split_equals_whole(room, "demo", EXACT)


def test_pages_that_are_not_found_again_are_seen(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = room.split("demo", EXACT)
    right = split.engine
    monkeypatch.setattr(split, "engine", lambda: right(prefix_caching=False))
    with pytest.raises(CheckFailed, match="nothing in pages"):
        prefix_equals_cold(room, "demo", EXACT)


def test_a_checkpoint_is_made_once(room: Room) -> None:
    path: Path = room.checkpoint("llava")
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert (room.checkpoint("llava") / "model.safetensors").stat().st_mtime_ns == made
