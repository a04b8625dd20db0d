"""The torch backend: a family's tower, in the checkpoint's precision, on CPU or CUDA."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from encoder_service.backends.base import Capacity, Embedding, Recovery
from encoder_service.backends.device import begin_copy, recovery_from, release_cached_memory
from encoder_service.pictures.largest_picture import permitted_patches
from opticnerve.errors import StartupError
from opticnerve.media.plan import Plan
from opticnerve.models.family import Preprocessor, Tower
from opticnerve.tensors.dtypes import ELEMENT_TYPES, dtype_name

log = logging.getLogger(__name__)

CPU_BATCH_PATCHES = 2048  # A CPU gains nothing from larger batches; smaller ones answer sooner.
CPU_WARM_PATCHES = 1024  # A larger item would hold a CPU's start up for minutes.
CUDA_BATCH_PATCHES = 65_536  # No gain in throughput beyond; latency only grows.
CUDA_MEMORY_FRACTION = 0.8  # Of free memory; the rest is for fragmentation and other processes.
Shrink = Callable[[Plan, int], Plan]
"""(largest plan, patches) -> the plan of a picture of at most about so many patches."""


class TorchBackend:
    """``shrink`` plans smaller pictures, for devices that cannot take the largest."""

    name = "torch"

    def __init__(self, tower: Tower, preprocess: Preprocessor, shrink: Shrink) -> None:
        self._tower = tower
        self.preprocess = preprocess
        self._shrink = shrink
        self.device = str(tower.device)
        self.dtype = ELEMENT_TYPES[tower.dtype]
        self.precision = dtype_name(tower.dtype)
        self.hidden_size = tower.hidden_size
        self._on_cuda = tower.device.type == "cuda"

    @property
    def reference(self) -> TorchBackend:
        return self

    def encode(self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]) -> list[Embedding]:
        with torch.no_grad():
            outputs = self._tower.encode(pixels, plans)
            copies: list[Embedding] = [
                {name: begin_copy(tensor) for name, tensor in output.items()} for output in outputs
            ]
        if self._on_cuda:
            torch.cuda.current_stream(self._tower.device).synchronize()
        return copies

    def classify(self, error: Exception) -> Recovery:
        return recovery_from(error, on_cuda=self._on_cuda)

    def warm(self, largest: Plan, max_batch_patches: int) -> Capacity:
        if not self._on_cuda:
            return self._warm_cpu(largest, max_batch_patches)
        plan, bytes_per_patch = self._largest_that_fits(largest)
        free, _ = torch.cuda.mem_get_info(self._tower.device)
        sized = int(free * CUDA_MEMORY_FRACTION / max(bytes_per_patch, 1.0))
        batch = max_batch_patches or max(min(sized, CUDA_BATCH_PATCHES), plan.num_patches)
        permitted = permitted_patches(largest) if plan is largest else plan.num_patches
        return Capacity(batch, permitted)

    def _warm_cpu(self, largest: Plan, max_batch_patches: int) -> Capacity:
        """Does not measure host memory: it can be swapped, and a CPU runs one item at a time."""
        self._run_blank(
            self._shrink(largest, CPU_WARM_PATCHES)
            if largest.num_patches > CPU_WARM_PATCHES
            else largest
        )
        batch = max_batch_patches or CPU_BATCH_PATCHES
        return Capacity(batch, max(permitted_patches(largest), batch))

    def _largest_that_fits(self, largest: Plan) -> tuple[Plan, float]:
        """(plan, peak bytes per patch), halving the plan while memory runs out."""
        small = self._shrink(largest, CPU_WARM_PATCHES)
        self._measure(small)  # Loads kernels and workspaces, so that they are not counted below.
        for plan in self._halvings(largest, small):
            peak = self._measure(plan)
            if peak is not None:
                return plan, peak / plan.num_patches
            log.warning("a picture of %d patches does not fit %s", plan.num_patches, self.device)
        raise StartupError(
            f"{self.device} has too little free memory for a picture of {small.num_patches} "
            "patches; free some, or choose another --device"
        )

    def _halvings(self, largest: Plan, small: Plan) -> Iterator[Plan]:
        """``largest``, then plans of half as many patches each, and ``small`` at the end."""
        plan = largest
        while plan.num_patches > small.num_patches:
            yield plan
            smaller = self._shrink(largest, plan.num_patches // 2)
            if smaller.num_patches >= plan.num_patches:
                break
            plan = smaller
        yield small

    def _measure(self, plan: Plan) -> int | None:
        """Peak bytes of encoding this plan; None if memory runs out."""
        torch.cuda.reset_peak_memory_stats(self._tower.device)
        before = torch.cuda.memory_allocated(self._tower.device)
        try:
            self._run_blank(plan)
        except RuntimeError as error:
            if self.classify(error.with_traceback(None)) is not Recovery.SPLIT:
                raise
            return None
        peak: int = torch.cuda.max_memory_allocated(self._tower.device) - before
        torch.cuda.empty_cache()
        return peak

    def _run_blank(self, plan: Plan) -> None:
        """Encodes a grey picture of this plan."""
        started = time.monotonic()
        size = (plan.width, plan.height) if plan.orientation < 5 else (plan.height, plan.width)
        image = Image.new("RGB", size, (127, 127, 127))
        self.encode([self.preprocess(image, plan)], [plan])
        log.debug("%d patches took %.2f s", plan.num_patches, time.monotonic() - started)

    def close(self) -> None:
        release_cached_memory(self._tower.device)
