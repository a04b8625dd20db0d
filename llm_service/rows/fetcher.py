"""Brings rows to this host, off the engine's loop: the cheapest location first, then the next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import grpc

from llm_service import metrics
from llm_service.rows.caller_rows import OwnRows
from llm_service.rows.store_rows import Notes, Tensors, checked_tensors, forget, local_tier
from opticnerve import addresses
from opticnerve.addresses import Hosts
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.ref import EmbeddingRef, TensorSpec, check_shapes
from opticnerve.embeddings.seal import Seal
from opticnerve.embeddings.store import Store, StoreState
from opticnerve.errors import (
    EmbeddingCorrupt,
    EmbeddingEvicted,
    EmbeddingNotFound,
    EmbeddingUnavailable,
    InvalidRequest,
    OpticNerveError,
    StoreError,
    Unauthenticated,
)
from opticnerve.pb import encoder_pb2, encoder_pb2_grpc
from opticnerve.rpc.channel import open_channel
from opticnerve.rpc.errors import from_rpc
from opticnerve.telemetry import events
from opticnerve.tensors.header import LENGTH

FETCH_TIMEOUT_S = 30.0
THREADS = 4
MAX_CHANNELS = 64

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Fetcher:
    """Borrows the stores; owns its threads and channels. Belongs to one event loop.

    Rows are ``hidden_size`` wide, and the model has so many DeepStack ``levels``. What the local
    tier does not take (it is full of leases, or fails) goes to ``overflow``, where there is one.
    """

    def __init__(
        self,
        store: Store,
        overflow: MemoryStore | None,
        hidden_size: int,
        notes: Notes,
        *,
        levels: int = 0,
        token: str | None = None,
        encoders: Hosts | None = None,
        seal: Seal | None = None,
    ) -> None:
        """``token``: what calls to encoders carry. ``encoders``: the only hosts that are called;
        None: those that references name."""
        self._store = store
        self._tier = local_tier(store)
        self._overflow = overflow
        self._hidden_size = hidden_size
        self._levels = levels
        self.seal = seal
        self._notes = notes
        self._token = token
        self._encoders = encoders
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rows")
        self._channels: dict[str, grpc.aio.Channel] = {}  # The one used last stands last.
        self._flights: dict[str, asyncio.Task[None]] = {}
        self.own = OwnRows(self._drop_own)

    @property
    def store_state(self) -> StoreState:
        return self._store.state

    async def ensure(self, ref: EmbeddingRef) -> None:
        """Returns when the rows of ``ref`` are on this host, checked against it.

        Those who want one key at the same time share one flight; if it fails, each tries its own
        reference. Raises EmbeddingNotFound, EmbeddingEvicted or EmbeddingCorrupt, and
        InvalidRequest for rows that came with the request and are not finite.
        """
        while True:
            flight = self._flights.get(ref.key)
            mine = flight is None or flight.done()
            if flight is None or mine:
                flight = asyncio.create_task(self._bring(ref))
                self._flights[ref.key] = flight
                flight.add_done_callback(lambda task: self._landed(ref.key, task))
            try:
                return await asyncio.shield(flight)
            except (EmbeddingUnavailable, InvalidRequest):
                if mine:
                    raise

    async def names(self, own: Mapping[str, bytes]) -> dict[str, str]:
        """This worker's names of what a caller brings itself; see ``OwnRows.names``."""
        return await self._on_thread(self.own.names, own) if own else {}

    async def check_own(self, ref: EmbeddingRef) -> None:
        """Raises InvalidRequest for inline rows that are not those that their name is for."""
        data = ref.location.inline
        if data and not await self._on_thread(self.own.is_named, ref.key, data):
            raise InvalidRequest(
                "rows that come after Start are those of before, or their key is their SHA-256",
                param="ref",
            )

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        await asyncio.to_thread(self._threads.shutdown)

    def _landed(self, key: str, flight: asyncio.Task[None]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # Seen, even when those who waited have gone.

    async def _bring(self, ref: EmbeddingRef) -> None:
        corrupt = self._notes.take_corrupt(ref.key)
        try:
            if await self._on_thread(self._is_here, ref):
                return
        except EmbeddingCorrupt:
            corrupt = True
        for source in ("inline", "redis", "fetch"):
            try:
                data = await self._read(source, ref)
                if data is not None:
                    if source == "inline":
                        await self._on_thread(self._keep_own, ref, data)
                    else:
                        await self._on_thread(self._keep, ref, data, self._local())
                    return
            except EmbeddingCorrupt as error:
                log.warning("%.12s by %s is damaged: %s", ref.key, source, error.message)
                corrupt = True
                if source == "redis":  # Or whoever encodes it again would find it there.
                    await self._on_thread(forget, self._store, ref.key)
        raise self._failure(ref, corrupt)

    async def _read(self, source: str, ref: EmbeddingRef) -> bytes | None:
        """The bytes at one location; None where it has none. Raises EmbeddingCorrupt."""
        location = ref.location
        if source == "inline":
            return location.inline or None
        if source == "redis":
            if not (location.redis and self._store.shared):
                return None
            data = await self._on_thread(self._store.read_bytes, ref.key)
        else:
            if not location.fetch_address or not self._may_call(location.fetch_address):
                return None
            data = await self._fetch(ref)
        result = "miss" if data is None else "hit"
        metrics.CACHE_LOOKUPS.labels(tier=source, result=result).inc()
        return data

    def _may_call(self, address: str) -> bool:
        """References may come from a stranger, who could have this host call any other."""
        return self._encoders is None or addresses.host_of(address) in self._encoders

    async def _fetch(self, ref: EmbeddingRef) -> bytes | None:
        """From the encoder that made it. Its errors are misses: there may be another way. So is
        what is not signed, where this worker has the secret: anybody may have named the address."""
        address = ref.location.fetch_address
        stub = encoder_pb2_grpc.EncoderStub(await self._channel(address))
        limit = ref.num_bytes + codec.MAX_HEADER_BYTES + LENGTH.size
        data, mac = bytearray(), b""
        call = stub.Fetch(encoder_pb2.FetchRequest(key=ref.key), timeout=FETCH_TIMEOUT_S)
        try:
            async for part in call:
                data += part.data
                mac = mac or part.mac
                if max(len(data), part.num_bytes) > limit:
                    raise EmbeddingCorrupt("an encoder sent more than the reference describes")
        except grpc.RpcError as error:
            told = from_rpc(error)
            events.also(fetch_failed=f"{address} {told.code or told.type}")
            if isinstance(told, Unauthenticated):
                log.warning("Fetch from %s: %s", address, told.message)
            return None
        finally:
            call.cancel()
        found, seal = bytes(data), self.seal
        if seal is None or await self._on_thread(seal.fits, mac, ref.key, found, "fetch"):
            return found
        return None

    async def _channel(self, address: str) -> grpc.aio.Channel:
        """Encoders come and go under new addresses: those used longest ago are given up."""
        channel = self._channels.pop(address, None)
        if channel is None:  # With a scheme, so that gRPC sees none in a host called "unix".
            channel = open_channel(f"dns:///{address}", self._token)
        self._channels[address] = channel
        while len(self._channels) > MAX_CHANNELS:
            await self._channels.pop(next(iter(self._channels))).close()
        return channel

    def _drop_own(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # The threads have ended, and the worker with them.
            self._threads.submit(self._forget_own, name)

    async def _on_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    # ---- on a thread

    def _is_here(self, ref: EmbeddingRef) -> bool:
        """Whether this host has rows that fit ``ref``; what does not is deleted and corrupt."""
        for store in self._local():
            tensors = checked_tensors(store, ref.key, partial(self._check, ref))
            if tensors is not None:
                return True  # The engine counts the hit when it loads the rows.
        metrics.CACHE_LOOKUPS.labels(tier="shm", result="miss").inc()
        return False

    def _keep_own(self, ref: EmbeddingRef, data: bytes) -> None:
        """What the caller brought, in the tier only where there is no other room. Raises
        InvalidRequest for what is not finite: sent again it would be no better."""
        if not codec.is_finite(codec.from_bytes(data)[0]):
            raise InvalidRequest(
                "embeddings have finite values, no NaN and no infinity", param="ref"
            )
        self._keep(ref, data, self._local()[::-1])
        if not self.own.is_held(ref.key):  # The caller left meanwhile.
            self._forget_own(ref.key)

    def _forget_own(self, name: str) -> None:
        for store in self._local():
            forget(store, name)

    def _keep(self, ref: EmbeddingRef, data: bytes, stores: Sequence[Store]) -> None:
        """Checks bytes that came from elsewhere, and puts them where the engine finds them."""
        tensors, meta = codec.from_bytes(data)
        self._check(ref, tensors)
        codec.verify(tensors, meta)
        for store in stores:
            try:
                store.put_bytes(ref.key, data)
                return
            except StoreError as error:
                log.warning("a tier did not take an embedding: %s", error.message)
        raise EmbeddingNotFound("no memory of this host takes the embedding now")

    def _check(self, ref: EmbeddingRef, tensors: Tensors) -> None:
        """Raises EmbeddingCorrupt for what does not fit ``ref`` or the model."""
        check_fit(ref, codec.specs_of(tensors), self._hidden_size, self._levels)

    def _local(self) -> Sequence[Store]:
        return (self._tier,) if self._overflow is None else (self._tier, self._overflow)

    def _failure(self, ref: EmbeddingRef, corrupt: bool) -> OpticNerveError:
        location = ref.location
        if corrupt:
            return EmbeddingCorrupt("the embedding was damaged", param=ref.key)
        was_here = bool(location.shm_tier_id) and location.shm_tier_id == self._tier.tier_id
        if was_here or (location.redis and self._store.shared):
            return EmbeddingEvicted("the embedding is gone from where it was", param=ref.key)
        if location.fetch_address and not self._may_call(location.fetch_address):
            log.warning("not fetching from %s: --fetch-from", location.fetch_address)
            return EmbeddingNotFound(
                "the LLM worker may not fetch the embedding from where it is; give gateway and "
                "workers one --rpc-token-file, or name the encoders in the worker's --fetch-from",
                param=ref.key,
            )
        return EmbeddingNotFound("no location has the embedding", param=ref.key)


def check_fit(
    ref: EmbeddingRef, specs: Sequence[TensorSpec], hidden_size: int, levels: int
) -> None:
    """Raises EmbeddingCorrupt unless ``specs`` are what ``ref`` says and the model takes."""
    found = {spec.name: spec for spec in specs}
    if ref.tensors and found != {spec.name: spec for spec in ref.tensors}:
        raise EmbeddingCorrupt("the embedding's tensors are not those of its reference")
    check_shapes(specs, ref.num_rows, hidden_size, levels)
