"""Where finished embeddings go: the store, or this process when the store will not take them.

Store calls that move data or cross a network run on threads of the shelf's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from encoder_service import metrics
from encoder_service.backends.base import Embedding
from encoder_service.item import Identity
from encoder_service.kept import Kept
from opticnerve.embeddings import codec
from opticnerve.embeddings.ref import EmbeddingRef, Location, TensorSpec
from opticnerve.embeddings.store import Store
from opticnerve.errors import EmbeddingCorrupt, EngineFailure, NotFound, StoreError

log = logging.getLogger(__name__)

THREADS = 2

P = ParamSpec("P")
R = TypeVar("R")


class Shelf:
    """Borrows the store; owns its threads and what it keeps. ``close`` ends the threads."""

    def __init__(self, store: Store, identity: Identity) -> None:
        self.store = store
        self.identity = identity
        self.kept = Kept()
        self.tier = "shm" if store.tier_id else "redis" if store.shared else "memory"
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")

    async def look_up(self, key: str) -> EmbeddingRef | None:
        """A reference to what is stored under ``key``."""
        kept = self.kept.get(key)
        if kept is not None:
            ref: EmbeddingRef | None = kept[0]
        elif self.store.shared:
            ref = await self._run(self._stored, key)
        else:  # Opening a file on tmpfs is quicker than a trip to a thread.
            ref = self._stored(key)
        return self._counted(ref)

    async def renew(self, key: str) -> EmbeddingRef | None:
        """Like ``look_up`` for what a consumer could not use: what is stored is checked as a
        whole, deleted where it is damaged, and else put again where consumers look."""
        return self._counted(await self._run(self._renew, key))

    async def drop(self, key: str) -> None:
        """Deletes what is stored under ``key``: it is not what it should be."""
        log.warning("the stored %s does not fit its item and is deleted", key)
        self.kept.drop(key)
        await self._run(self.store.delete, key)

    async def publish(self, key: str, embedding: Embedding) -> tuple[EmbeddingRef, float]:
        """Puts an embedding where others find it; returns its reference and the seconds taken.

        Raises EngineFailure, and stores nothing, where values are NaN or infinite.
        """
        return await self._run(self._put, key, embedding)

    async def read(self, key: str) -> tuple[bytes, bytes]:
        """(safetensors bytes of an embedding, their MAC: b"" without a secret). Raises NotFound,
        InvalidRequest for no key."""
        return await self._run(self._read_signed, key)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _counted(self, ref: EmbeddingRef | None) -> EmbeddingRef | None:
        metrics.CACHE_LOOKUPS.labels(tier=self.tier, result="hit" if ref else "miss").inc()
        return ref

    async def _run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    # ---- on a store thread

    def _stored(self, key: str) -> EmbeddingRef | None:
        with self._damage_is_a_miss(key), codec.reading():
            entry = self.store.get(key)
            if entry is not None:
                return self._reference(key, codec.specs_of(entry.tensors))
        return None

    @contextlib.contextmanager
    def _damage_is_a_miss(self, key: str) -> Iterator[None]:
        """Around all that reads what is stored: what is damaged is deleted, and encoded anew."""
        try:
            yield
        except EmbeddingCorrupt as error:
            log.warning("the stored %s is damaged and is deleted: %s", key, error.message)
            with contextlib.suppress(StoreError):  # Then the next reader finds it damaged too.
                self.store.delete(key)
        except OSError as error:  # No memory to map it, say: no reason to delete it.
            log.warning("the stored %s could not be read: %s", key, error.strerror)

    def _put(self, key: str, embedding: Embedding) -> tuple[EmbeddingRef, float]:
        started = time.monotonic()
        if not codec.is_finite(embedding):
            log.error("the embedding of %s is not finite", key)
            raise EngineFailure(
                "the encoder made values for this picture that are not finite; its numbers may be "
                "too large for float16 (--dtype)"
            )
        ref = self._reference(key, codec.specs_of(embedding))
        meta = {"key": key, "fingerprint": self.identity.fingerprint}
        try:
            self.store.put(key, embedding, meta)
        except StoreError as error:
            ref = self._keep(ref, codec.to_bytes(embedding, meta), error)
        return ref, time.monotonic() - started

    def _renew(self, key: str) -> EmbeddingRef | None:
        data = self._read(key)
        if data is None:
            return None
        ref = self._reference(key, codec.parse(data, len(data)).tensors)
        try:
            self.store.put_bytes(key, data)  # Redis may have lost what the local tier has.
        except StoreError as error:
            ref = self._keep(ref, data, error)
        return ref

    def _keep(self, ref: EmbeddingRef, data: bytes, error: StoreError) -> EmbeddingRef:
        """What the store would not take, for Fetch."""
        log.warning("the store did not take an embedding: %s", error.message)
        ref = ref.at(Location(fetch_address=self.identity.fetch_address))
        self.kept.add(ref, data)
        return ref

    def _read(self, key: str) -> bytes | None:
        """What is stored or kept, checked to the last byte; what is damaged is deleted."""
        with self._damage_is_a_miss(key), codec.reading():
            data = self.store.read_bytes(key)
            if data is not None:
                codec.verify(*codec.from_bytes(data))
                return data
        kept = self.kept.get(key)
        return None if kept is None else kept[1]

    def _read_signed(self, key: str) -> tuple[bytes, bytes]:
        data, seal = self._read(key), self.identity.seal
        if data is None:
            raise NotFound("this encoder does not hold that embedding; encode the item again")
        return data, b"" if seal is None else seal.mac(key, [data])

    def _reference(self, key: str, specs: tuple[TensorSpec, ...]) -> EmbeddingRef:
        return EmbeddingRef(
            key=key,
            fingerprint=self.identity.fingerprint,
            tensors=specs,
            num_rows=min((spec.shape[0] for spec in specs if spec.shape), default=0),
            location=Location(
                shm_tier_id=self.store.tier_id,
                redis=self.store.shared,
                fetch_address=self.identity.fetch_address,
            ),
        )
