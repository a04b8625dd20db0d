"""Prometheus metrics of every service. Stage names are those of timings and traces.

Stages: fetch, queue, preprocess, encode, put, get, prefill, decode.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from opticnerve.addresses import check_free

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

STAGE_SECONDS = Histogram(
    "opticnerve_stage_seconds", "Time spent in one stage of a request", ["stage"], buckets=SECONDS
)
CACHE_LOOKUPS = Counter(
    "opticnerve_embedding_lookups_total",
    "Embedding look-ups by tier (reference, shm, redis, fetch, prefix) and result (hit, miss)",
    ["tier", "result"],
)
PATCHES_PENDING = Gauge("opticnerve_patches_pending", "Patches waiting for or in the encoder")
ITEMS_ENCODED = Counter("opticnerve_items_encoded_total", "Media items encoded")
STORE_BYTES = Gauge("opticnerve_store_bytes", "Bytes in the local tier of the embedding store")
KV_BLOCKS_FREE = Gauge("opticnerve_kv_blocks_free", "KV pages that no sequence holds")
SEQUENCES = Gauge("opticnerve_sequences", "Sequences by state (running, waiting)", ["state"])
PREEMPTIONS = Counter("opticnerve_preemptions_total", "Sequences preempted for want of KV pages")
TOKENS = Counter(
    "opticnerve_tokens_total", "Tokens by kind (prompt, cached, image, completion)", ["kind"]
)
REQUESTS = Counter("opticnerve_requests_total", "HTTP requests", ["route", "status"])
REQUESTS_IN_FLIGHT = Gauge("opticnerve_requests_in_flight", "HTTP requests being served")
TTFT_SECONDS = Histogram(
    "opticnerve_time_to_first_token_seconds", "From accepted to first token", buckets=SECONDS
)
INTER_TOKEN_SECONDS = Histogram(
    "opticnerve_inter_token_seconds", "Between two deliveries of tokens", buckets=SECONDS
)


def serve(port: int, host: str = "127.0.0.1") -> int:
    """Serves /metrics on a port of its own, 0 for a free one; returns the port taken.

    Raises ConfigError where the port cannot be had.
    """
    check_free(host, port, "--metrics-port")
    server, _ = start_http_server(port, addr=host)
    return int(server.server_port)
