"""The metrics that an LLM worker exports."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric

from llm_service.policy.messages import EngineStats

TOKENS = Counter(
    "opticnerve_llm_tokens_total",
    "Tokens of finished generations by kind (prompt, cached, image, completion)",
    ["kind"],
)


def engine_stats(stats: EngineStats) -> Iterator[Metric]:
    """The engine's current state."""
    yield GaugeMetricFamily("opticnerve_kv_blocks", "KV blocks", stats.blocks)
    yield GaugeMetricFamily(
        "opticnerve_kv_blocks_free", "KV blocks that no sequence holds", stats.free_blocks
    )
    yield GaugeMetricFamily(
        "opticnerve_kv_blocks_cached",
        "KV blocks in the prefix cache, whether free or held",
        stats.cached_blocks,
    )
    yield CounterMetricFamily(
        "opticnerve_kv_blocks_evicted_total",
        "KV blocks evicted from the prefix cache",
        stats.evicted_blocks,
    )
    sequences = GaugeMetricFamily(
        "opticnerve_sequences", "Sequences by state (running, waiting)", labels=["state"]
    )
    sequences.add_metric(["running"], stats.running)
    sequences.add_metric(["waiting"], stats.waiting)
    yield sequences
    yield CounterMetricFamily(
        "opticnerve_preemptions_total",
        "Sequences preempted to free KV blocks or a slot",
        stats.preemptions,
    )
    yield SummaryMetricFamily(
        "opticnerve_step_seconds", "Time of the engine's steps", stats.steps, stats.step_seconds
    )
    if stats.prefill_tokens_per_s:
        yield GaugeMetricFamily(
            "opticnerve_prefill_tokens_per_second",
            "Measured speed of prefill, by which --max-step-ms sizes chunks",
            stats.prefill_tokens_per_s,
        )
