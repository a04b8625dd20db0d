"""Content keys: SHA-256 over everything that decides an embedding.

A content key names an embedding in caches, in messages and in single flight. It covers the item's
bytes as received, the processor settings, the request's overrides of them, and the encoder's
fingerprint. A URL is never part of it. A cache salt separates callers that must not learn of each
other's pictures, not even from response times: callers with different salts share no embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from opticnerve.media.plan import Overrides

SCHEME_VERSION = 1

Part = str | bytes | bytearray | memoryview


def hash_parts(*parts: Part) -> str:
    """SHA-256 of ``parts``, 64 lowercase hex digits.

    Each part is preceded by its length in bytes, so that no two different lists of parts are
    hashed as the same bytes. Text is hashed as UTF-8.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        view = memoryview(data).cast("B")
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()


def content_key(
    data: bytes | bytearray | memoryview,
    settings: Mapping[str, Any],
    overrides: Overrides,
    fingerprint: str,
    cache_salt: str = "",
) -> str:
    """The content key of an item: 64 lowercase hex digits (SHA-256).

    ``data``: the item's bytes as received. ``settings``: ``Layout.settings()``. ``fingerprint``:
    the encoder's. With an empty salt the key equals that of releases without salts.
    """
    return hash_parts(
        f"opticnerve-content-{SCHEME_VERSION}",
        json.dumps(settings, sort_keys=True, separators=(",", ":")),
        _overrides(overrides),
        fingerprint,
        data,
        *([cache_salt] if cache_salt else ()),
    )


def tenant_salt(tenant: str, requested: str) -> str:
    """The cache salt of a request by ``tenant`` that asked for the salt ``requested``.

    Both may be empty, and then the result is, too; otherwise 64 hex digits. A caller chooses
    ``requested`` only, and so cannot make the salt of another tenant.
    """
    if not tenant and not requested:
        return ""
    return hash_parts("opticnerve-salt-1", tenant, requested)


def _overrides(overrides: Overrides) -> bytes:
    """Settings at their defaults are left out, so that keys of releases without these settings stay
    valid."""
    pixels = b"%d,%d" % (overrides.min_pixels or 0, overrides.max_pixels or 0)
    background = b"" if overrides.background is None else b",%06x" % overrides.background
    return pixels + background + (b",several" if overrides.one_of_several else b"")
