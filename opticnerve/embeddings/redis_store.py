"""``redis://`` and ``rediss://``: the same bytes in Redis, behind a local tier.

A put goes to the local tier and to Redis; a value fetched from Redis is stored in the local tier.
Redis may fail: if it is down, hangs or refuses a call, that is a miss, logged once. It is probed
when the store is opened and every ``WATCH_S``, so that its state is known before it is needed.
While it fails, only the probe calls it, so that a failure costs a request ``ANSWER_TIMEOUT_S`` only
once. A server that refuses writes (a full one, or a replica) is only read.

With a secret (``Seal``) a value is a MAC followed by the bytes, and its name contains the secret's
id, so pools with different secrets can share a server; values of others are misses.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import redis
import torch
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.embeddings.signing import MAC_BYTES, Seal
from opticnerve.embeddings.store import Entry, StoreState, check_key
from opticnerve.errors import EmbeddingCorrupt, StoreError
from opticnerve.redis_server import Outage, shown
from opticnerve.telemetry.metrics import EMBEDDING_BYTES, STORE_FAILURES
from opticnerve.tensors.header import LENGTH

PREFIX = "on:v1:emb:"  # Of the names of unsigned values.
SIGNED_PREFIX = "on:v2:emb:"  # The secret's id follows.
PROBE = PREFIX + "probe"  # A name that no embedding has.
# Short, since a slower server is not much faster than encoding again.
CONNECT_TIMEOUT_S = 0.08
ANSWER_TIMEOUT_S = 0.08  # For the next bytes of an answer.
SEND_TIMEOUT_S = 2.0  # For all bytes of an embedding: MAX_BYTES at 1 Gbit/s.
WATCH_S = 1.0
MAX_BYTES = 128 * 2**20  # Of one embedding; larger ones travel by Fetch.
OVERHEAD = MAC_BYTES + LENGTH.size + codec.MAX_HEADER_BYTES  # In a value, beside the tensors.

log = logging.getLogger(__name__)

T = TypeVar("T")


class RedisStore:
    """A store in the Redis at ``url``, with ``local`` as its local tier, which it closes.

    ``url``: as redis-py reads it; its credentials are never logged, and its ``socket_timeout`` and
    ``socket_connect_timeout``, in seconds, give a distant server more time. ``ttl_s``: how long
    Redis keeps an embedding after its last use. ``seal`` signs values, and rejects those of others.
    Opening connects once, and logs if the server fails.
    """

    shared = True

    def __init__(
        self,
        url: str,
        local: ShmStore | MemoryStore,
        *,
        ttl_s: int = 3600,
        max_bytes: int = MAX_BYTES,
        seal: Seal | None = None,
    ) -> None:
        self.local = local
        self.tier_id = local.tier_id
        self.max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._seal = seal
        self._longest = max_bytes + OVERHEAD  # The most bytes read of any value.
        self._prefix = PREFIX if seal is None else f"{SIGNED_PREFIX}{seal.id}:"
        self._client = _client(url)
        self._sender = _client(url)
        timeouts = self._sender.connection_pool.connection_kwargs
        timeouts["socket_timeout"] = max(SEND_TIMEOUT_S, timeouts["socket_timeout"])
        name = shown(url, self._client)
        self._server = Breaker(
            name,
            (RedisError, OSError),
            "fails (%s): until it answers, look-ups there are misses, and embeddings travel by "
            "Fetch from the encoder that made them",
            "answers again",
        )
        self._writes = Breaker(  # Called within ``_server``.
            name,
            (ResponseError,),
            "refuses writes (%s): it is full, a replica or forbids them. Until it takes them, new "
            "embeddings travel by Fetch from the encoder that made them; where it is full, a "
            "maxmemory-policy such as allkeys-lru makes room",
            "takes writes again",
        )
        self._closed = threading.Event()
        self._look()
        threading.Thread(target=self._watch, name="redis-watch", daemon=True).start()

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
        check_key(key)
        kept = self._keep(lambda: self.local.put(key, tensors, meta))
        size = sum(spec.num_bytes for spec in codec.specs_of(tensors))
        if size <= self.max_bytes:
            kept = self._send(key, lambda: codec.encode(tensors, meta)) or kept
        if not kept:
            raise StoreError("neither the local tier nor Redis took the embedding")

    def put_bytes(self, key: str, data: bytes) -> None:
        codec.header_of(data, len(data))
        kept = self._keep(lambda: self.local.put_bytes(key, data))
        if len(data) <= self.max_bytes:
            kept = self._send(key, lambda: [data]) or kept
        if not kept:
            raise StoreError("neither the local tier nor Redis took the embedding")

    def get(self, key: str) -> Entry | None:
        with self._corrupt_deleted(key):
            entry = self.local.get(key)
            if entry is not None:
                return entry
            data = self._fetch(key)
            if data is None:
                return None
            entry = Entry(*codec.from_bytes(data))
        self._keep(lambda: self.local.put_bytes(key, data))
        return entry

    def read_bytes(self, key: str) -> bytes | None:
        with self._corrupt_deleted(key):
            data = self.local.read_bytes(key)
            return self._fetch(key) if data is None else data

    def contains(self, keys: Iterable[str]) -> set[str]:
        asked = list(keys)
        found = self.local.contains(asked)
        missing = [key for key in asked if key not in found]
        if not missing:
            return found

        def ask() -> list[Any]:
            with self._client.pipeline(transaction=False) as pipeline:
                for key in missing:
                    pipeline.exists(self._prefix + key)
                return pipeline.execute()

        there = self._server.call(ask) or [0] * len(missing)
        return found | {key for key, yes in zip(missing, there, strict=True) if yes}

    def lease(self, key: str, num_bytes: int) -> AbstractContextManager[None]:
        return self.local.lease(key, num_bytes)

    def leasable_bytes(self) -> int:
        return self.local.leasable_bytes()

    @property
    def state(self) -> StoreState:
        return StoreState("redis", reachable=not self._server.failing)

    def stored_bytes(self) -> int:
        return self.local.stored_bytes()

    def delete(self, key: str) -> None:
        try:
            self.local.delete(key)
        finally:
            self._delete_there(key)

    def close(self) -> None:
        self._closed.set()
        for client in (self._client, self._sender):
            with contextlib.suppress(RedisError):
                client.close()
        self.local.close()

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_S):
            try:
                self._look()
            except Exception:  # The watch must go on: only it notices when Redis answers again.
                log.exception("asking Redis for a sign of life failed")

    def _look(self) -> None:
        """Probes what the store needs: an answer to a GET, and a SET that is not refused."""
        self._server.probe(lambda: self._client.get(PROBE))
        if self._writes.failing:
            self._server.call(lambda: self._writes.probe(self._try_write))

    def _try_write(self) -> object:
        """A SET that is refused if others are, and stores nothing, since the key does not exist
        (XX)."""
        return self._client.set(PROBE, b"", xx=True)

    def _keep(self, write: Callable[[], None]) -> bool:
        """Writes to the local tier, and returns whether that succeeded; if not, Redis may
        succeed."""
        try:
            write()
        except StoreError as error:
            log.warning("the local embedding tier did not take an embedding: %s", error.message)
            return False
        return True

    def _send(self, key: str, pieces: Callable[[], Sequence[bytes | memoryview]]) -> bool:
        """Writes ``key`` to Redis, and returns whether it is there now. The first writer wins,
        except for signed values: a stored one may be anybody's, so it is replaced."""
        name = self._prefix + key

        def write() -> bool:
            if self._seal is not None:
                given = pieces()
                signed = b"".join([self._seal.mac(key, given), *given])
                self._sender.set(name, signed, ex=self._ttl_s)
                EMBEDDING_BYTES.labels("redis", "written").inc(len(signed))
            elif not self._client.expire(name, self._ttl_s):
                plain = b"".join(pieces())
                self._sender.set(name, plain, ex=self._ttl_s, nx=True)
                EMBEDDING_BYTES.labels("redis", "written").inc(len(plain))
            return True

        return bool(self._server.call(lambda: self._writes.call(write)))

    def _delete_there(self, key: str) -> None:
        delete = partial(self._client.delete, self._prefix + key)  # Even a full server deletes.
        self._server.call(lambda: self._writes.attempt(delete))

    def _fetch(self, key: str) -> bytes | None:
        """The value in Redis, checked, or None. Raises EmbeddingCorrupt."""

        def read() -> Any:
            with self._client.pipeline(transaction=False) as pipeline:
                pipeline.expire(self._prefix + key, self._ttl_s)
                pipeline.getrange(self._prefix + key, 0, self._longest)
                answers = pipeline.execute(raise_on_error=False)
            is_there, found = answers
            if _is_wrong_type(found):
                return b""  # The server works, but the value is no embedding.
            if isinstance(found, Exception):
                raise found
            if isinstance(is_there, Exception):  # Such as a replica, which refuses EXPIRE.
                return found or None
            return found if is_there else None

        data = self._server.call(read)
        if data is None:
            return None
        EMBEDDING_BYTES.labels("redis", "read").inc(len(data))
        if self._seal is not None:
            mac, data = data[:MAC_BYTES], data[MAC_BYTES:]
            if not self._seal.verify(mac, key, data, "redis"):
                self._delete_there(key)
                return None
        codec.header_of(data, len(data))
        return bytes(data)

    @contextlib.contextmanager
    def _corrupt_deleted(self, key: str) -> Iterator[None]:
        """Deletes an entry that is corrupt in one tier from both, since one may be a copy of the
        other."""
        try:
            yield
        except EmbeddingCorrupt:
            with contextlib.suppress(StoreError):
                self.delete(key)
            raise


