"""The metrics of the gateway alone; ``opticnerve.telemetry.metrics`` has those of all services.

A gauge declares how the values of a gateway's processes are combined: the sum for work that each
process has of its own, the maximum for what all of them see.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from opticnerve.telemetry.metrics import SECONDS

REQUESTS = Counter("opticnerve_requests_total", "HTTP requests", ["route", "status"])
REQUESTS_IN_FLIGHT = Gauge(
    "opticnerve_requests_in_flight",
    "HTTP requests being served, except those for health and metrics",
    multiprocess_mode="livesum",
)
TOKENS = Counter(
    "opticnerve_tokens_total",
    "Tokens of answered requests by kind (prompt, cached, image, completion)",
    ["kind"],
)
LLM_CHOICES = Counter(
    "opticnerve_llm_choices_total",
    "Generate calls by the reason for choosing their LLM worker (prefix, rendezvous, load)",
    ["reason"],
)
TTFT_SECONDS = Histogram(
    "opticnerve_time_to_first_token_seconds",
    "Time from accepting a request to its first token",
    buckets=SECONDS,
)
INTER_TOKEN_SECONDS = Histogram(
    "opticnerve_inter_token_seconds", "Time between two deliveries of tokens", buckets=SECONDS
)
PATCHES_WAITING = Gauge(
    "opticnerve_patches_waiting",
    "Patches admitted by this gateway that no encoder has room for yet",
    multiprocess_mode="livesum",
)
WORK_WAITING_SECONDS = Gauge(
    "opticnerve_work_waiting_seconds",
    "Seconds that a pool (encoder, llm) would take for the work that waits for it at this gateway; "
    "while no worker serves, the seconds that one would take",
    ["pool"],
    multiprocess_mode="livesum",
)
WORKERS = Gauge(
    "opticnerve_workers",
    "Workers that this gateway knows, by pool (encoder, llm) and state (starting, serving, "
    "draining, dead, unusable)",
    ["pool", "state"],
    multiprocess_mode="livemax",
)
RETRIES = Counter(
    "opticnerve_retries_total",
    "Calls repeated before the first token, by call (encode, generate) and reason "
    "(lost, full, mispaired)",
    ["call", "reason"],
)
FAILOVERS = Counter(
    "opticnerve_failovers_total",
    "Generations that lost their LLM worker after the first token and were continued by another",
)
REENCODES = Counter(
    "opticnerve_reencodes_total",
    "Pictures encoded or looked up again because an LLM worker found no usable rows, by reason "
    "(not_found, evicted, corrupt, preempted)",
    ["reason"],
)
