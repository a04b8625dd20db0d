"""References to embeddings: plain values, no torch, no wire."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors element type ("F32", "F16", "BF16") and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


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
