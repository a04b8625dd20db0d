"""Fetches embedding rows to this host, from the cheapest location that has them.

A caller may send rows inline under any key, even that of another user's picture. They are therefore
renamed here: to a hash of their bytes under a random secret of this process, which is unique in the
tier and in the prefix cache. They are deleted when no request holds that name any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import grpc

from llm_service.rows.store_rows import StoreRows, Tensors
from opticnerve import addresses
from opticnerve.addresses import Hosts
from opticnerve.embeddings import codec
from opticnerve.embeddings.ref import EmbeddingRef, TensorSpec, check_shapes, tensors_key
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import Store
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
from opticnerve.rpc.tls import ChannelTls
from opticnerve.single_flight import Flights
from opticnerve.telemetry import logs, traces
from opticnerve.telemetry.metrics import CACHE_LOOKUPS, EMBEDDING_BYTES
from opticnerve.tensors.header import LENGTH

FETCH_TIMEOUT_S = 30.0
THREADS = 4
MAX_CHANNELS = 64

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Fetcher:
    """Borrows ``store`` and ``rows``; owns its threads and channels. Belongs to one event loop.

    Fetched rows are stored in the local tier, or in ``rows``'s overflow if the tier refuses them
    (it is full of leases, or fails). Rows have ``hidden_size`` columns; the model has ``levels``
    DeepStack levels.
    """

    def __init__(
        self,
        store: Store,
        rows: StoreRows,
        hidden_size: int,
        *,
        levels: int = 0,
        token: str | None = None,
        tls: ChannelTls | None = None,
        encoders: Hosts | None = None,
        seal: Seal | None = None,
    ) -> None:
        """``token``: sent with calls to encoders, which ``tls`` encrypts. ``encoders``: the hosts
        that may be called; None: any that a reference names."""
        self.store = store
        self._rows = rows
        self._hidden_size = hidden_size
        self._levels = levels
        self.seal = seal
        self._token = token
        self._tls = tls
        self._encoders = encoders
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rows")
        self._channels: dict[str, grpc.aio.Channel] = {}  # Least recently used first.
        self._flights: Flights[None] = Flights()
        self._tier = "shm" if store.tier_id else "memory"  # The local tier's name in metrics.
        self._secret = secrets.token_bytes(32)
        self._holders: Counter[str] = Counter()  # Requests that hold a caller's own rows, by name.

    async def ensure(self, ref: EmbeddingRef) -> None:
        """Brings the rows of ``ref`` to this host and checks them against it; loads them if an
        engine in this process holds a lease on them. They may be evicted again at any time; then
        the engine asks again.

        Concurrent calls for one key share one run; if it fails, each tries its own reference.
        Raises EmbeddingNotFound, EmbeddingEvicted or EmbeddingCorrupt, and InvalidRequest for
        rows that came with the request and are not finite.
        """
        while True:
            joined = ref.key in self._flights
            try:
                return await self._flights.run(ref.key, lambda: self._bring(ref))
            except (EmbeddingUnavailable, InvalidRequest):
                if not joined:
                    raise

    async def find(self, key: str) -> bool:
        """Loads rows of ``key`` without a reference; returns whether this host has them."""
        found = await self._on_thread(self._load, key)
        if found:  # A miss is counted once there is a reference.
            CACHE_LOOKUPS.labels(tier=self._tier, result="hit").inc()
            traces.current().set(tier=self._tier, cache="hit")
        return found

    async def present(self, keys: Iterable[str]) -> set[str]:
        """Those of ``keys`` whose rows are on this host; nothing is read."""
        return await self._on_thread(self._rows.present, keys)

    async def names(self, own: Mapping[str, bytes]) -> dict[str, str]:
        """This worker's names for rows that a caller sends inline, by the caller's keys. ``own``:
        the rows' safetensors bytes by key; b"" if they come later, in which case the key has to be
        their ``tensors_key``."""

        def name_all() -> dict[str, str]:
            return {k: self._own_name(tensors_key(data) if data else k) for k, data in own.items()}

        return await self._on_thread(name_all) if own else {}

    async def check_own(self, ref: EmbeddingRef) -> None:
        """Raises InvalidRequest for inline rows whose bytes do not have the name of ``ref``."""
        data = ref.location.inline
        if data and self._own_name(await self._on_thread(tensors_key, data)) != ref.key:
            raise InvalidRequest(
                "inline rows sent after Start must match the item: its bytes in Start, or a key "
                "that is their SHA-256",
                param="ref",
            )

    @contextlib.contextmanager
    def hold_own(self, names: Iterable[str]) -> Iterator[None]:
        """Keeps a caller's own rows of these names while the context lasts. Rows that no request
        holds any more are deleted."""
        held = set(names)
        self._holders.update(held)
        try:
            yield
        finally:
            self._holders.subtract(held)
            for name in held:
                if not self._holders[name]:
                    del self._holders[name]
                    # Once the worker is closed, its threads have ended.
                    with contextlib.suppress(RuntimeError):
                        self._threads.submit(self._forget_own, name)

    async def close(self) -> None:
        """To be called after the calls that wait for rows have ended."""
        for channel in self._channels.values():
            await channel.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def _bring(self, ref: EmbeddingRef) -> None:
        found = await self._on_thread(self._load, ref.key, ref)
        CACHE_LOOKUPS.labels(tier=self._tier, result="hit" if found else "miss").inc()
        if found:
            EMBEDDING_BYTES.labels(self._tier, "read").inc(ref.num_bytes)
            traces.current().set(tier=self._tier, cache="hit", bytes=ref.num_bytes)
            return
        traces.current().set(cache="miss")
        corrupt = self._rows.take_damaged(ref.key)
        for source in ("inline", "redis", "fetch"):
            try:
                data = await self._read(source, ref)
                if data is None:
                    continue
                traces.current().set(tier=source, cache="hit", bytes=len(data))
                if source != "redis":  # The store counts its own reads.
                    EMBEDDING_BYTES.labels(source, "read").inc(len(data))
                await self._on_thread(self._keep, ref, data, source == "inline")
                loaded = await self._on_thread(self._load, ref.key, ref)
                if loaded or not self._rows.take_damaged(ref.key):
                    return  # If they were evicted at once, the engine asks for them again.
                corrupt = True
            except EmbeddingCorrupt as error:
                log.warning(
                    "the embedding %.12s from %s is damaged: %s", ref.key, source, error.message
                )
                corrupt = True
                if source == "redis":  # An encoder that is asked to encode again looks there first.
                    await self._on_thread(codec.forget, self.store, ref.key)
        raise self._failure(ref, corrupt)

    async def _read(self, source: str, ref: EmbeddingRef) -> bytes | None:
        """The bytes at one location; None if it does not have them. Raises EmbeddingCorrupt."""
        location = ref.location
        if source == "inline":
            return location.inline or None
        if source == "redis":
            if not (location.redis and self.store.shared):
                return None
            data = await self._on_thread(self.store.read_bytes, ref.key)
        else:
            if not location.fetch_address or not self._may_call(location.fetch_address):
                return None
            data = await self._fetch(ref)
        result = "miss" if data is None else "hit"
        CACHE_LOOKUPS.labels(tier=source, result=result).inc()
        return data

    def _may_call(self, address: str) -> bool:
        """Whether an encoder at ``address`` may be called. Without this check a caller's reference
        could make this host connect to any address."""
        return self._encoders is None or addresses.host_of(address) in self._encoders

    async def _fetch(self, ref: EmbeddingRef) -> bytes | None:
        """The bytes from the encoder that made them, or None. Errors count as misses, since another
        location may have the rows. So do rows without a valid MAC if this worker has a ``seal``."""
        address = ref.location.fetch_address
        stub = encoder_pb2_grpc.EncoderStub(await self._channel(address))
        limit = ref.num_bytes + codec.MAX_HEADER_BYTES + LENGTH.size
        data, mac = bytearray(), b""
        call = stub.Fetch(
            encoder_pb2.FetchRequest(key=ref.key),
            timeout=FETCH_TIMEOUT_S,
            metadata=traces.current().carrier,
        )
        try:
            async for part in call:
                data += part.data
                mac = mac or part.mac
                if max(len(data), part.num_bytes) > limit:
                    raise EmbeddingCorrupt("an encoder sent more than the reference describes")
        except grpc.RpcError as error:
            failure = from_rpc(error)
            logs.append(fetch_failed=f"{address} {failure.code or failure.type}")
            if isinstance(failure, Unauthenticated):
                log.warning("Fetch from %s: %s", address, failure.message)
            return None
        finally:
            call.cancel()
        found, seal = bytes(data), self.seal
        if seal is None or await self._on_thread(seal.verify, mac, ref.key, found, "fetch"):
            return found
        return None

    async def _channel(self, address: str) -> grpc.aio.Channel:
        """A channel to ``address``; closes the least recently used beyond ``MAX_CHANNELS``."""
        channel = self._channels.pop(address, None)
        if channel is None:  # The scheme keeps gRPC from taking a host called "unix" for one.
            channel = open_channel(f"dns:///{address}", self._token, self._tls)
        self._channels[address] = channel
        while len(self._channels) > MAX_CHANNELS:
            await self._channels.pop(next(iter(self._channels))).close()
        return channel

    async def _on_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    # ---- on a thread

    def _load(self, key: str, ref: EmbeddingRef | None = None) -> bool:
        """Whether this host has rows of ``key`` that fit ``ref``; what does not fit is deleted."""

        def check(tensors: Tensors) -> None:
            if ref is not None:
                self._check(ref, tensors)

        return self._rows.load(key, check)

    def _own_name(self, key: str) -> str:
        return hashlib.blake2b(key.encode(), key=self._secret, digest_size=32).hexdigest()

    def _forget_own(self, name: str) -> None:
        for store in self._rows.stores:
            codec.forget(store, name)

    def _keep(self, ref: EmbeddingRef, data: bytes, inline: bool) -> None:
        """Checks fetched bytes and stores them on this host.

        Bytes that the caller sent ``inline`` go to the overflow first, others to the tier first.
        Raises EmbeddingCorrupt, and InvalidRequest for inline rows that are not finite.
        """
        tensors, meta = codec.from_bytes(data)
        if inline and not codec.is_finite(tensors):
            raise InvalidRequest(
                "the values of embeddings must be finite: no NaN, no infinity", param="ref"
            )
        self._check(ref, tensors)
        codec.verify(tensors, meta)
        for store in self._rows.stores[:: -1 if inline else 1]:
            try:
                store.put_bytes(ref.key, data)
                break
            except StoreError as error:
                log.warning("a tier refused an embedding: %s", error.message)
        else:
            raise EmbeddingNotFound("this host has no room for the embedding")
        if inline and not self._holders[ref.key]:  # The request has ended meanwhile.
            self._forget_own(ref.key)

    def _check(self, ref: EmbeddingRef, tensors: Tensors) -> None:
        """Raises EmbeddingCorrupt for tensors that do not fit ``ref`` or the model."""
        check_fit(ref, codec.specs_of(tensors), self._hidden_size, self._levels)

    def _failure(self, ref: EmbeddingRef, corrupt: bool) -> OpticNerveError:
        location = ref.location
        if corrupt:
            return EmbeddingCorrupt("the embedding was damaged", param=ref.key)
        was_here = bool(location.shm_tier_id) and location.shm_tier_id == self.store.tier_id
        if was_here or (location.redis and self.store.shared):
            return EmbeddingEvicted("the embedding was evicted from its store", param=ref.key)
        if location.fetch_address and not self._may_call(location.fetch_address):
            log.warning("not fetching from %s: not in --fetch-from", location.fetch_address)
            return EmbeddingNotFound(
                "the LLM worker may not fetch the embedding from its encoder; give gateway and "
                "workers the same --rpc-token-file, or list the encoders in the worker's "
                "--fetch-from",
                param=ref.key,
            )
        return EmbeddingNotFound("no location has the embedding", param=ref.key)


def check_fit(
    ref: EmbeddingRef, specs: Sequence[TensorSpec], hidden_size: int, levels: int
) -> None:
    """Raises EmbeddingCorrupt unless ``specs`` match ``ref`` and the model."""
    found = {spec.name: spec for spec in specs}
    if ref.tensors and found != {spec.name: spec for spec in ref.tensors}:
        raise EmbeddingCorrupt("the embedding's tensors differ from its reference")
    check_shapes(specs, ref.num_rows, hidden_size, levels)
