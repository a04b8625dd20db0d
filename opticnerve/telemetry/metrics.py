"""Prometheus metrics that every service has, and how a process exports its own.

What is created here has labels, so that a process exports a value only of what it has counted
itself. Each service has a module ``metrics`` of its own with the rest: nothing is created in a
process that cannot know its value. Stage names are those of timings and traces: fetch, queue,
preprocess, encode, put, get, prefill, decode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from opticnerve import addresses
from opticnerve.errors import StoreError

if TYPE_CHECKING:
    from opticnerve.embeddings.store import Store

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

STAGE_SECONDS = Histogram(
    "opticnerve_stage_seconds", "Time spent in one stage of a request", ["stage"], buckets=SECONDS
)
CACHE_LOOKUPS = Counter(
    "opticnerve_embedding_lookups_total",
    "Embedding look-ups by tier (reference, shm, redis, fetch, prefix) and result (hit, miss)",
    ["tier", "result"],
)
EMBEDDINGS_REFUSED = Counter(
    "opticnerve_embeddings_refused_total",
    "Embeddings by tier (redis, fetch) that were not signed with the secret of --store-key-file",
    ["tier"],
)


class _Reader(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Reserves no names: tests run several workers in one process."""
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._read()


@contextlib.contextmanager
def reading(read: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """While the context lasts, ``read`` is asked for values whenever metrics are scraped, on a
    thread of the exporter's."""
    reader = _Reader(read)
    REGISTRY.register(reader)
    try:
        yield
    finally:
        REGISTRY.unregister(reader)


def of_store(store: Store) -> Iterator[Metric]:
    """The size of a local tier; nothing where it cannot be told."""
    with contextlib.suppress(StoreError):  # Its directory has gone.
        yield GaugeMetricFamily(
            "opticnerve_store_bytes",
            "Bytes in the local tier of the embedding store, of all its writers",
            store.stored_bytes(),
        )


def serve(port: int, host: str) -> str:
    """Serves /metrics at ``host`` on a port of its own, 0 for a free one; returns its URL.

    Raises ConfigError where the port cannot be had.
    """
    addresses.check_free(host, port, "--metrics-port")
    server, _ = start_http_server(port, addr=host.strip("[]"))
    return f"http://{addresses.host_port(host, server.server_port)}/metrics"
