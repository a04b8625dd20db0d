"""Runs an engine of TensorRT or TensorRT for RTX on a CUDA device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from encoder_service.backends.base import Bucket
from encoder_service.backends.engine_backend import OutputBuffers
from encoder_service.backends.tensorrt_library import TensorrtLibrary
from opticnerve.errors import UnusableEngine
from opticnerve.replace_file import replace_file

if TYPE_CHECKING:
    from opticnerve.models.towers.graph import Tensors, TowerGraph

log = logging.getLogger(__name__)


class TensorrtRuntime:
    """Implements ``EngineRuntime`` with one execution context per bucket. All contexts share a
    stream, a buffer for activations and one for outputs. Inputs are read from torch's memory.

    ``kernels``: a file that keeps the kernels that TensorRT for RTX compiles on the device for the
    next start; None: they are not kept.
    """

    def __init__(
        self,
        library: TensorrtLibrary,
        plan: Path,
        graph: TowerGraph,
        buckets: Sequence[Bucket],
        kernels: Path | None = None,
    ) -> None:
        """Raises UnusableEngine for a plan that the library does not load on this device."""
        self._library = library
        self._buckets = buckets
        self._kernels = kernels
        self._device = graph.device
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)
            self._engine: Any = self._load(plan)
            if self._engine.num_optimization_profiles != len(buckets):
                raise UnusableEngine(
                    f"{plan} has {self._engine.num_optimization_profiles} profiles for "
                    f"{len(buckets)} buckets; build the engine again"
                )
            self._outputs: Any = OutputBuffers(graph, buckets, self._device)
            self._activations: Any = torch.empty(
                max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device=self._device
            )
            self._settings = self._make_settings()
            self._contexts = [self._make_context(i) for i in range(len(buckets))]

    def _load(self, plan: Path) -> Any:
        # Kept alive: an engine uses the runtime that loaded it.
        self._runtime = self._library.module.Runtime(self._library.logger)
        engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise UnusableEngine(
                f"{self._library.name} {self._library.version} does not load {plan}: "
                f"{self._library.take_errors()}"
            )
        return engine

    def _make_settings(self) -> Any:
        """Settings of contexts that use memory given to them and share a cache of kernels."""
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        self._cache = None
        if self._kernels is not None and hasattr(settings, "create_runtime_cache"):
            self._cache = settings.create_runtime_cache()
            with contextlib.suppress(OSError):
                self._cache.deserialize(self._kernels.read_bytes())
            settings.set_runtime_cache(self._cache)
        return settings

    def _make_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._settings)
        if context is None:
            raise UnusableEngine(f"{self._library.name}: {self._library.take_errors()}")
        context.set_device_memory(self._activations.data_ptr(), self._activations.nbytes)
        if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise UnusableEngine(
                f"{self._library.name} does not take profile {profile}: "
                f"{self._library.take_errors()}"
            )
        return context

    def stream(self) -> AbstractContextManager[object]:
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def run(self, bucket: int, pictures: int, inputs: Tensors) -> Tensors:
        context = self._contexts[bucket]
        self._library.errors.clear()  # What is reported from here on is about this call.
        outputs: Tensors = self._outputs.views(pictures, self._buckets[bucket].patches)
        accepted = True
        for name, tensor in inputs.items():
            accepted &= context.set_input_shape(name, tuple(tensor.shape))
            accepted &= context.set_tensor_address(name, tensor.data_ptr())
        for name, tensor in outputs.items():
            accepted &= context.set_tensor_address(name, tensor.data_ptr())
        if not (accepted and context.execute_async_v3(self._stream.cuda_stream)):
            self._stream.synchronize()  # Raises torch's error if the device is lost.
            raise RuntimeError(f"{self._library.name}: {self._library.take_errors()}")
        return outputs

    def keep_kernels(self) -> None:
        if self._cache is None or self._kernels is None:
            return
        try:
            replace_file(self._kernels, bytes(self._cache.serialize()))
        except OSError as error:
            log.warning("compiled kernels are not kept for the next start: %s", error)

    def close(self) -> None:
        if self._engine is None:
            return
        self._stream.synchronize()
        self._contexts.clear()
        self._engine = self._activations = self._outputs = self._cache = None
