"""Stores finished embeddings; in this process's memory if the store refuses them.

Store calls that move data or cross a network run on threads of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from encoder_service.backends.base import Embedding
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.ref import EmbeddingRef, Location, TensorSpec
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import Store
from opticnerve.errors import EngineFailure, NotFound, StoreError
from opticnerve.telemetry import traces
from opticnerve.telemetry.metrics import CACHE_LOOKUPS, EMBEDDING_BYTES

log = logging.getLogger(__name__)

THREADS = 2
FALLBACK_BYTES = 2**29

P = ParamSpec("P")
R = TypeVar("R")


class Results:
    """Borrows the store. Owns threads for calls to it, and ``fallback``, from which Fetch serves
    embeddings that the store refused. ``close`` ends the threads."""

    def __init__(
        self, store: Store, fingerprint: str, fetch_address: str, seal: Seal | None = None
    ) -> None:
        """``fetch_address``: host:port of this encoder's Fetch. ``seal`` signs what Fetch sends."""
        self.store = store
        self.seal = seal
        self.fetch_address = fetch_address
        self.fallback = MemoryStore(FALLBACK_BYTES)
        self._fingerprint = fingerprint
        self._tier = "shm" if store.tier_id else "redis" if store.shared else "memory"
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")

    async def look_up(self, key: str) -> EmbeddingRef | None:
        """A reference to the embedding that is stored under ``key``, or None."""
        if self.store.shared:
            ref = await self._run(self._stored, key)
        else:  # Opening a file on tmpfs is faster than using a thread.
            ref = self._stored(key)
        return self._counted(ref)

    async def renew(self, key: str) -> EmbeddingRef | None:
        """Like ``look_up``, for an embedding that a consumer could not use. Checks every byte;
        deletes the embedding if it is damaged, and otherwise stores it again where consumers
        look."""
        return self._counted(await self._run(self._renew, key))

    async def delete(self, key: str) -> None:
        """Deletes an embedding that does not fit its item."""
        log.warning("the stored %s does not fit its item and is deleted", key)
        self.fallback.delete(key)
        await self._run(self.store.delete, key)

    async def publish(self, key: str, embedding: Embedding) -> tuple[EmbeddingRef, float]:
        """Stores an embedding; returns its reference and the seconds taken.

        Raises EngineFailure, and stores nothing, if values are NaN or infinite; StoreFull if
        neither the store nor ``fallback`` has room for it.
        """
        return await self._run(self._put, key, embedding)

    async def read(self, key: str) -> tuple[bytes, bytes]:
        """(an embedding's safetensors bytes, their MAC: b"" without a secret). Raises NotFound, and
        InvalidRequest for a ``key`` that is no content key."""
        return await self._run(self._read_signed, key)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _counted(self, ref: EmbeddingRef | None) -> EmbeddingRef | None:
        result = "hit" if ref else "miss"
        CACHE_LOOKUPS.labels(tier=self._tier, result=result).inc()
        traces.current().set(tier=self._tier, cache=result)
        return ref

    async def _run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    # ---- on a store thread

    def _stored(self, key: str) -> EmbeddingRef | None:
        data = self.fallback.read_bytes(key)
        if data is not None:
            return self._fallback_reference(key, data)
        with codec.damage_is_a_miss(self.store, key):
            entry = self.store.get(key)
            if entry is not None:
                return self._reference(key, codec.specs_of(entry.tensors))
        return None

    def _put(self, key: str, embedding: Embedding) -> tuple[EmbeddingRef, float]:
        started = time.monotonic()
        if not codec.is_finite(embedding):
            log.error("the embedding of %s is not finite", key)
            raise EngineFailure(
                "the encoder computed values for this picture that are not finite; with --dtype "
                "float16 they may exceed its range: use bfloat16 or float32"
            )
        ref = self._reference(key, codec.specs_of(embedding))
        meta = {"key": key, "fingerprint": self._fingerprint}
        try:
            self.store.put(key, embedding, meta)
        except StoreError as error:
            ref = self._fall_back(key, codec.to_bytes(embedding, meta), error)
        return ref, time.monotonic() - started

    def _renew(self, key: str) -> EmbeddingRef | None:
        data = self._read(key)
        if data is None:
            return None
        try:
            self.store.put_bytes(key, data)  # The local tier has it, but Redis may have lost it.
        except StoreError as error:
            return self._fall_back(key, data, error)
        self.fallback.delete(key)
        return self._reference(key, codec.header_of(data, len(data)).tensors)

    def _fall_back(self, key: str, data: bytes, error: StoreError) -> EmbeddingRef:
        log.warning("the store refused an embedding; Fetch serves it: %s", error.message)
        self.fallback.put_bytes(key, data)
        return self._fallback_reference(key, data)

    def _read(self, key: str) -> bytes | None:
        """The bytes in the store, fully checked, or those in ``fallback``."""
        with codec.damage_is_a_miss(self.store, key):
            data = self.store.read_bytes(key)
            if data is not None:
                codec.verify(*codec.from_bytes(data))
                return data
        return self.fallback.read_bytes(key)

    def _read_signed(self, key: str) -> tuple[bytes, bytes]:
        data = self._read(key)
        if data is None:
            raise NotFound("this encoder does not hold that embedding; encode the item again")
        EMBEDDING_BYTES.labels("fetch", "written").inc(len(data))
        return data, b"" if self.seal is None else self.seal.mac(key, [data])

    def _reference(self, key: str, specs: tuple[TensorSpec, ...]) -> EmbeddingRef:
        return EmbeddingRef(
            key=key,
            fingerprint=self._fingerprint,
            tensors=specs,
            num_rows=min((spec.shape[0] for spec in specs if spec.shape), default=0),
            location=Location(
                shm_tier_id=self.store.tier_id,
                redis=self.store.shared,
                fetch_address=self.fetch_address,
            ),
        )

    def _fallback_reference(self, key: str, data: bytes) -> EmbeddingRef:
        ref = self._reference(key, codec.header_of(data, len(data)).tensors)
        return ref.at(Location(fetch_address=self.fetch_address))
