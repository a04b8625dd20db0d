"""The sizes of a checkpoint's halves, and of a token's keys and values. Without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opticnerve.checkpoints.json_files import positive
from opticnerve.errors import CheckpointError

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.tensors.header import TensorEntry

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class HalfSize:
    """The number of tensors and elements of one half. ``elements``: None if only the tensors' names
    are known."""

    tensors: int
    elements: int | None
    source: str  # Where the numbers come from: "headers", "index" or "configuration".

    @classmethod
    def of_entries(cls, entries: Iterable[TensorEntry]) -> HalfSize:
        shapes = [entry.shape for entry in entries]
        return cls(len(shapes), sum(map(math.prod, shapes)), "headers")

    def num_bytes(self, dtype: str) -> int | None:
        """Bytes of the half once it is loaded in ``dtype``, a value of ``--dtype``."""
        return None if self.elements is None else self.elements * DTYPE_BYTES[dtype]


def listed_size(checkpoint: Checkpoint, is_wanted: Callable[[str], bool]) -> HalfSize | None:
    """The size of the half whose keys ``is_wanted`` accepts, from weight files or their index; None
    if there is neither. Raises CheckpointError for damaged files."""
    if not checkpoint.missing_weights:
        return HalfSize.of_entries(checkpoint.tensor_index(is_wanted).values())
    if checkpoint.weight_map is None:
        return None
    return HalfSize(sum(map(is_wanted, checkpoint.weight_map)), None, "index")


def cache_bytes_per_token(text: Mapping[str, Any], dtype: str) -> int | None:
    """Bytes of one token's keys and values in all layers, from a text model's configuration. None
    if that leaves out a size, for which the model's class has a default."""
    try:
        heads = positive(text, "num_attention_heads")
        kv_heads = positive(text, "num_key_value_heads", heads)
        head_dim = positive(text, "head_dim", positive(text, "hidden_size") // heads)
        layers = positive(text, "num_hidden_layers")
    except CheckpointError:
        return None
    return 2 * layers * kv_heads * head_dim * DTYPE_BYTES[dtype]
