"""``memory://``: embeddings in a dictionary of this process."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch

from opticnerve.embeddings import codec
from opticnerve.embeddings.store import Entry, StoreState, check_key
from opticnerve.errors import EmbeddingCorrupt, StoreFull
from opticnerve.telemetry.metrics import EMBEDDING_BYTES, EVICTIONS, STORE_FAILURES

DEFAULT_CAPACITY = 2**30


class MemoryStore:
    """Keeps files as bytes; evicts the least recently used. ``get`` copies, so entries are
    private."""

    tier_id = ""
    shared = False

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()  # Guards all below.
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._stored = 0
        self._pinned: dict[str, int] = {}  # Bytes reserved by leases, by key.
        self._leases: Counter[str] = Counter()

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
        if not self.contains([key]):
            self._add(key, codec.to_bytes(tensors, meta))

    def put_bytes(self, key: str, data: bytes) -> None:
        codec.header_of(data, len(data))
        self._add(check_key(key), bytes(data))

    def get(self, key: str) -> Entry | None:
        data = self.read_bytes(key)
        if data is None:
            return None
        try:
            return Entry(*codec.from_bytes(data))
        except EmbeddingCorrupt:
            self.delete(key)
            raise

    def contains(self, keys: Iterable[str]) -> set[str]:
        with self._lock:
            return {key for key in keys if check_key(key) in self._files}

    def read_bytes(self, key: str) -> bytes | None:
        with self._lock:
            data = self._files.get(check_key(key))
            if data is not None:
                self._files.move_to_end(key)
            return data

    def lease(self, key: str, num_bytes: int) -> AbstractContextManager[None]:
        return self._lease(check_key(key), num_bytes)

    @contextlib.contextmanager
    def _lease(self, key: str, num_bytes: int) -> Iterator[None]:
        with self._lock:
            if key not in self._pinned:
                if sum(self._pinned.values()) + num_bytes > self.capacity:
                    raise StoreFull("leases fill the store's capacity")
                self._pinned[key] = num_bytes
            self._leases[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases[key] -= 1
                if not self._leases[key]:
                    del self._leases[key], self._pinned[key]

    def leasable_bytes(self) -> int:
        with self._lock:
            return self.capacity - sum(self._pinned.values())

    def delete(self, key: str) -> None:
        with self._lock:
            self._stored -= len(self._files.pop(check_key(key), b""))

    @property
    def state(self) -> StoreState:
        return StoreState("memory")

    def stored_bytes(self) -> int:
        with self._lock:
            return self._stored

    def close(self) -> None:
        with self._lock:
            self._files.clear()
            self._stored = 0

    def _add(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return
            self._make_room(key, len(data))
            self._files[key] = data
            self._stored += len(data)
            EMBEDDING_BYTES.labels("memory", "written").inc(len(data))

    def _make_room(self, key: str, num_bytes: int) -> None:
        """Evicts until ``num_bytes`` fit, all or nothing. Raises StoreFull."""
        absent = sum(n for pin, n in self._pinned.items() if pin not in self._files and pin != key)
        excess = self._stored + absent + num_bytes - self.capacity
        victims = []
        for other, data in self._files.items():
            if excess <= 0:
                break
            if other not in self._pinned:
                victims.append(other)
                excess -= len(data)
        if excess > 0:
            STORE_FAILURES.labels("memory").inc()
            raise StoreFull("the store is full of embeddings that are in use")
        for other in victims:
            self._stored -= len(self._files.pop(other))
        EVICTIONS.labels("memory").inc(len(victims))
