"""Builds a plan of TensorRT or TensorRT for RTX from an exported tower."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from encoder_service.backends.tensorrt_library import TensorrtLibrary
from opticnerve.errors import UnusableEngine
from opticnerve.replace_file import replace_file

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape]]
"""The smallest and the largest shape of each input; the engine is tuned for the largest."""


def build_plan(
    library: TensorrtLibrary,
    graph: Path,
    plan: Path,
    profiles: Sequence[Profile],
    capabilities: Sequence[str],
    timing: Path | None,
) -> None:
    """Writes ``plan``, an engine of the ONNX file ``graph`` with one optimization profile for each
    of ``profiles``.

    ``capabilities``: compute capabilities that TensorRT for RTX builds for, on a machine without
    such a device; TensorRT builds for the device that is there. ``timing``: a file that keeps what
    TensorRT measured for the next build. Raises UnusableEngine, which names the node and the
    reason where the library does.
    """
    library.errors.clear()
    builder = library.module.Builder(library.logger)
    network = _parse(library, builder, graph)
    config = builder.create_builder_config()
    if library.name == "tensorrt_rtx":
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(library.compute_capability(capability), i)
    for profile in profiles:
        if config.add_optimization_profile(_make_profile(builder, profile)) < 0:
            raise _refusal(library)
    cache = _open_cache(config, timing) if library.name == "tensorrt" and timing else None
    with tqdm(desc=f"building with {library.name}", unit="step", leave=False) as bar:
        config.progress_monitor = _make_monitor(library.module, bar)
        built = builder.build_serialized_network(network, config)
    if built is None:
        raise _refusal(library)
    plan.write_bytes(memoryview(built))
    if cache is not None and timing is not None:
        replace_file(timing, bytes(cache.serialize()))


def _refusal(library: TensorrtLibrary) -> UnusableEngine:
    return UnusableEngine(
        f"{library.name} {library.version} does not build this tower: {library.take_errors()}"
    )


def _parse(library: TensorrtLibrary, builder: Any, graph: Path) -> Any:
    """The network of an ONNX file, strongly typed: it computes in the types of the graph."""
    typed = library.module.NetworkDefinitionCreationFlag
    flags = 1 << int(typed.STRONGLY_TYPED) if hasattr(typed, "STRONGLY_TYPED") else 0
    network = builder.create_network(flags)
    parser = library.module.OnnxParser(network, library.logger)
    if parser.parse_from_file(str(graph)):
        return network
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    reasons = "; ".join(
        f"node {error.node_name() or error.node()} ({error.node_operator()}): {error.desc()}"
        for error in found
    )
    raise UnusableEngine(
        f"{library.name} {library.version} cannot take this tower: "
        f"{reasons or library.take_errors()}"
    )


def _make_profile(builder: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, (smallest, largest) in profile.items():
        made.set_shape(name, smallest, largest, largest)
    return made


def _open_cache(config: Any, timing: Path) -> Any:
    data = b""
    with contextlib.suppress(OSError):
        data = timing.read_bytes()
    cache = config.create_timing_cache(data)
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _make_monitor(module: Any, bar: Any) -> Any:
    class BuildMonitor(module.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phase's steps, and the name of the innermost phase."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._outermost = ""

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self._outermost = phase
                bar.reset(steps)
            bar.set_postfix_str(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._outermost:
                bar.update(1)
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return BuildMonitor()
