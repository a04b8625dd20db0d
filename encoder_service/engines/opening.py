"""Opens an engine for serving: checks what it is, loads it, and measures it on this device."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import torch

import opticnerve
from encoder_service.backends.device import release_cached_memory
from encoder_service.backends.engine_backend import (
    EngineBackend,
    EngineRuntime,
    faults_refuse_the_engine,
)
from encoder_service.backends.tensorrt_library import TensorrtLibrary
from encoder_service.backends.torch_backend import TorchBackend
from encoder_service.engines import gate
from encoder_service.engines.buckets import check_fit, hold_all
from encoder_service.engines.sidecar import GRAPH_FILE, PLAN_FILE, PROBES_FILE, Parity, Sidecar
from encoder_service.pictures.largest_picture import largest_plan, shrink
from opticnerve.checkpoints.digests import cache_directory
from opticnerve.checkpoints.fingerprint import encoder_fingerprint
from opticnerve.checkpoints.loader import DTYPES, resolve_device
from opticnerve.config import ModelConfig
from opticnerve.errors import ConfigError, UnusableEngine
from opticnerve.extras import require_extra
from opticnerve.media.plan import DEFAULT_MAX_PIXELS
from opticnerve.models.registry import load_tower, make_graph, make_layout, make_preprocessor

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import Layout
    from opticnerve.models.towers.graph import TowerGraph

log = logging.getLogger(__name__)

MADE_BY = f"OpticNerve {opticnerve.__version__} with Pillow {PIL.__version__}"


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An engine that may be served."""

    sidecar: Sidecar
    layout: Layout
    backend: EngineBackend
    probes: Sequence[gate.Probe]


def open_engine(
    directory: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    with_torch: bool,
    audited: bool = False,
) -> OpenEngine:
    """The engine of ``directory`` for ``checkpoint``, on the device of ``config``.

    ``with_torch``: torch encodes what no bucket holds. The tower's weights are kept for it where
    there are such pictures, or where rows are ``audited``. Raises UnusableEngine for an engine
    that is stale, foreign, damaged or inaccurate, with the command that builds it again;
    ConfigError for a device or a library that is not there.
    """
    sidecar = Sidecar.read(directory)
    device = engine_device(sidecar.backend, config.device)
    library = load_library(sidecar.backend)
    _check(directory, sidecar, checkpoint, library, device, config)
    layout = make_layout(checkpoint)
    preprocess = make_preprocessor(checkpoint, layout)
    tower = load_tower(checkpoint, DTYPES[sidecar.precision], device)
    graph = make_graph(checkpoint, tower)
    check_fit(sidecar.buckets, graph)
    largest = largest_plan(layout, DEFAULT_MAX_PIXELS)
    probes = gate.make_probes(layout, preprocess, graph, sidecar.buckets, largest)
    gate.require_probes(probes, sidecar.buckets)
    beyond = None
    if with_torch and (audited or not hold_all(sidecar.buckets, layout, graph, largest)):
        beyond = TorchBackend(tower, preprocess, partial(shrink, layout))
    graph.release()
    del tower
    release_cached_memory(device)
    runtime = open_runtime(directory, sidecar, library, graph, config.num_threads)
    backend = EngineBackend(sidecar.backend, graph, sidecar.buckets, runtime, preprocess, beyond)
    try:
        _check_recorded(directory, sidecar, backend, probes, config)
    except BaseException:
        backend.close()
        raise
    return OpenEngine(sidecar, layout, backend, probes)


def _check_recorded(
    directory: Path,
    sidecar: Sidecar,
    backend: EngineBackend,
    probes: Sequence[gate.Probe],
    config: ModelConfig,
) -> None:
    """Raises UnusableEngine unless the engine's rows are near the recorded ones. If those were made
    from other pixels than the probes made here, the error says so."""
    rows = gate.read_rows(directory / PROBES_FILE)
    try:
        check_rows(sidecar, backend, probes, rows)
    except UnusableEngine as error:
        if gate.digests(probes) == sidecar.probes:
            raise
        capability = device_capability(torch.device(backend.device))
        raise UnusableEngine(
            f"the engine in {directory} cannot be measured: its probe pictures were made by "
            f"{sidecar.made_by}, and {MADE_BY} makes other pixels of them. Build it again: "
            f"{sidecar.rebuild_command(directory, capability, config)}"
        ) from error


