"""The backend of engines: a tower exported as a graph, run by onnxruntime or a TensorRT library.

Pictures are padded to the smallest bucket that holds them, and those of one bucket share calls.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch

from encoder_service.backends.base import Bucket, Capacity, Embedding, Recovery
from encoder_service.backends.device import begin_copy, recovery_from
from encoder_service.backends.torch_backend import TorchBackend
from encoder_service.pictures.largest_picture import permitted_patches
from opticnerve.errors import InvalidRequest, UnusableEngine
from opticnerve.tensors.dtypes import ELEMENT_TYPES, dtype_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.media.plan import Plan
    from opticnerve.models.family import Preprocessor
    from opticnerve.models.towers.graph import Tensors, TowerGraph


log = logging.getLogger(__name__)


class EngineRuntime(Protocol):
    """Runs an engine on its device, one call at a time. Nothing is allocated in a call."""

    def stream(self) -> AbstractContextManager[object]:
        """A context in which the CUDA stream of its calls is torch's current one; on a CPU it does
        nothing."""
        ...

    def run(self, bucket: int, pictures: int, inputs: Tensors) -> Tensors:
        """The outputs of one call, by name, in memory that the next call overwrites. ``bucket``:
        its index. ``inputs``: of ``pictures`` padded pictures, as ``TowerGraph.prepare`` makes
        them. Called within ``stream()``."""
        ...

    def keep_kernels(self) -> None:
        """Saves compiled kernels for the next start. Called after every bucket has run."""
        ...

    def close(self) -> None:
        """Frees what it holds. Not called during ``run``. A second call does nothing."""
        ...


@contextlib.contextmanager
def faults_refuse_the_engine() -> Iterator[None]:
    """Translates errors of a runtime to UnusableEngine. For use before the engine serves."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnusableEngine(
            f"the engine does not run here: {reason}. Build it with smaller --buckets, or serve "
            "with --backend torch"
        ) from error


class OutputBuffers:
    """Memory for the outputs of one call, made once and large enough for every bucket."""

    def __init__(self, graph: TowerGraph, buckets: Sequence[Bucket], device: torch.device) -> None:
        self._shapes = graph.output_shapes
        sizes = [graph.output_shapes(bucket.pictures, bucket.patches) for bucket in buckets]
        self._flat = {
            name: torch.empty(
                max(prod(shapes[name]) for shapes in sizes), dtype=graph.dtype, device=device
            )
            for name in graph.output_names
        }

    def views(self, pictures: int, patches: int) -> dict[str, torch.Tensor]:
        """Outputs of that size, by name; they overlap those of any other size."""
        return {
            name: self._flat[name][: prod(shape)].view(shape)
            for name, shape in self._shapes(pictures, patches).items()
        }


