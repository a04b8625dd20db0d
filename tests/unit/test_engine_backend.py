"""The backend of engines: buckets, calls of several pictures, what lies beyond them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_service.backends.base import Bucket, Recovery
from encoder_service.backends.engine_backend import EngineBackend, OutputBuffers
from encoder_service.backends.onnx_runtime import OnnxRuntime
from encoder_service.backends.torch_backend import TorchBackend
from opticnerve.errors import InvalidRequest
from opticnerve.models.towers.export import export
from opticnerve.models.towers.graph import Tensors
from tests.preprocessors import mean_colour
from tests.tower_graphs import (
    BUCKETS,
    COLUMNS,
    MERGED,
    WIDTH,
    SmallGraph,
    SmallTower,
    check_rows,
    pictures,
    plan_of,
)


class EagerRuntime:
    """Implements ``EngineRuntime`` by the graph's own module; notes each call."""

    def __init__(self, graph: SmallGraph, buckets: Sequence[Bucket] = BUCKETS) -> None:
        self._graph, self._buckets = graph, buckets
        self._outputs = OutputBuffers(graph, buckets, torch.device("cpu"))
        self.calls: list[tuple[int, int]] = []  # (bucket's patches, pictures)
        self.closed = False
        self.entered, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, bucket: int, pictures: int, inputs: Tensors) -> Tensors:
        patches = self._buckets[bucket].patches
        self.calls.append((patches, pictures))
        self.entered.set()
        assert self.may_end.wait(60)
        outputs = self._outputs.views(pictures, patches)
        outputs["rows"].copy_(self._graph.module(**inputs)[0])
        return outputs

    def keep_kernels(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tower() -> SmallTower:
    return SmallTower(WIDTH)


@pytest.fixture
def graph(tower: SmallTower) -> SmallGraph:
    return SmallGraph(tower)


def torch_backend(tower: SmallTower) -> TorchBackend:
    return TorchBackend(tower, mean_colour, lambda plan, patches: plan)  # type: ignore[arg-type]


def backend_of(graph: SmallGraph, **options: Any) -> tuple[EngineBackend, EagerRuntime]:
    runtime = EagerRuntime(graph)
    return EngineBackend("eager", graph, BUCKETS, runtime, mean_colour, **options), runtime


def test_pictures_share_calls_by_bucket_and_come_back_in_order(
    tower: SmallTower, graph: SmallGraph
) -> None:
    backend, runtime = backend_of(graph)
    pixels, plans = pictures(8, 12, 4, 32, 8, 4, 16, 8)
    check_rows(backend.encode(pixels, plans), tower, pixels, plans)
    assert sorted(runtime.calls) == [(8, 2), (8, 3), (32, 1), (32, 2)]


def test_rows_stay_when_the_next_call_overwrites_the_buffers(graph: SmallGraph) -> None:
    backend, _ = backend_of(graph)
    first = backend.encode(*pictures(8))[0]["rows"]
    kept = first.clone()
    backend.encode(*pictures(8, 8, 8))
    assert torch.equal(first, kept)


def test_outputs_of_every_size_lie_in_the_same_memory(graph: SmallGraph) -> None:
    buffers = OutputBuffers(graph, BUCKETS, torch.device("cpu"))
    views = [buffers.views(n, bucket.patches)["rows"] for bucket in BUCKETS for n in (1, 2)]
    assert len({view.data_ptr() for view in views}) == 1
    assert views[-1].shape == (2, 32 // MERGED, COLUMNS)


def test_what_no_bucket_holds_goes_to_torch(tower: SmallTower, graph: SmallGraph) -> None:
    backend, runtime = backend_of(graph, beyond=torch_backend(tower))
    pixels, plans = pictures(36, 8, 40)
    got = backend.encode(pixels, plans)
    assert tower.calls == [2] and runtime.calls == [(8, 1)]
    check_rows(got, tower, pixels, plans)


def test_what_no_bucket_holds_is_refused_without_torch(graph: SmallGraph) -> None:
    backend, _ = backend_of(graph)
    with pytest.raises(InvalidRequest, match=r"36 patches.*takes up to 32"):
        backend.encode(*pictures(8, 36))
    assert backend.classify(InvalidRequest("no")) is Recovery.ISOLATE


def test_memory_that_runs_out_splits_the_batch(graph: SmallGraph) -> None:
    backend, _ = backend_of(graph)
    for text in ("Failed to allocate memory for requested buffer", "OutOfMemory: 3 bytes"):
        assert backend.classify(RuntimeError(text)) is Recovery.SPLIT


def test_an_encoder_takes_pictures_up_to_the_largest_bucket_or_torch_s_limit(
    tower: SmallTower, graph: SmallGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = backend_of(graph)
    capacity = alone.warm(plan_of(64), 0)
    assert (capacity.max_item_patches, capacity.max_batch_patches) == (32, 64)
    assert alone.warm(plan_of(32), 16).max_batch_patches == 16
    assert alone.warm(plan_of(32), 0).max_item_patches >= 32
    beyond = torch_backend(tower)
    monkeypatch.setattr(beyond, "_run_blank", lambda plan: None)
    with_torch, runtime = backend_of(graph, beyond=beyond)
    assert with_torch.warm(plan_of(64), 0).max_item_patches >= 64
    with_torch.close()
    assert runtime.closed


def test_closing_leaves_a_call_that_still_runs_its_memory(graph: SmallGraph) -> None:
    backend, runtime = backend_of(graph)
    runtime.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.encode, *pictures(8))
        assert runtime.entered.wait(60)
        backend.close()
        assert not runtime.closed
        runtime.may_end.set()
        assert len(call.result(60)) == 1
    backend.close()
    assert runtime.closed


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[SmallTower, SmallGraph, Path]]:
    tower = SmallTower(WIDTH)
    graph = SmallGraph(tower)
    path = tmp_path_factory.mktemp("engine") / "tower.onnx"
    export(graph, path)
    yield tower, graph, path


@pytest.mark.slow
def test_onnxruntime_runs_the_graph_in_place(
    exported: tuple[SmallTower, SmallGraph, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, graph, path = exported
    runtime = OnnxRuntime(path, graph, BUCKETS, 1)
    places = set()
    views = runtime._outputs.views
    monkeypatch.setattr(runtime._outputs, "views", lambda *size: note(places, views(*size)))
    backend = EngineBackend("onnx", graph, BUCKETS, runtime, mean_colour)
    pixels, plans = pictures(8, 12, 4, 32, 8, 4, 16, 8)
    check_rows(backend.encode(pixels, plans), tower, pixels, plans)
    assert len(places) == 1
    backend.close()
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.encode(pixels, plans)


def note(places: set[int], made: Tensors) -> Tensors:
    places.update(tensor.data_ptr() for tensor in made.values())
    return made
