"""Content keys: the one name of an embedding, in caches, transport and single flight.

A key is a hash of everything that decides the embedding: the bytes as they came, the processor
settings, what the request changed of them, and the encoder's fingerprint. Never of a URL. A cache
salt beside them keeps callers apart who must not learn of each other's pictures, not even by how
long an answer takes: they share no embedding.
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
    cache_salt: str = "",
) -> str:
    """64 lowercase hex digits (SHA-256). Without a salt they are those of releases that knew
    none."""
    return _digest(
        b"opticnerve-content-%d" % SCHEME_VERSION,
        json.dumps(settings, sort_keys=True, separators=(",", ":")).encode(),
        _overrides(overrides),
        fingerprint.encode(),
        data,
        *([cache_salt.encode()] if cache_salt else ()),
    )


def tenant_salt(tenant: str, own: str) -> str:
    """The cache salt of a tenant's request that names a salt of its ``own``; both may be empty.

    64 hex digits, or empty where both are. A caller chooses ``own`` alone, which makes the salt of
    no other tenant.
    """
    if not tenant and not own:
        return ""
    return _digest(b"opticnerve-salt-1", tenant.encode(), own.encode("utf-8", "surrogatepass"))


def _digest(*parts: bytes | bytearray | memoryview) -> str:
    """SHA-256. Every part is preceded by its length, so that no two different inputs are hashed
    as the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        view = memoryview(part).cast("B")
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()


def _overrides(overrides: Overrides) -> bytes:
    """Without a background as it was before there was one, so that callers of that time, who
    mean none, name an item as it is named now."""
    pixels = b"%d,%d" % (overrides.min_pixels or 0, overrides.max_pixels or 0)
    return pixels if overrides.background is None else pixels + b",%06x" % overrides.background
