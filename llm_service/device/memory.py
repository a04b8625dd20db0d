"""Memory for the KV cache, and copies of arrays to the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

# The KV cache's part of the memory that is free once the model is loaded. On a CPU, other processes
# need memory too; on a GPU, the rest is for what a step allocates.
CPU_FRACTION = 0.25
GPU_FRACTION = 0.85


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """``array`` as a tensor on ``device``. On the CPU it shares the array's memory; to a GPU it is
    copied without waiting."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def cache_budget(device: torch.device) -> int:
    """Bytes that the KV cache may take on ``device``."""
    fraction = GPU_FRACTION if device.type == "cuda" else CPU_FRACTION
    return int(free_memory(device) * fraction)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that can still be allocated on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still allocate, within its control group's limits."""
    available = [_meminfo(root)]
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        highest, current = _number(root / limit), _number(root / used)
        if highest is not None and current is not None:
            available.append(max(highest - current, 0))
    return min(available)


def _meminfo(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 30


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