class Breaker:
    """A circuit breaker: after a failure only ``probe`` calls Redis, until it succeeds.

    ``errors`` count as failures; others pass through. ``lost`` and ``again``: see ``Outage``.
    """

    def __init__(
        self, name: str, errors: tuple[type[Exception], ...], lost: str, again: str
    ) -> None:
        self._errors = errors
        self._outage = Outage(name, lost, again)

    @property
    def failing(self) -> bool:
        return self._outage.failing

    def call(self, operation: Callable[[], T]) -> T | None:
        """The result of ``operation``; None, without a call, while Redis fails."""
        return None if self.failing else self.attempt(operation)

    def attempt(self, operation: Callable[[], T]) -> T | None:
        """As ``call``, but also while Redis fails; a success does not close the breaker."""
        try:
            return operation()
        except self._errors as error:
            STORE_FAILURES.labels("redis").inc()
            self._outage.failed(error)
            return None

    def probe(self, operation: Callable[[], object]) -> None:
        """For the watch: calls even while Redis fails, and closes the breaker if that succeeds."""
        if self.attempt(lambda: (operation(),)) is not None and self.failing:
            self._outage.ended()


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    )


def _is_wrong_type(answer: Any) -> bool:
    """Whether Redis says that the value is not a string but, for example, a list."""
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")
