"""The engine's rows. Other threads load them; the engine's thread only looks them up.

``StoreRows`` reads this host's tier only; the ``Fetcher`` copies rows from the network into it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import ParamSpec

import torch

from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.store import Store
from opticnerve.errors import EmbeddingCorrupt, EmbeddingEvicted, StoreError
from opticnerve.lru import LRU

OVERFLOW_BYTES = 512 * 2**20
MAX_DAMAGED = 4096

log = logging.getLogger(__name__)

P = ParamSpec("P")
Tensors = Mapping[str, torch.Tensor]


class _Lease:
    """The engine's lease on the rows of one key."""

    __slots__ = ("num_bytes", "tensors")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.tensors: Tensors | None = None


class StoreRows:
    """A RowSource over this host's tier; see ``llm_service.policy.row_source`` for the contract.

    ``load`` loads tensors on another thread, once per lease. They are kept until the lease ends: a
    file that is unlinked meanwhile stays mapped. One background thread pins and deletes rows in the
    tier, in the order of the engine's calls. Only leased rows stay loaded, and leases are bounded
    by the tier's capacity.

    ``overflow``: holds rows that the tier refuses. ``report``: called with each key whose rows were
    damaged and deleted, on any thread.
    """

    def __init__(
        self,
        tier: Store,
        overflow: MemoryStore | None = None,
        report: Callable[[str], object] | None = None,
    ) -> None:
        self.stores: tuple[Store, ...] = (tier, overflow) if overflow is not None else (tier,)
        self._tier = tier
        self._overflow = overflow
        self._report = report or self.note_damaged
        self._lock = threading.Lock()  # Guards ``_damaged``.
        self._damaged: LRU[str, bool] = LRU(MAX_DAMAGED)
        self._leases: dict[str, _Lease] = {}
        self._leased_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="leases")
        self._deletions: dict[str, Future[None]] = {}
        # Used by the lease thread:
        self._pins: dict[str, tuple[int, AbstractContextManager[None]]] = {}
        self._room = tier.leasable_bytes()  # For this engine's leases, beside other processes'.
        self._measurement = self._in_background(self._measure)

    # ---- the engine's thread: look-ups

    def ready(self, key: str) -> bool:
        lease = self._leases.get(key)
        return lease is not None and lease.tensors is not None

    def can_acquire(self, num_bytes: int) -> bool:
        fits = self._leased_bytes + num_bytes <= self._room
        if not fits and self._measurement.done():  # Other processes may have released some since.
            self._measurement = self._in_background(self._measure)
        return fits

    def acquire(self, key: str, num_bytes: int) -> None:
        self._leases[key] = _Lease(num_bytes)
        self._leased_bytes += num_bytes
        self._in_background(self._pin, key, num_bytes)

    def release(self, key: str) -> None:
        self._leased_bytes -= self._leases.pop(key).num_bytes
        self._in_background(self._unpin, key)
        if self._overflow is not None:
            self._overflow.delete(key)

    def get(self, key: str) -> Tensors:
        lease = self._leases.get(key)
        if lease is None or lease.tensors is None:
            raise EmbeddingEvicted("the embedding is not on this host any more", param=key)
        return lease.tensors

    def discard(self, key: str) -> None:
        lease = self._leases.get(key)
        if lease is not None:
            lease.tensors = None
        self._report(key)
        deletion = self._deletions[key] = self._in_background(self._delete, key)
        deletion.add_done_callback(lambda done: self._end_deletion(key, done))

    def close(self) -> None:
        """Releases every lease and waits for the background work."""
        for key in tuple(self._leases):
            self.release(key)
        self._thread.shutdown()

    # ---- any other thread

    def load(self, key: str, check: Callable[[Tensors], None] = lambda tensors: None) -> bool:
        """Reads the rows of ``key`` on this host and checks every value; returns whether they are
        here. If the engine holds a lease on them, they are ready from now on.

        Rows that are damaged, or that ``check`` refuses with EmbeddingCorrupt, are deleted and
        reported.
        """
        if (deletion := self._deletions.get(key)) is not None:
            wait([deletion])
        lease = self._leases.get(key)
        if lease is not None and lease.tensors is not None:
            with contextlib.suppress(EmbeddingCorrupt):
                check(lease.tensors)
                return True
        for store in self.stores:
            tensors = self._read(store, key, check)
            if tensors is not None:
                if (lease := self._leases.get(key)) is not None:
                    lease.tensors = tensors
                return True
        return False

    def present(self, keys: Iterable[str]) -> set[str]:
        """Those of ``keys`` that this host has, without reading them."""
        wanted = list(keys)
        return set().union(*(store.contains(wanted) for store in self.stores))

    def note_damaged(self, key: str) -> None:
        with self._lock:
            self._damaged[key] = True

    def take_damaged(self, key: str) -> bool:
        """Whether ``key`` was found damaged since this was last asked."""
        with self._lock:
            return bool(self._damaged.pop(key))

    def _read(self, store: Store, key: str, check: Callable[[Tensors], None]) -> Tensors | None:
        with codec.damage_is_a_miss(store, key, self._report):
            entry = store.get(key)
            if entry is not None:
                tensors = entry.tensors
                check(tensors)
                codec.verify(tensors, entry.meta)
                return tensors
        return None

    # ---- the lease thread

    def _end_deletion(self, key: str, deletion: Future[None]) -> None:
        if self._deletions.get(key) is deletion:  # Otherwise a later one has begun.
            del self._deletions[key]

    def _in_background(
        self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs
    ) -> Future[None]:
        future = self._thread.submit(work, *args, **kwargs)
        future.add_done_callback(_log_failure)
        return future

    def _pin(self, key: str, num_bytes: int) -> None:
        pin = self._tier.lease(key, num_bytes)
        try:
            pin.__enter__()
        except StoreError as error:
            log.warning("rows could not be leased in the tier: %s", error.message)
        else:
            self._pins[key] = num_bytes, pin
        self._measure()

    def _unpin(self, key: str) -> None:
        if key in self._pins:
            _, pin = self._pins.pop(key)
            pin.__exit__(None, None, None)
        self._measure()

    def _measure(self) -> None:
        pinned = sum(num_bytes for num_bytes, _ in self._pins.values())
        self._room = pinned + self._tier.leasable_bytes()

    def _delete(self, key: str) -> None:
        for store in self.stores:
            codec.forget(store, key)


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("a task of the lease thread failed", exc_info=error)
