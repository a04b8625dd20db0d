"""The device side's interface to the encoder. One implementation a file: torch, and engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from opticnerve.media.plan import Plan

if TYPE_CHECKING:
    import torch

    from opticnerve.models.family import Layout, Preprocessor

Embedding = Mapping[str, "torch.Tensor"]
"""Named tensors of one item, each [num_tokens, hidden_size], contiguous, on the CPU, in the
model's dtype; "rows", and "deepstack.<i>" where the family has such levels."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest batch and the largest item, found by running the largest permitted item."""

    max_batch_patches: int
    max_item_patches: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that an engine is built for."""

    patches: int  # Every picture of a call is padded to this many.
    pictures: int  # The most pictures of one call.


class Recovery(Enum):
    """What to do with a batch for which ``encode`` raised an exception."""

    SPLIT = auto()  # Memory ran out: halve the batch and run both halves; a single item fails.
    ISOLATE = auto()  # Some item is bad: run each alone, so that only the bad one fails.
    STOP = auto()  # The device is lost: this batch fails, and so will every later one.


class Backend(Protocol):
    """A tower on a device. ``encode`` is called by one thread at a time. ``preprocess`` is called
    by many, and pickled for processes that decode."""

    name: str
    device: str
    dtype: str  # Element type of rows, as safetensors writes it: "F32", "F16", "BF16".
    precision: str  # Type in which the tower computes: "float32", "float16", "bfloat16".
    hidden_size: int
    preprocess: Preprocessor

    @property
    def reference(self) -> Backend | None:
        """The torch tower in the same precision, to compare rows with; None if it is not loaded."""
        ...

    def encode(self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]) -> list[Embedding]:
        """One forward pass over a batch; blocks until the results are in host memory."""
        ...

    def classify(self, error: Exception) -> Recovery:
        """How to recover from an exception of ``encode``. Frees cached memory if memory ran out."""
        ...

    def warm(self, largest: Plan, max_batch_patches: int) -> Capacity:
        """Runs the largest permitted item, or the largest that the device has memory for. A batch
        has ``max_batch_patches``; 0: as many as suit the device.

        Raises StartupError if not even a small item runs.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A checkpoint's vision half, on its device."""

    name: str
    family: str
    pair_id: str  # Names the checkpoint; encoders and LLM workers with equal ones belong together.
    fingerprint: str  # Names everything that decides a row; part of content keys.
    layout: Layout
    backend: Backend
