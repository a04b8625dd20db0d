"""Writes a tower's graph as ONNX: one file for TensorRT, TensorRT for RTX and onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opticnerve.models.towers.graph import TowerGraph

OPSET = 23  # The first with RMSNormalization.
EXAMPLE_PICTURES, EXAMPLE_UNITS = 2, 3  # Above 1: torch.export takes a size of 1 for a constant.


def export(graph: TowerGraph, path: Path) -> None:
    """Writes ``graph`` to ``path`` in its own precision, with the weights beside it as
    ``<path>.data``. Needs the onnx and onnxscript packages; takes tens of seconds. Raises
    ValueError once the graph's module was released."""
    if graph.module is None:
        raise ValueError("the graph's module was released")
    patches = graph.fixed_patches or EXAMPLE_UNITS * graph.unit
    with _quiet_exporter():
        program = torch.onnx.export(
            graph.module,
            kwargs=graph.example(EXAMPLE_PICTURES, patches),
            dynamic_shapes=graph.dynamic_shapes(),
            input_names=list(graph.inputs),
            output_names=list(graph.output_names),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        program.save(path, external_data=True)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences the exporter's warnings about renamed inputs and missing torchvision."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
