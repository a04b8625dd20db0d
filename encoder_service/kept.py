"""Embeddings that the store would not take, kept in this process so that Fetch can serve them."""

from __future__ import annotations

import threading
from collections import OrderedDict

from opticnerve.embeddings.ref import EmbeddingRef

MAX_BYTES = 256 * 2**20


class Kept:
    """Least recently used (reference, safetensors bytes) by key, bounded by bytes."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._held: OrderedDict[str, tuple[EmbeddingRef, bytes]] = OrderedDict()
        self._lock = threading.Lock()  # Store threads write, the event loop reads.

    def add(self, ref: EmbeddingRef, data: bytes) -> None:
        """Keeps one embedding, at the cost of the least recently used; the newest always fits."""
        with self._lock:
            self._drop(ref.key)
            while self._held and self.num_bytes + len(data) > self.max_bytes:
                self._drop(next(iter(self._held)))
            self._held[ref.key] = (ref, data)
            self.num_bytes += len(data)

    def get(self, key: str) -> tuple[EmbeddingRef, bytes] | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def drop(self, key: str) -> None:
        with self._lock:
            self._drop(key)

    def _drop(self, key: str) -> None:
        if (entry := self._held.pop(key, None)) is not None:
            self.num_bytes -= len(entry[1])
