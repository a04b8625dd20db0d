"""The sizes that engines are built for, where padding decides which bucket a picture needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from encoder_service.backends.base import Bucket
from encoder_service.engines.buckets import check_fit, choose_buckets, hold_all, largest_bucket
from encoder_service.pictures.largest_picture import largest_plan, permitted_patches
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import ConfigError, UnusableEngine
from opticnerve.media.plan import DEFAULT_MAX_PIXELS, Plan, Structure
from opticnerve.models.registry import load_tower, make_graph, make_layout
from tests.checkpoints import make_checkpoint
from tests.encoders import demo_layout
from tests.tower_graphs import WIDTH, SmallGraph, SmallTower, plan_of

PIXELS = 1280 * 784


class PaddedGraph(SmallGraph):
    """Pads tall pictures to twice their patches, as windows do that edges cut."""

    def patches(self, plan: Plan) -> int:
        return plan.num_patches * (2 if plan.grid.h > 2 * plan.grid.w else 1)


class FixedGraph(SmallGraph):
    fixed_patches = 64


@pytest.fixture
def graph() -> PaddedGraph:
    return PaddedGraph(SmallTower(WIDTH))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Layout and graph of a tower with windows."""
    path = make_checkpoint(
        "qwen2_5_vl",
        tmp_path_factory.mktemp("windows") / "model",
        max_pixels=PIXELS,
        vision={"window_size": 112},
    )
    checkpoint = Checkpoint.open(str(path), side="encoder")
    tower = load_tower(checkpoint, torch.float32, torch.device("cpu"))
    return make_layout(checkpoint), make_graph(checkpoint, tower)


def test_the_largest_bucket_holds_pictures_whose_windows_are_padded(
    windowed: tuple[Any, Any],
) -> None:
    layout, graph = windowed
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    bucket = largest_bucket(layout, graph, largest)
    strip = layout.plan(Structure("png", 4600, 448))
    assert graph.patches(strip) > permitted_patches(largest), "more than its patches say"
    for short in range(84, 1000, 28):
        long = min(PIXELS // short, 190 * short)
        for size in ((long, short), (short, long)):
            assert graph.patches(layout.plan(Structure("png", *size))) <= bucket
    chosen = choose_buckets("tensorrt", (), layout, graph, largest)
    assert chosen[-1].patches == bucket and hold_all(chosen, layout, graph, largest)
    smaller = (Bucket(permitted_patches(largest), 1),)
    assert not hold_all(smaller, layout, graph, largest), "torch is needed for the strip"


def test_torch_is_needed_where_padding_exceeds_the_buckets(graph: PaddedGraph) -> None:
    layout = demo_layout()
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    graph.device = torch.device("cuda")  # Of a CPU's limit the next test tells.
    needed = 2 * largest.num_patches
    assert largest_bucket(layout, graph, largest) >= needed
    assert not hold_all((Bucket(needed - 4, 1),), layout, graph, largest)
    assert hold_all((Bucket(math.ceil(1.1 * needed), 1),), layout, graph, largest)


def test_on_a_cpu_torch_takes_what_a_request_may_ask_for(graph: PaddedGraph) -> None:
    layout = demo_layout()
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    assert not hold_all((Bucket(1024, 1),), layout, graph, largest)
    assert hold_all((Bucket(2048, 1),), layout, graph, largest)
    fixed = FixedGraph(SmallTower(WIDTH))
    assert hold_all((Bucket(64, 1),), layout, fixed, largest)


def test_buckets_are_those_of_the_graph(graph: PaddedGraph) -> None:
    check_fit((Bucket(64, 1), Bucket(128, 1)), graph)
    with pytest.raises(UnusableEngine, match=r"buckets of \[64, 130\] patches, .* multiples of 4"):
        check_fit((Bucket(64, 1), Bucket(130, 1)), graph)
    fixed = FixedGraph(SmallTower(WIDTH))
    check_fit((Bucket(64, 3),), fixed)
    for buckets in ((Bucket(68, 1),), (Bucket(64, 1), Bucket(68, 1))):
        with pytest.raises(UnusableEngine, match="one of 64"):
            check_fit(buckets, fixed)


def test_too_many_buckets_are_refused(graph: PaddedGraph) -> None:
    layout = demo_layout()
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    with pytest.raises(ConfigError, match="up to 16 buckets"):
        choose_buckets("onnx", range(4, 100, 4), layout, graph, largest)
    fixed = FixedGraph(SmallTower(WIDTH))
    assert [b.patches for b in choose_buckets("onnx", (), layout, fixed, plan_of(64))] == [64]
