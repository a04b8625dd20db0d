"""The registry: the workers of a namespace in Redis, each under a key that expires.

``on:v1:worker:NAMESPACE:INSTANCE`` holds a worker's entry for ``TTL_S`` after its last heartbeat.
The sorted set ``on:v1:workers:NAMESPACE:KIND`` holds the ids of a kind by their last heartbeat, so
that a reader asks only for the keys of the newest ones. Gateways only read.

The registry is a hint: a gateway probes and pairs the workers that it finds like those of its
command line, so a stale entry costs one probe. While Redis fails, gateways keep the workers that
they know; one log line says when a failure begins, and one when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from opticnerve.errors import ConfigError
from opticnerve.redis_server import OWN_OPTIONS, Outage, shown, split_options
from opticnerve.registry.entry import MAX_ENTRY_BYTES, EntrySeal, Kind, WorkerEntry
from opticnerve.telemetry.metrics import REGISTRY_FAILURES, REGISTRY_REACHABLE

HEARTBEAT_S = 1.0
TTL_S = 5  # How long an entry lives after a heartbeat.
FORGET_S = 3600  # Ids with no heartbeat for this long leave the index.
TIMEOUT_S = 2.0  # For connecting, and for each answer.
MAX_WORKERS = 4096  # The newest of one kind that are read.
DEFAULT_NAMESPACE = "default"

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")

log = logging.getLogger(__name__)


class Registry:
    """A client of the registry; ``close`` ends it. Errors are logged, not raised, including
    whatever redis-py raises if another program answers."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """``url``: in redis-py's form; ``?namespace=NAME`` separates deployments. ``token`` signs
        and checks entries. Raises ConfigError."""
        try:
            server, own = split_options(url, OWN_OPTIONS)
            self._client = Redis.from_url(
                server,
                socket_connect_timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            )
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # Only checks the options.
        except (ValueError, TypeError) as error:
            # The cause's message may show the URL, and with it a password.
            raise ConfigError("the registry's URL is not valid", param="registry") from error
        self.namespace = own.get("namespace", DEFAULT_NAMESPACE)
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ConfigError(
                "a registry's namespace has up to 64 letters, digits, dots, dashes and underscores",
                param="registry",
            )
        self.name = shown(server, self._client)  # For logs and /health.
        self._seal = EntrySeal(self.namespace, token)
        self._outage = Outage(
            self.name,
            "fails (%s) as the registry: gateways keep the workers that they know, and find new "
            "ones when it answers",
            "answers again as the registry",
        )
        self._ignored: dict[Kind, int] = {}  # Number of invalid entries at the last reading.

    @property
    def reachable(self) -> bool:
        """Whether the last command was answered; true before the first."""
        return not self._outage.failing

    async def close(self) -> None:
        await self._client.aclose()

    def _failed(self, error: Exception) -> None:
        self._outage.failed(error)
        REGISTRY_FAILURES.labels(self.namespace).inc()
        REGISTRY_REACHABLE.labels(self.namespace).set(0)

    def _answered(self) -> None:
        self._outage.ended()
        REGISTRY_REACHABLE.labels(self.namespace).set(1)

    # ---- for workers

    async def put(self, entry: WorkerEntry) -> None:
        """Writes the entry, which expires after ``TTL_S``."""
        index = self._index(entry.kind)
        try:
            # By Redis' clock: a worker whose own clock is ahead would drop all others.
            seconds, microseconds = await _answer(self._client.time())
            now = seconds + microseconds / 1e6
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.set(self._key(entry.instance_id), self._seal.write(entry), ex=TTL_S)
                pipeline.zadd(index, {entry.instance_id: now})
                pipeline.zremrangebyscore(index, "-inf", now - FORGET_S)
                pipeline.expire(index, FORGET_S)
                await _answer(pipeline.execute())
        except Exception as error:
            self._failed(error)
        else:
            self._answered()

    async def remove(self, entry: WorkerEntry) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.delete(self._key(entry.instance_id))
                pipeline.zrem(self._index(entry.kind), entry.instance_id)
                await _answer(pipeline.execute())
        except Exception as error:  # The entry will expire by itself.
            self._failed(error)

    # ---- for gateways

    async def entries(self, kind: Kind) -> list[WorkerEntry] | None:
        """The workers of a kind; None if Redis does not answer."""
        try:
            values = await self._values(kind)
        except Exception as error:
            self._failed(error)
            return None
        self._answered()
        found, faults = [], []
        for instance_id, value in values.items():
            try:
                found.append(self._read(kind, instance_id, value))
            except ValueError as error:
                faults.append(f"{instance_id!r}: {error}")
        if faults and not self._ignored.get(kind):
            log.warning(
                "registry %s: %d entries of kind %s are ignored; of %s",
                self.name, len(faults), kind, faults[0],
            )  # fmt: skip
        self._ignored[kind] = len(faults)
        return found

    async def _values(self, kind: Kind) -> dict[str, bytes]:
        """The stored entry of each worker, by id, without expired ones. Reads at most
        ``MAX_ENTRY_BYTES`` + 1 bytes of each."""
        newest = self._client.zrevrange(self._index(kind), 0, MAX_WORKERS - 1)
        ids: list[bytes] = await _answer(newest)
        names = [each[:64].decode("ascii", "replace") for each in ids]
        async with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.getrange(self._key(name), 0, MAX_ENTRY_BYTES)
            values = await _answer(pipeline.execute(raise_on_error=False))
        return {
            name: value if isinstance(value, bytes) else b""  # An error: the key is not a string.
            for name, value in zip(names, values, strict=True)
            if value
        }

    def _read(self, kind: Kind, instance_id: str, value: bytes) -> WorkerEntry:
        """Raises ValueError."""
        entry = self._seal.read(value)
        if (entry.kind, entry.instance_id) != (kind, instance_id):
            raise ValueError("it is the entry of another worker")
        return entry

    def _key(self, instance_id: str) -> str:
        return f"on:v1:worker:{self.namespace}:{instance_id}"

    def _index(self, kind: Kind) -> str:
        return f"on:v1:workers:{self.namespace}:{kind}"


async def _answer(command: Awaitable[Any]) -> Any:
    """The answer to a command. Raises CancelledError if its task was cancelled meanwhile, whether
    or not the command succeeded: redis-py uses ``wait_for``, which can swallow a cancellation
    before Python 3.12."""
    try:
        return await command
    finally:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