class EngineBackend:
    """A tower run by ``runtime``. ``beyond`` encodes pictures that no bucket holds; None: they are
    refused."""

    def __init__(
        self,
        name: str,
        graph: TowerGraph,
        buckets: Sequence[Bucket],
        runtime: EngineRuntime,
        preprocess: Preprocessor,
        beyond: TorchBackend | None = None,
    ) -> None:
        self.name = name
        self.preprocess = preprocess
        self.device = str(graph.device)
        self.dtype = ELEMENT_TYPES[graph.dtype]
        self.precision = dtype_name(graph.dtype)
        self.hidden_size = graph.hidden_size
        self.buckets = tuple(buckets)
        self._graph = graph
        self._runtime = runtime
        self._beyond = beyond
        self._on_cuda = graph.device.type == "cuda"
        self._calling = threading.Lock()  # Held while the runtime runs; ``close`` takes it.
        self._closed = False

    @property
    def reference(self) -> TorchBackend | None:
        return self._beyond

    def encode(self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]) -> list[Embedding]:
        """See ``Backend``. Raises InvalidRequest for a picture that no bucket holds."""
        made: dict[int, Embedding] = {}
        for bucket, items in self._calls(plans):
            some = [pixels[i] for i in items], [plans[i] for i in items]
            made |= zip(items, self._run(bucket, *some), strict=True)
        return [made[i] for i in range(len(plans))]

    def _calls(self, plans: Sequence[Plan]) -> Iterator[tuple[int | None, list[int]]]:
        """Splits a batch into calls: (index of the bucket, or None for items that no bucket holds;
        indices of the call's items)."""
        members: dict[int | None, list[int]] = {}
        for i, plan in enumerate(plans):
            members.setdefault(self.bucket_of(plan), []).append(i)
        for bucket, items in members.items():
            if bucket is None:
                yield bucket, items
                continue
            call: list[int] = []
            room = self.buckets[bucket].pictures
            for i in items:
                pictures = self._graph.pictures(plans[i])
                if pictures > room:
                    yield bucket, call
                    call, room = [], self.buckets[bucket].pictures
                call.append(i)
                room -= pictures
            yield bucket, call

    def bucket_of(self, plan: Plan) -> int | None:
        """The index of the smallest bucket that holds the item's pictures; None if none does."""
        patches, pictures = self._graph.patches(plan), self._graph.pictures(plan)
        fitting = (
            i
            for i, bucket in enumerate(self.buckets)
            if bucket.patches >= patches and bucket.pictures >= pictures
        )
        return next(fitting, None)

    def _run(
        self, bucket: int | None, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[Embedding]:
        if bucket is None:
            if self._beyond is None:
                raise InvalidRequest(
                    f"the picture would be {max(map(self._graph.patches, plans))} patches, with "
                    f"padding; this encoder's engine takes up to {self.buckets[-1].patches}. "
                    "Lower max_pixels",
                    param="max_pixels",
                )
            return self._beyond.encode(pixels, plans)
        pictures = sum(map(self._graph.pictures, plans))
        with self._calling, torch.inference_mode(), self._runtime.stream():
            if self._closed:
                raise RuntimeError("the engine is closed")
            inputs = self._graph.prepare(pixels, plans, self.buckets[bucket].patches)
            outputs = self._runtime.run(bucket, pictures, inputs)
            items = self._graph.split(outputs, plans)
            copies: list[Embedding] = [
                {name: begin_copy(tensor) for name, tensor in item.items()} for item in items
            ]
            if self._on_cuda:
                torch.cuda.current_stream(self._graph.device).synchronize()
        return copies

    def classify(self, error: Exception) -> Recovery:
        return recovery_from(error, on_cuda=self._on_cuda)

    def warm(self, largest: Plan, max_batch_patches: int) -> Capacity:
        """On CUDA, runs a full call of every bucket, which loads or compiles its kernels. On a CPU
        the engine's gate has run each already."""
        if self._on_cuda:
            with (
                faults_refuse_the_engine(),
                torch.inference_mode(),
                self._runtime.stream(),
            ):
                for i, bucket in enumerate(self.buckets):
                    inputs = self._graph.example(bucket.pictures, bucket.patches)
                    self._runtime.run(i, bucket.pictures, inputs)
            self._runtime.keep_kernels()
        batch = max_batch_patches or max(
            bucket.patches * bucket.pictures for bucket in self.buckets
        )
        if self._beyond is not None:
            return Capacity(batch, self._beyond.warm(largest, max_batch_patches).max_item_patches)
        if self.bucket_of(largest) is not None:
            return Capacity(batch, permitted_patches(largest))
        return Capacity(batch, self.buckets[-1].patches)

    def close(self) -> None:
        """Frees what the engine holds, unless a call still runs: then it goes with the process."""
        if not self._calling.acquire(blocking=False):
            log.warning("a call of the engine has not ended; its memory is freed with the process")
            return
        try:
            self._closed = True
            self._runtime.close()
        finally:
            self._calling.release()
        if self._beyond is not None:
            self._beyond.close()
