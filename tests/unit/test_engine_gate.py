"""The accuracy gate: which pictures it tries, what it measures, and what it refuses."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_service.backends.base import Bucket
from encoder_service.engines import gate
from encoder_service.engines.sidecar import Parity
from encoder_service.pictures.largest_picture import largest_plan
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import UnusableEngine
from opticnerve.media.plan import DEFAULT_MAX_PIXELS, Overrides, Structure
from opticnerve.models.registry import make_preprocessor
from opticnerve.tensors.distance import LIMITS, Distance
from tests.encoders import demo_layout
from tests.tower_graphs import SmallGraph, SmallTower

BUCKETS = (Bucket(64, 4), Bucket(128, 2), Bucket(204, 1))
WIDTH = 14 * 14 * 3


@pytest.fixture(scope="module")
def tower() -> SmallTower:
    return SmallTower(WIDTH)


@pytest.fixture(scope="module")
def probes(tower: SmallTower) -> list[gate.Probe]:
    layout = demo_layout()
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    preprocess = make_preprocessor(Checkpoint.open(None), layout)
    return gate.make_probes(layout, preprocess, SmallGraph(tower), BUCKETS, largest)


@pytest.fixture(scope="module")
def rows(tower: SmallTower, probes: list[gate.Probe]) -> gate.Rows:
    return dict(gate.torch_rows(tower, probes))


def test_every_bucket_is_tried_nearly_full_and_nearly_empty(probes: list[gate.Probe]) -> None:
    for i, bucket in enumerate(BUCKETS):
        below = BUCKETS[i - 1].patches if i else 0
        full, empty = (probe.plan.num_patches for probe in probes if probe.bucket == i)
        assert below < empty <= full <= bucket.patches
        assert full * 1.25 > min(bucket.patches, 192)


def test_a_bucket_that_no_picture_uses_has_no_probes(tower: SmallTower) -> None:
    layout = demo_layout()
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    preprocess = make_preprocessor(Checkpoint.open(None), layout)
    unused = (Bucket(204, 1), Bucket(1024, 1))
    probes = gate.make_probes(layout, preprocess, SmallGraph(tower), unused, largest)
    assert {probe.bucket for probe in probes} == {0}
    with pytest.raises(UnusableEngine, match=r"buckets \[1024\], so their rows cannot be measured"):
        gate.require_probes(probes, unused)
    gate.require_probes(probes, unused[:1])


def test_probe_pictures_are_the_same_everywhere() -> None:
    plan = demo_layout().plan(Structure("png", 112, 84), Overrides())
    image = gate.probe_image(plan, 1)
    assert image.size == (112, 84) and image.mode == "RGB"
    assert hashlib.sha256(image.tobytes()).hexdigest() == (
        "f1772396b7db6491d68236e0abd5be54592d0ecb3e8c8cbe54daced59a184824"
    )


def test_equal_rows_have_no_distance(
    tower: SmallTower, probes: list[gate.Probe], rows: gate.Rows
) -> None:
    for parity in gate.measure(tower.encode, probes, BUCKETS, rows):
        assert parity.distance.cosine > 0.9999999 and parity.distance.difference == 0
        assert parity.distance.largest > 0
        gate.require([parity], "float32")


def test_recorded_rows_that_are_not_finite_are_refused(
    tower: SmallTower, probes: list[gate.Probe], rows: gate.Rows
) -> None:
    for value in (math.nan, math.inf):
        broken = {**rows, "0.rows": torch.full_like(rows["0.rows"], value)}
        parity = gate.measure(tower.encode, probes, BUCKETS, broken)
        with pytest.raises(UnusableEngine, match="64 patches: numbers that are not finite"):
            gate.require(parity, "bfloat16")


def wrong(tower: SmallTower, change: Any) -> gate.Encode:
    def encode(pixels: Any, plans: Any) -> Any:
        return [{"rows": change(item["rows"])} for item in tower.encode(pixels, plans)]

    return encode


def one_row(value: float) -> Any:
    def change(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[-1] *= value
        return rows

    return change


@pytest.mark.parametrize(
    "change", [one_row(-1.0), one_row(2.0), one_row(math.nan), lambda rows: rows.roll(1, 0)],
    ids=["cosine", "scale", "nan", "order"],
)  # fmt: skip
@pytest.mark.parametrize("precision", LIMITS)
def test_one_wrong_row_is_refused_with_the_figure(
    tower: SmallTower, probes: list[gate.Probe], rows: gate.Rows, change: Any, precision: str
) -> None:
    parity = gate.measure(wrong(tower, change), probes, BUCKETS, rows)
    with pytest.raises(
        UnusableEngine,
        match=r"128 patches: (cosine .* largest difference|numbers that are not finite)",
    ):
        gate.require(parity, precision)


def test_the_limits_are_those_of_the_precision() -> None:
    near = Parity(64, Distance(0.9995, 0.01, 1.0))
    gate.require([near], "float16")
    gate.require([near], "bfloat16")
    with pytest.raises(UnusableEngine, match=r"cosine 0\.9995000 \(at least 0\.99999\)"):
        gate.require([near], "float32")
    with pytest.raises(UnusableEngine, match="256 patches"):
        gate.require([near, Parity(256, Distance(0.9989, 0.01, 1.0))], "float16")


def test_rows_of_another_shape_are_refused(
    tower: SmallTower, probes: list[gate.Probe], rows: gate.Rows
) -> None:
    with pytest.raises(UnusableEngine, match="shape"):
        gate.measure(wrong(tower, lambda rows: rows[1:]), probes, BUCKETS, rows)
    with pytest.raises(UnusableEngine, match="None"):
        gate.measure(tower.encode, probes, BUCKETS, {})


def test_recorded_rows_are_read_back(tmp_path: Path, rows: gate.Rows) -> None:
    gate.write_rows(tmp_path / "rows", rows)
    read = gate.read_rows(tmp_path / "rows")
    assert read.keys() == rows.keys()
    assert all(torch.equal(read[name], rows[name]) for name in rows)
    (tmp_path / "rows").write_bytes(b"no rows")
    with pytest.raises(UnusableEngine, match="build the engine again"):
        gate.read_rows(tmp_path / "rows")
