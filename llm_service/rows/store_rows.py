"""The engine's rows, over the embedding store: leases while sequences run, tensors for the runner.

``StoreRows`` belongs to the engine's thread and touches this host's tier alone. Whatever has to
cross a network is the ``Fetcher``'s, which brings it into the same tier.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from llm_service import metrics
from llm_service.policy.rows import RowsNote
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.redis_store import RedisStore
from opticnerve.embeddings.store import Store
from opticnerve.errors import EmbeddingCorrupt, EmbeddingEvicted, StoreError

OVERFLOW_BYTES = 512 * 2**20
MAX_NOTES = 4096

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]


def local_tier(store: Store) -> Store:
    """The part of ``store`` that is on this host."""
    return store.local if isinstance(store, RedisStore) else store


def checked_tensors(
    store: Store, key: str, check: Callable[[Tensors], None] = lambda tensors: None
) -> Tensors | None:
    """What ``store`` has under ``key``, checked to the last value; None where it has nothing, or
    the machine cannot read it now.

    Whatever is wrong with it, by ``check`` (which raises EmbeddingCorrupt) or by itself, it is
    deleted there and raised as EmbeddingCorrupt.
    """
    try:
        with codec.reading():
            entry = store.get(key)
            if entry is None:
                return None
            tensors = entry.tensors
            check(tensors)
            codec.verify(tensors, entry.meta)
            return tensors
    except EmbeddingCorrupt as error:
        log.warning("the stored %.12s is damaged and is deleted: %s", key, error.message)
        forget(store, key)
        raise
    except OSError as error:  # No memory to map it, say: a miss, and no reason to delete it.
        log.warning("rows could not be mapped: %s", error.strerror)
        return None


def forget(store: Store, key: str) -> None:
    """Deletes what is damaged. Where that fails, the next reader finds it damaged too."""
    with contextlib.suppress(StoreError):
        store.delete(key)


class Notes:
    """What happened to keys lately: one thread adds, one asks."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (when, how long)
        self._corrupt: OrderedDict[str, None] = OrderedDict()

    def add(self, note: RowsNote) -> None:
        if note.seconds is None:
            self._corrupt[note.key] = None
        else:
            self._seconds[note.key] = (time.perf_counter(), note.seconds)
            metrics.CACHE_LOOKUPS.labels(tier="shm", result="hit").inc()
        for noted in (self._corrupt, self._seconds):
            if len(noted) > MAX_NOTES:
                noted.popitem(last=False)

    def seconds(self, key: str, since: float) -> float:
        """Spent on loading ``key`` after ``since`` (perf_counter); 0 where it was not."""
        when, seconds = self._seconds.get(key, (0.0, 0.0))
        return seconds if when >= since else 0.0

    def take_corrupt(self, key: str) -> bool:
        """Whether ``key`` was found corrupt since this was last asked."""
        return key in self._corrupt and self._corrupt.pop(key, True) is None


class _Held:
    """One acquired key."""

    __slots__ = ("lease", "tensors")

    def __init__(self, lease: AbstractContextManager[None] | None) -> None:
        self.lease = lease
        self.tensors: Tensors | None = None


class StoreRows:
    """A RowSource over this host's tier. See ``llm_service.policy.rows`` for the contract.

    Tensors are loaded and checked once a lease and held until its end: a file that is unlinked
    meanwhile lives on in its mapping. ``overflow`` has what the tier would not take; ``tell`` hears
    of what was loaded and of what was damaged.
    """

    def __init__(
        self,
        tier: Store,
        overflow: MemoryStore | None = None,
        tell: Callable[[RowsNote], object] = lambda note: None,
    ) -> None:
        self._stores: tuple[Store, ...] = (tier, overflow) if overflow is not None else (tier,)
        self._tier = tier
        self._overflow = overflow
        self._tell = tell
        self._held: dict[str, _Held] = {}

    def ready(self, key: str) -> bool:
        held = self._held.get(key)
        if held is None:
            return any(store.contains([key]) for store in self._stores)
        if held.tensors is None:
            held.tensors = self._load(key)
        return held.tensors is not None

    def can_acquire(self, num_bytes: int) -> bool:
        return self._tier.can_lease(num_bytes)

    def acquire(self, key: str, num_bytes: int) -> None:
        lease = self._tier.lease(key, num_bytes)
        try:
            lease.__enter__()
        except StoreError as error:
            log.warning("rows are used without a lease: %s", error.message)
            self._held[key] = _Held(None)
        else:
            self._held[key] = _Held(lease)

    def release(self, key: str) -> None:
        held = self._held.pop(key)
        if held.lease is not None:
            held.lease.__exit__(None, None, None)
        if self._overflow is not None:
            self._overflow.delete(key)

    def get(self, key: str) -> Tensors:
        held = self._held.get(key)
        tensors = held.tensors if held is not None else None
        if tensors is None:
            tensors = self._load(key)
        if tensors is None:
            raise EmbeddingEvicted("the embedding is not on this host any more", param=key)
        if held is not None:
            held.tensors = tensors
        return tensors

    def discard(self, key: str) -> None:
        self._tell(RowsNote(key, None))
        held = self._held.get(key)
        if held is not None:
            held.tensors = None
        for store in self._stores:
            forget(store, key)

    def close(self) -> None:
        for key in tuple(self._held):
            self.release(key)

    def _load(self, key: str) -> Tensors | None:
        """The checked tensors of ``key``; None where there are none. Deletes corrupt ones."""
        start = time.perf_counter()
        for store in self._stores:
            try:
                tensors = checked_tensors(store, key)
            except EmbeddingCorrupt:
                self._tell(RowsNote(key, None))
                continue
            if tensors is not None:
                self._tell(RowsNote(key, time.perf_counter() - start))
                return tensors
        return None
