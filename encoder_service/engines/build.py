"""Builds an engine of a checkpoint's tower into a directory."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from encoder_service.backends.base import Bucket
from encoder_service.backends.device import release_cached_memory
from encoder_service.backends.engine_backend import EngineBackend
from encoder_service.engines import gate, opening
from encoder_service.engines.buckets import choose_buckets, largest_bucket
from encoder_service.engines.output import replacing
from encoder_service.engines.sidecar import (
    FORMAT,
    GRAPH_FILE,
    PLAN_FILE,
    PROBES_FILE,
    Sidecar,
    describe_files,
)
from encoder_service.engines.tensorrt_builder import Profile, build_plan
from encoder_service.pictures.largest_picture import largest_plan
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.digests import cache_directory
from opticnerve.checkpoints.loader import DTYPES, resolve_device, resolve_dtype
from opticnerve.config import ModelConfig
from opticnerve.errors import ConfigError
from opticnerve.extras import require_extra
from opticnerve.media.plan import DEFAULT_MAX_PIXELS
from opticnerve.models.registry import load_tower, make_graph, make_layout, make_preprocessor
from opticnerve.models.towers.export import export
from opticnerve.tensors.dtypes import dtype_name

if TYPE_CHECKING:
    from encoder_service.backends.tensorrt_library import TensorrtLibrary
    from opticnerve.models.towers.graph import TowerGraph

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What ``opticnerve engine build`` was asked for."""

    model: ModelConfig
    backend: str
    precision: str  # "auto", or as ``--dtype`` has it.
    buckets: tuple[int, ...]  # (): the default.
    capabilities: tuple[str, ...]  # (): that of the device.


class EngineBuild:
    """One build. ``run`` writes the directory."""

    def __init__(self, settings: BuildSettings) -> None:
        """Raises StartupError for what cannot be built."""
        self.settings = settings
        require_extra("engine", "`opticnerve engine build`")
        self._library = opening.load_library(settings.backend)
        self.checkpoint = Checkpoint.configured(settings.model, "encoder")
        self._device = resolve_device(settings.model.device)
        self._capabilities = _capabilities(settings, self._library, self._device)
        self.precision = _precision(settings, self.checkpoint, self._device)
        self._layout = make_layout(self.checkpoint)
        self._preprocess = make_preprocessor(self.checkpoint, self._layout)
        self._largest = largest_plan(self._layout, DEFAULT_MAX_PIXELS)

    def run(self, directory: Path) -> Sidecar:
        """Builds into ``directory``, which is replaced at the end if it holds an engine. Raises
        StartupError; UnusableEngine for an engine that fails the gate."""
        torch.set_num_threads(self.settings.model.num_threads)
        with replacing(directory) as made:
            graph, buckets, probes = self._record(made)
            self._export(graph, buckets, made)
            sidecar = self._describe(made, buckets, probes)
            if self._runs_here():
                sidecar = self._measure(made, sidecar, graph, probes)
            sidecar.write(made)
        return sidecar

    def _record(self, made: Path) -> tuple[TowerGraph, tuple[Bucket, ...], list[gate.Probe]]:
        """Writes the torch tower's rows of the probes, in float32. Returns the tower's graph in the
        engine's precision, the buckets and the probes."""
        log.info("loading %s", self.checkpoint.name)
        tower = load_tower(self.checkpoint, torch.float32, self._device)
        graph = make_graph(self.checkpoint, tower)
        buckets, probes = self._probes(graph)
        rows = gate.torch_rows(tower, probes)
        shown = tqdm(rows, "torch's rows of probe pictures", unit="picture", leave=False)
        gate.write_rows(made / PROBES_FILE, dict(shown))
        if self.precision != dtype_name(torch.float32):
            del tower, graph, rows, shown
            release_cached_memory(self._device)
            tower = load_tower(self.checkpoint, DTYPES[self.precision], self._device)
            graph = make_graph(self.checkpoint, tower)
        return graph, buckets, probes

    def _probes(self, graph: TowerGraph) -> tuple[tuple[Bucket, ...], list[gate.Probe]]:
        """The buckets that pictures of this checkpoint use, and their probes."""
        asked, layout, largest = self.settings.buckets, self._layout, self._largest
        wanted = choose_buckets(self.settings.backend, asked, layout, graph, largest)
        make = partial(gate.make_probes, layout, self._preprocess, graph)
        used = {probe.bucket for probe in make(wanted, largest)}
        buckets = tuple(bucket for i, bucket in enumerate(wanted) if i in used)
        if not buckets or (asked and len(buckets) < len(wanted)):
            unused = [bucket.patches for bucket in wanted if bucket not in buckets]
            raise ConfigError(
                f"no picture of this checkpoint would use buckets {unused}; leave them out: one of "
                f"{largest_bucket(layout, graph, largest)} patches holds the largest picture",
                param="buckets",
            )
        return buckets, make(buckets, largest)

    def _export(self, graph: TowerGraph, buckets: Sequence[Bucket], made: Path) -> None:
        """Writes the engine's files, and releases the graph as soon as it is exported."""
        log.info("exporting the tower in %s", self.precision)
        if self._library is None:
            _export_quietly(graph, made / GRAPH_FILE)
            return
        with tempfile.TemporaryDirectory(dir=made) as scratch:
            path = Path(scratch) / GRAPH_FILE
            _export_quietly(graph, path)
            release_cached_memory(self._device)
            self._build_plan(self._library, graph, buckets, path, made / PLAN_FILE)

    def _build_plan(
        self,
        library: TensorrtLibrary,
        graph: TowerGraph,
        buckets: Sequence[Bucket],
        path: Path,
        plan: Path,
    ) -> None:
        profiles: list[Profile] = []
        for bucket in buckets:
            smallest = graph.shapes(1, bucket.patches)
            largest = graph.shapes(bucket.pictures, bucket.patches)
            profiles.append({name: (smallest[name], largest[name]) for name in largest})
        timing = cache_directory() / "timing" / f"{library.name}-{library.version}.cache"
        build_plan(library, path, plan, profiles, self._capabilities, timing)

    def _describe(
        self, made: Path, buckets: tuple[Bucket, ...], probes: Sequence[gate.Probe]
    ) -> Sidecar:
        backend, library = self.settings.backend, self._library
        return Sidecar(
            model=self.settings.model.model,
            revision=self.settings.model.revision,
            family=self.checkpoint.family,
            fingerprint=opening.engine_fingerprint(self.checkpoint, backend, self.precision),
            backend=backend,
            precision=self.precision,
            buckets=buckets,
            library="onnxruntime" if library is None else library.name,
            library_version=opening.library_version(backend, library),
            compute_capabilities=self._capabilities,
            made_by=opening.MADE_BY,
            probes=gate.digests(probes),
            files=describe_files(made),
            parity=None,
            format=FORMAT,
        )

    def _runs_here(self) -> bool:
        return (
            self._library is None or opening.device_capability(self._device) in self._capabilities
        )

    def _measure(
        self, made: Path, sidecar: Sidecar, graph: TowerGraph, probes: Sequence[gate.Probe]
    ) -> Sidecar:
        """The sidecar with what was measured. Raises UnusableEngine unless the engine passes."""
        log.info("measuring the engine")
        threads = self.settings.model.num_threads
        runtime = opening.open_runtime(made, sidecar, self._library, graph, threads)
        backend = EngineBackend(sidecar.backend, graph, sidecar.buckets, runtime, self._preprocess)
        with contextlib.closing(backend):
            rows = gate.read_rows(made / PROBES_FILE)
            return replace(sidecar, parity=opening.check_rows(sidecar, backend, probes, rows))


