"""Content keys: the one name of an embedding, in caches, transport and single flight.

A key is a hash of everything that decides the embedding: the bytes as they came, the processor
settings, what the request changed of them, and the encoder's fingerprint. Never of a URL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from opticnerve.media.plan import Overrides

SCHEME_VERSION = 1


def content_key(
    data: bytes | bytearray | memoryview,
    settings: Mapping[str, Any],
    overrides: Overrides,
    fingerprint: str,
) -> str:
    """64 lowercase hex digits (SHA-256). Every part is preceded by its length, so that no two
    different inputs are hashed as the same bytes."""
    digest = hashlib.sha256()
    for part in (
        b"opticnerve-content-%d" % SCHEME_VERSION,
        json.dumps(settings, sort_keys=True, separators=(",", ":")).encode(),
        _overrides(overrides),
        fingerprint.encode(),
        data,
    ):
        view = memoryview(part).cast("B")
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()


def _overrides(overrides: Overrides) -> bytes:
    """Without a background as it was before there was one, so that callers of that time, who
    mean none, name an item as it is named now."""
    pixels = b"%d,%d" % (overrides.min_pixels or 0, overrides.max_pixels or 0)
    return pixels if overrides.background is None else pixels + b",%06x" % overrides.background
