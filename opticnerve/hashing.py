"""One way to hash several values as one."""

from __future__ import annotations

import hashlib

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