def _export_quietly(graph: TowerGraph, path: Path) -> None:
    """Exports the graph and releases it. Silences the exporter, which logs dozens of lines about
    its own steps."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(graph, path)
    finally:
        logging.disable(disabled)
    graph.release()


def _precision(settings: BuildSettings, checkpoint: Checkpoint, device: torch.device) -> str:
    """The precision to build in. Raises ConfigError if the backend does not compute in it."""
    if settings.precision != "auto":
        precision = settings.precision
    elif settings.backend == "onnx":
        precision = "float32"
    else:
        target = torch.device("cuda") if device.type == "cpu" else device
        precision = dtype_name(resolve_dtype("auto", checkpoint, target))
    if settings.backend == "onnx" and precision == "bfloat16":
        raise ConfigError(
            "onnxruntime does not compute in bfloat16 on a CPU; use --precision fp32 or fp16",
            param="precision",
        )
    return precision


def _capabilities(
    settings: BuildSettings, library: TensorrtLibrary | None, device: torch.device
) -> tuple[str, ...]:
    """The compute capabilities to build for. Raises ConfigError."""
    here, wanted = opening.device_capability(device), settings.capabilities
    if library is None:
        if wanted:
            raise ConfigError(
                "--backend onnx runs on a CPU, which has no compute capability; leave "
                "--compute-capability out",
                param="compute_capability",
            )
        return ()
    if library.name == "tensorrt" and (here is None or wanted not in ((), (here,))):
        raise ConfigError(
            f"TensorRT builds only for this machine's device ({here or 'none'}); build on the "
            "machine that serves",
            param="compute_capability",
        )
    if not wanted and here is None:
        raise ConfigError(
            "there is no CUDA device here: say what to build for, such as "
            "--compute-capability 8.9,12.0",
            param="compute_capability",
        )
    found = wanted or (str(here),)
    if library.name == "tensorrt_rtx":
        for capability in found:
            library.compute_capability(capability)
    return found
