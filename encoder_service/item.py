"""One item between the wire and the encoder, as plain values without tensors."""

from __future__ import annotations

from dataclasses import dataclass

from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.media.plan import Overrides, Plan


@dataclass(frozen=True, slots=True)
class ItemRequest:
    """What the header of an Encode call says; see ``EncodeHeader`` in ``encoder.proto``."""

    request_id: str
    key: str
    fingerprint: str
    plan: Plan
    overrides: Overrides
    num_bytes: int
    lost: bool = False  # A consumer found no usable rows where it looked.
    cache_salt: str = ""  # Part of the key.


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Milliseconds in each stage; a hit has none. See ``EncodeTimings`` in ``encoder.proto``."""

    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    put_ms: float = 0.0
    batch_items: int = 0
    batch_patches: int = 0
    hit: bool = False


@dataclass(frozen=True, slots=True)
class EncodedItem:
    ref: EmbeddingRef
    timings: StageTimings
