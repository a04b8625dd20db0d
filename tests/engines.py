"""Engines of small checkpoints, built in this process."""

from __future__ import annotations

from pathlib import Path

from encoder_service.engines.build import BuildSettings, EngineBuild
from encoder_service.engines.sidecar import Sidecar
from opticnerve.config import ModelConfig

# A family of each kind of graph: squares of one size, windows, patches.
GRAPHS = ("llava", "qwen2_5_vl", "qwen2_vl")


def build_engine(
    model: Path | None,
    directory: Path,
    backend: str = "onnx",
    precision: str = "auto",
    buckets: tuple[int, ...] = (),
    capabilities: tuple[str, ...] = (),
) -> Sidecar:
    config = ModelConfig(model=None if model is None else str(model), device="cpu", threads=1)
    settings = BuildSettings(config, backend, precision, buckets, capabilities)
    return EngineBuild(settings).run(directory)
