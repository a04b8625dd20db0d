"""References to embeddings that were made lately: keys to refs, never tensors.

Bounded, least recently used first out. What it says may be stale: an LLM worker that finds
nothing behind a reference asks for it (``EmbeddingNeeded``), and the entry is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from opticnerve.embeddings.ref import EmbeddingRef

CAPACITY = 10_000  # About 1 KiB each.


class References:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._refs: OrderedDict[str, EmbeddingRef] = OrderedDict()

    def __len__(self) -> int:
        return len(self._refs)

    def get(self, key: str) -> EmbeddingRef | None:
        ref = self._refs.get(key)
        if ref is not None:
            self._refs.move_to_end(key)
        return ref

    def put(self, ref: EmbeddingRef) -> None:
        """Remembers where an embedding is; rows that travel inline are not kept."""
        location = replace(ref.location, inline=b"")
        if not (location.shm_tier_id or location.redis or location.fetch_address):
            return
        self._refs[ref.key] = ref.at(location)
        self._refs.move_to_end(ref.key)
        while len(self._refs) > self.capacity:
            self._refs.popitem(last=False)

    def forget(self, key: str) -> None:
        self._refs.pop(key, None)
