"""What every backend does with its device: copies, freed memory, what an exception means."""

from __future__ import annotations

import torch

from encoder_service.backends.base import Recovery
from opticnerve.errors import device_is_lost

OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",  # onnxruntime's.
    "OutOfMemory",  # TensorRT's.
)


def recovery_from(error: Exception, *, on_cuda: bool) -> Recovery:
    """How to recover from an exception of a forward pass; see ``Backend.classify``."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY_TEXTS)
    ):
        if on_cuda:
            torch.cuda.empty_cache()
        return Recovery.SPLIT
    return Recovery.STOP if on_cuda and device_is_lost(error) else Recovery.ISOLATE


def begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in host memory, contiguous. From CUDA into pinned memory, without waiting: its
    values are there once the stream is done."""
    return tensor.contiguous().to("cpu", non_blocking=True)


def release_cached_memory(device: torch.device) -> None:
    """Returns the memory of released tensors to the device, so that other libraries can allocate
    it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