def check_engine(
    directory: Path, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[Sidecar, tuple[Parity, ...]]:
    """The engine's sidecar, and how near its rows are to the torch tower's, which encodes the
    probes again. Raises what ``open_engine`` raises."""
    engine = open_engine(directory, checkpoint, config, with_torch=False)
    with contextlib.closing(engine.backend):
        tower = load_tower(checkpoint, torch.float32, engine.backend.device)
        rows = dict(gate.torch_rows(tower, engine.probes))
        return engine.sidecar, check_rows(engine.sidecar, engine.backend, engine.probes, rows)


def check_rows(
    sidecar: Sidecar, backend: EngineBackend, probes: Sequence[gate.Probe], rows: gate.Rows
) -> tuple[Parity, ...]:
    """How near the engine's rows of the probes are to ``rows``. Raises UnusableEngine unless they
    are as near as they should be."""
    with faults_refuse_the_engine():
        parity = gate.measure(backend.encode, probes, sidecar.buckets, rows)
    for each in parity:
        log.info("engine: %s", each.describe(sidecar.precision))
    gate.require(parity, sidecar.precision)
    return parity


def _check(
    directory: Path,
    sidecar: Sidecar,
    checkpoint: Checkpoint,
    library: TensorrtLibrary | None,
    device: torch.device,
    config: ModelConfig,
) -> None:
    """Raises UnusableEngine for an engine that is stale, foreign or damaged."""
    capability = device_capability(device)
    found = [
        *sidecar.obstacles(
            library_version=library_version(sidecar.backend, library),
            fingerprint=engine_fingerprint(checkpoint, sidecar.backend, sidecar.precision),
            capability=capability,
        )
    ] or [*sidecar.damage(directory)]
    if found:
        raise UnusableEngine(
            f"the engine in {directory} cannot be served: {'; '.join(found)}. Build it again: "
            f"{sidecar.rebuild_command(directory, capability, config)}"
        )


# ---- what engines run on


def engine_device(backend: str, device: str) -> torch.device:
    """The device for ``--device``. Raises ConfigError if the backend cannot run on it."""
    resolved = resolve_device("cpu" if device == "auto" and backend == "onnx" else device)
    needed = "cpu" if backend == "onnx" else "cuda"
    if resolved.type != needed:
        raise ConfigError(
            f"the backend {backend} runs on {needed}, but the device is {resolved}; choose another "
            "with --device",
            param="device",
        )
    return resolved


def device_capability(device: torch.device) -> str | None:
    """The compute capability, such as "8.9"; None for a CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def load_library(backend: str) -> TensorrtLibrary | None:
    """The TensorRT library of a backend; None for onnxruntime. Raises StartupError if it is not
    installed."""
    if backend != "onnx":
        return TensorrtLibrary(backend)
    require_extra("onnx", "--backend onnx")
    return None


def library_version(backend: str, library: TensorrtLibrary | None) -> str:
    if library is not None:
        return library.version
    from encoder_service.backends.onnx_runtime import VERSION  # Loads an optional package.

    return VERSION


def engine_fingerprint(checkpoint: Checkpoint, backend: str, precision: str) -> str:
    """The fingerprint of an encoder that serves ``checkpoint`` with such an engine."""
    return encoder_fingerprint(checkpoint, DTYPES[precision], backend, precision)


def open_runtime(
    directory: Path,
    sidecar: Sidecar,
    library: TensorrtLibrary | None,
    graph: TowerGraph,
    threads: int,
) -> EngineRuntime:
    """Loads an engine's file. Raises UnusableEngine."""
    if library is None:
        from encoder_service.backends.onnx_runtime import OnnxRuntime

        with faults_refuse_the_engine():
            return OnnxRuntime(directory / GRAPH_FILE, graph, sidecar.buckets, threads)
    from encoder_service.backends.tensorrt_runtime import TensorrtRuntime

    names = (sidecar.files[PLAN_FILE].sha256, device_capability(graph.device), driver_version())
    kernels = cache_directory() / "kernels" / f"{'-'.join(map(str, names))}.cache"
    with faults_refuse_the_engine():
        return TensorrtRuntime(library, directory / PLAN_FILE, graph, sidecar.buckets, kernels)


def driver_version() -> str:
    """The newest CUDA version that NVIDIA's driver supports, such as "13010"; "0" without one."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return str(version.value)
