"""The metrics of the gateway alone; ``opticnerve.telemetry.metrics`` has those of all services."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from opticnerve.telemetry.metrics import SECONDS

REQUESTS = Counter("opticnerve_requests_total", "HTTP requests", ["route", "status"])
REQUESTS_IN_FLIGHT = Gauge("opticnerve_requests_in_flight", "HTTP requests being served")
TOKENS = Counter(
    "opticnerve_tokens_total",
    "Tokens of answered requests by kind (prompt, cached, image, completion)",
    ["kind"],
)
PATCHES_WAITING = Gauge(
    "opticnerve_patches_waiting", "Patches admitted here that no encoder has room for yet"
)
LLM_CHOICES = Counter(
    "opticnerve_llm_choices_total",
    "Generate calls by why their LLM worker was chosen (prefix, rendezvous, load)",
    ["reason"],
)
TTFT_SECONDS = Histogram(
    "opticnerve_time_to_first_token_seconds", "From accepted to first token", buckets=SECONDS
)
INTER_TOKEN_SECONDS = Histogram(
    "opticnerve_inter_token_seconds", "Between two deliveries of tokens", buckets=SECONDS
)
