"""What crosses between the wire and the encoder: plain values of one item. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.embeddings.seal import Seal
from opticnerve.media.plan import Overrides, Plan
from opticnerve.media.structure import DEFAULT_MAX_PASSES


@dataclass(frozen=True, slots=True)
class Identity:
    """What this encoder is, and what its references say of it."""

    fingerprint: str
    fetch_address: str  # host:port of its own Fetch.
    seal: Seal | None = None  # Signs what Fetch answers.


@dataclass(frozen=True, slots=True)
class Limits:
    max_item_bytes: int
    max_image_pixels: int
    max_queue_patches: int = 0  # 0: sized from the largest item.
    max_decode_passes: int = DEFAULT_MAX_PASSES  # See ``Structure.passes``.
    max_decode_bytes: int = 0  # 0: sized from the number of workers.
    decode_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """What an Encode call says before its bytes come."""

    request_id: str
    key: str
    fingerprint: str
    plan: Plan
    overrides: Overrides
    num_bytes: int
    lost: bool = False  # A consumer found no usable rows where it looked.
    cache_salt: str = ""  # Part of the key.


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds in each stage; a hit has none. See ``EncodeTimings`` in ``encoder.proto``."""

    queue_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    put_s: float = 0.0
    batch_items: int = 0
    batch_patches: int = 0
    hit: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    ref: EmbeddingRef
    timings: Timings
