"""References to embeddings: plain values, no torch, no wire."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from opticnerve.errors import EmbeddingCorrupt
from opticnerve.tensors.header import num_bytes

ROWS = "rows"
DEEPSTACK = "deepstack."  # A level's number follows.
TENSORS_SCHEME = b"opticnerve-tensors-1"
DTYPES = ("F32", "F16", "BF16")  # Element types that an embedding may have.


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors element type ("F32", "F16", "BF16") and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


def tensor_names(levels: int) -> list[str]:
    """The names of an embedding's tensors, for a model with ``levels`` DeepStack levels."""
    return [ROWS, *(f"{DEEPSTACK}{level}" for level in range(levels))]


def check_shapes(
    tensors: Iterable[TensorSpec], num_rows: int, hidden_size: int, levels: int
) -> None:
    """Raises EmbeddingCorrupt unless ``tensors`` are the rows and all DeepStack levels of the
    model, each [num_rows, hidden_size]."""
    found, names = {spec.name: spec for spec in tensors}, tensor_names(levels)
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise EmbeddingCorrupt(f"the embedding has no {missing}")
    unknown = sorted(found.keys() - set(names))
    if unknown:
        raise EmbeddingCorrupt(f"the model takes no tensor {unknown[0]!r} of the embedding")
    for spec in found.values():
        if spec.shape != (num_rows, hidden_size):
            raise EmbeddingCorrupt(
                f"tensor {spec.name} of the embedding is {list(spec.shape)}, and the model takes "
                f"[{num_rows}, {hidden_size}]"
            )


def tensors_key(data: bytes) -> str:
    """The key of a caller's own rows, from their safetensors bytes: 64 hex digits, which differ
    from the content key of any picture."""
    digest = hashlib.sha256(TENSORS_SCHEME)
    digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Location:
    """Where an embedding may be found; see ``embedding.proto``."""

    shm_tier_id: str = ""
    redis: bool = False
    fetch_address: str = ""
    inline: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class EmbeddingRef:
    """Enough to find, check and use one embedding."""

    key: str  # Content key, 64 lowercase hex digits.
    fingerprint: str
    tensors: tuple[TensorSpec, ...]
    num_rows: int
    location: Location = Location()

    def at(self, location: Location) -> EmbeddingRef:
        """The same embedding, found elsewhere."""
        return replace(self, location=location)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)
