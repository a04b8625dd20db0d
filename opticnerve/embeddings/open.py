"""Opens a store by its URL, or by a worker's configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlsplit

from opticnerve import addresses
from opticnerve.config import StoreConfig, options
from opticnerve.config.shared import REDIS_SCHEMES
from opticnerve.embeddings.memory_store import DEFAULT_CAPACITY, MemoryStore
from opticnerve.embeddings.redis_store import MAX_BYTES, RedisStore
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import Store
from opticnerve.errors import ConfigError, StartupError, StoreError
from opticnerve.redis_server import OWN_OPTIONS, split_options
from opticnerve.telemetry import metrics

FORMS = "the store is memory://, shm://[dir][?capacity=], redis:// or rediss://"

OpenStore = Callable[[StoreConfig, Seal | None, AsyncExitStack], Store]

log = logging.getLogger(__name__)


def open_store(url: str, *, ttl_s: int = 3600, seal: Seal | None = None) -> Store:
    """The store that ``url`` names; the caller closes it.

    ``memory://[?capacity=]``; ``shm://[/dir][?capacity=]``; ``redis://`` and ``rediss://`` as
    redis-py reads them, and in addition ``local=`` (the URL of the local tier, ``shm://`` by
    default) and ``max_bytes=`` (of one embedding). Sizes may have a unit: ``2GiB``, ``512M``.
    ``seal`` (``Seal.load("FILE")``) signs and checks values in Redis; a Redis on another machine
    without one causes a warning. Raises ConfigError for a wrong URL, StoreError if the store cannot
    be opened.
    """
    scheme = _split(url).scheme
    if scheme in ("memory", "shm"):
        return _open_local(url)
    if scheme in REDIS_SCHEMES:
        return _open_redis(url, ttl_s, seal)
    raise ConfigError(FORMS, param="store")


def open_worker_store(config: StoreConfig, seal: Seal | None, stack: AsyncExitStack) -> Store:
    """A worker's store, whose size is exported as a metric; ``stack`` closes it. Raises
    StartupError."""
    try:
        store = open_store(config.read_url(), ttl_s=config.store_ttl_s, seal=seal)
    except StoreError as error:
        raise StartupError(error.message) from error
    stack.callback(store.close)
    stack.enter_context(metrics.collected(lambda: metrics.store_size(store)))
    return store


def open_local_tier(url: str) -> ShmStore | MemoryStore:
    """Only the local tier of the store that ``url`` names, for a process beside one that has the
    whole store. Raises like ``open_store``."""
    if _split(url).scheme in REDIS_SCHEMES:
        url = _split_redis(url)[1]
    return _open_local(url)


def local_tier(store: Store) -> Store:
    """The tier of ``store`` on this machine."""
    return store.local if isinstance(store, RedisStore) else store


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ConfigError(FORMS, param="store") from error


def _open_local(url: str) -> ShmStore | MemoryStore:
    parts = urlsplit(url)
    given = _options(parts.query, {"capacity"})
    capacity = parse_size(given["capacity"]) if "capacity" in given else None
    if parts.scheme == "memory":
        if parts.netloc or parts.path.strip("/"):
            raise ConfigError("memory:// takes no path", param="store")
        return MemoryStore(DEFAULT_CAPACITY if capacity is None else capacity)
    if parts.scheme != "shm":
        raise ConfigError("a local tier is shm:// or memory://", param="store")
    if parts.netloc:
        raise ConfigError("shm:// takes an absolute directory: shm:///dir", param="store")
    return ShmStore(Path(parts.path) if parts.path.strip("/") else None, capacity)


def _open_redis(url: str, ttl_s: int, seal: Seal | None) -> RedisStore:
    server, local_url, max_bytes = _split_redis(url)
    if seal is None and addresses.is_elsewhere(server):
        log.warning(
            "anyone who can write to the Redis of --store can replace what the model sees of other "
            "users' pictures: give encoders and LLM workers the same --store-key-file, which signs "
            "values"
        )
    local = _open_local(local_url)
    try:
        return RedisStore(server, local, ttl_s=ttl_s, max_bytes=max_bytes, seal=seal)
    except (ValueError, TypeError) as error:
        local.close()
        # Without the cause's text, which may show the URL and a password in it.
        raise ConfigError("the Redis URL is not valid for redis-py", param="store") from error


def _split_redis(url: str) -> tuple[str, str, int]:
    """(URL for redis-py, the local tier's URL, max_bytes). Raises ConfigError."""
    server, own = split_options(url, OWN_OPTIONS)
    if "decode_responses" in own:
        raise ConfigError("embeddings are bytes: leave decode_responses out", param="store")
    max_bytes = parse_size(own.get("max_bytes", str(MAX_BYTES)))
    return server, own.get("local", "shm://"), max_bytes


def _options(query: str, known: set[str]) -> dict[str, str]:
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigError(f"the store's URL has unknown options: {', '.join(unknown)}")
    return given


def parse_size(text: str) -> int:
    """Bytes of "1048576", "512M", "2GiB". Raises ConfigError."""
    try:
        size = options.parse_size(text)
    except ValueError as error:
        raise ConfigError(str(error), param="store") from error
    if size <= 0:
        raise ConfigError("a size must be positive", param="store")
    return size
