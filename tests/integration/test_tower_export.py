"""Exported towers: onnxruntime computes the torch tower's rows, TensorRT for RTX builds engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder_service.backends.tensorrt_library import MODULES, TensorrtLibrary
from encoder_service.engines.tensorrt_builder import build_plan
from opticnerve.models.towers.export import export
from opticnerve.models.towers.graph import CLOSED, TowerGraph
from tests.graphs import BATCHES, FAMILIES_TO_EXPORT, Half, largest_difference, lowest_cosine

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow

Exported = tuple[Half, Path]

UNWANTED = {"Conv", "GatherND", "If", "Loop", "NonZero", "Resize", "Scan", "ScatterND", "Where"}


@pytest.fixture(scope="module")
def exported(
    random_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Exported]:
    """The vision half of a family in a precision, and its file; made once."""
    made: dict[tuple[str, str], Exported] = {}

    def make(family: str, dtype: str) -> Exported:
        if (family, dtype) not in made:
            half = Half.load(random_checkpoint(family), dtype)
            path = tmp_path_factory.mktemp(family) / "tower.onnx"
            export(half.graph, path)
            made[family, dtype] = half, path
        return made[family, dtype]

    return make


class Session:
    """An exported graph in onnxruntime."""

    def __init__(self, graph: TowerGraph, path: Path) -> None:
        self.graph = graph
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [each.name for each in self.session.get_inputs()] == list(graph.input_names)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs: list[Any] = self.session.run(list(self.graph.output_names), values)
        named = zip(self.graph.output_names, outputs, strict=True)
        return {name: torch.from_numpy(output) for name, output in named}


def check_parity(half: Half, path: Path, cosine: float, difference: float) -> None:
    run = Session(half.graph, path)
    for i, sizes in enumerate(BATCHES):
        pixels, plans = half.batch(sizes)
        outputs = run(half.graph.prepare(pixels, plans, half.bucket(plans, spare=i)))
        items, expected = half.graph.split(outputs, plans), half.tower.encode(pixels, plans)
        assert lowest_cosine(items, expected) >= cosine
        assert largest_difference(items, expected) <= difference


@pytest.mark.parametrize("family", FAMILIES_TO_EXPORT)
def test_float32_rows_are_the_towers(family: str, exported: Callable[[str, str], Exported]) -> None:
    """Of batches and buckets that were not traced."""
    half, path = exported(family, "float32")
    check_parity(half, path, 0.99999, 1e-4)


def test_float16_rows_are_the_towers(exported: Callable[[str, str], Exported]) -> None:
    half, path = exported("qwen2_5_vl", "float16")
    check_parity(half, path, 0.9999, 0.01)


@pytest.mark.parametrize("family", FAMILIES_TO_EXPORT)
def test_padding_does_not_leak(family: str, exported: Callable[[str, str], Exported]) -> None:
    half, path = exported(family, "float32")
    if half.graph.fixed_patches:
        pytest.skip("pictures of one size are not padded")
    run = Session(half.graph, path)
    pixels, plans = half.batch(BATCHES[1])
    inputs = half.graph.prepare(pixels, plans, half.bucket(plans))
    items = half.graph.split(run(inputs), plans)
    is_padding = (inputs["key_mask"].flatten(1) == CLOSED).numpy()
    for name in set(inputs) - {"key_mask", "window_mask"}:
        values = inputs[name].numpy()
        values[is_padding] = np.random.default_rng(0).normal(size=values[is_padding].shape) * 100
    others = half.graph.split(run(inputs), plans)
    assert largest_difference(others, items) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES_TO_EXPORT)
def test_the_graph_is_dense_layers_alone(
    family: str, exported: Callable[[str, str], Exported]
) -> None:
    _, path = exported(family, "float32")
    nodes = onnx.load(path, load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes)
    assert not UNWANTED & counts.keys()
    assert counts["Cast"] == 0, "everything has the type it is computed in"
    assert len(nodes) <= 32 * counts["Softmax"] + 24, counts


def test_only_rotations_are_cast_in_half_precision(
    exported: Callable[[str, str], Exported],
) -> None:
    _, path = exported("qwen2_5_vl", "float16")
    counts = Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)
    assert counts["Cast"] == 2 * counts["Softmax"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_an_engine_is_built(
    family: str, exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    """Of patches, and with DeepStack levels; those of windows and of squares are built from
    checkpoints, in half precision, where engines are tested."""
    if not any(map(find_spec, MODULES["tensorrt_rtx"])):
        pytest.skip("TensorRT for RTX is not installed")
    half, path = exported(family, "float32")
    profiles = []
    for patches in (16 * half.graph.unit, 64 * half.graph.unit):
        least, most = half.graph.shapes(1, patches), half.graph.shapes(4, patches)
        profiles.append({name: (least[name], most[name]) for name in half.graph.input_names})
    plan = tmp_path / "tower.plan"
    build_plan(TensorrtLibrary("tensorrt_rtx"), path, plan, profiles, ("8.9", "12.0"), None)
    assert plan.stat().st_size > 10**5
