"""How many values a JSON text would become, counted before it is parsed.

Three bytes, ``{},``, become an object of a hundred times their size: the length of a body says
little of what it costs. Text costs its length, and does not count here.
"""

from __future__ import annotations

VALUE_BYTES = 400  # Memory that one value takes at most, as part of a validated request.
CHUNK_BYTES = 2**18  # Looked at between two turns of other threads.


def count_values(text: bytes | bytearray, enough: int) -> int:
    """The objects, lists and their entries in ``text``; no longer counted beyond ``enough``.

    A parser finds no more of them than this, also in text that is not valid JSON.
    """
    total, start, in_string = 1, 0, False
    while start < len(text) and total <= enough:
        chunk = _chunk(text, start)
        start += len(chunk)
        if in_string and b'"' not in chunk:
            continue
        if b"\\" in chunk:
            chunk = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = chunk.split(b'"')  # In turn outside and inside of strings.
        outside = b"".join(pieces[in_string::2])
        total += sum(outside.count(mark) for mark in (b",", b"[", b"{"))
        in_string ^= len(pieces) % 2 == 0
    return total


def _chunk(text: bytes | bytearray, start: int) -> bytes | bytearray:
    """Cuts no escape in two."""
    chunk = text[start : start + CHUNK_BYTES]
    backslashes = len(chunk) - len(chunk.rstrip(b"\\"))
    return chunk if backslashes % 2 == 0 else text[start : start + CHUNK_BYTES + 1]
