"""Prometheus metrics that several services have, and how a process exports its metrics.

All metrics here have labels, so a process exports no values that it has not counted. Metrics of one
service are in its own module ``metrics``, so that no other process exports them. Labels have few
values: never a request's id, nor text that a client sent. Stages have the same names as in timings
and traces, and each is observed once, by the process in which it takes place.

A fault shows in one counter of the process that dealt with it; docs/operations.md says which.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from opticnerve import addresses
from opticnerve.errors import OpticNerveError, StoreError

if TYPE_CHECKING:
    from opticnerve.config import TelemetryConfig
    from opticnerve.embeddings.store import Store

log = logging.getLogger(__name__)

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # The directory in which processes count together.

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
EMBEDDING_BYTES = Counter(
    "opticnerve_embedding_bytes_total",
    "Bytes of embeddings by tier (memory, shm, redis, fetch, inline) and direction (read, written)",
    ["tier", "direction"],
)
EVICTIONS = Counter(
    "opticnerve_embedding_evictions_total",
    "Embeddings that this process evicted to make room, by tier (memory, shm)",
    ["tier"],
)
STORE_FAILURES = Counter(
    "opticnerve_store_failures_total",
    "Operations that a tier of the embedding store refused or failed, by tier (memory, shm, redis)",
    ["tier"],
)
REGISTRY_REACHABLE = Gauge(
    "opticnerve_registry_reachable",
    "1 while the registry answers this process, 0 while it does not, by namespace",
    ["namespace"],
    multiprocess_mode="livemin",
)
REGISTRY_FAILURES = Counter(
    "opticnerve_registry_failures_total",
    "Commands that the registry's Redis did not answer or refused, by namespace",
    ["namespace"],
)
ERRORS = Counter(
    "opticnerve_errors_total",
    "Requests and calls that ended in an error, by its code and by place (an HTTP route, or the "
    "method of a call)",
    ["place", "code"],
)


def count_error(place: str, error: OpticNerveError) -> None:
    """``place``: an HTTP route or the name of a gRPC method, as it is declared."""
    ERRORS.labels(place, error.code or error.type).inc()


class _CallbackCollector(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Reserves no metric names, because one process may run several workers."""
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._read()


@contextlib.contextmanager
def collected(read: Callable[[], Iterable[Metric]]) -> Iterator[None]:
    """While the context lasts, each scrape calls ``read`` for metrics, on the exporter's thread."""
    collector = _CallbackCollector(read)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


def store_size(store: Store) -> Iterator[Metric]:
    """The size of a store's local tier; nothing if it cannot be read."""
    with contextlib.suppress(StoreError):  # The tier's directory was removed.
        yield GaugeMetricFamily(
            "opticnerve_store_bytes",
            "Bytes in the local tier of the embedding store, of all its writers",
            store.stored_bytes(),
        )


def sum_of_processes(directory: Path) -> CollectorRegistry:
    """The counts of all processes that share this directory, including those that have ended."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    return registry


def own_registry() -> CollectorRegistry:
    """What a scrape of this process shows: the sum over all processes that it counts together
    with."""
    directory = os.environ.get(DIRECTORY)
    return REGISTRY if directory is None else sum_of_processes(Path(directory))


def export(
    config: TelemetryConfig, service_host: str, registry: CollectorRegistry = REGISTRY
) -> None:
    """Serves /metrics on a port of its own, if one is set (0: a free one), and logs its URL. It
    listens where the service does, at ``service_host``, unless another host is set.

    Raises ConfigError if it cannot listen there.
    """
    port, host = config.metrics_port, config.metrics_host or service_host
    if port >= 0:
        addresses.check_free(host, port, "--metrics-port")
        server, _ = start_http_server(port, host.strip("[]"), registry)
        log.info("metrics at http://%s/metrics", addresses.host_port(host, server.server_port))
