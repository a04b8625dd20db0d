"""The metrics that an encoder exports."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

PATCHES_PENDING = Gauge("opticnerve_patches_pending", "Patches waiting for or in the encoder")
ITEMS_PENDING = Gauge("opticnerve_items_pending", "Items waiting for or in the encoder")
BATCH_ITEMS = Histogram(
    "opticnerve_batch_items",
    "Items that the tower encoded at once",
    buckets=[2**power for power in range(8)],
)
BATCH_PATCHES = Histogram(
    "opticnerve_batch_patches",
    "Patches that the tower encoded at once",
    buckets=[2**power for power in range(6, 18)],
)
BATCHES_SPLIT = Counter(
    "opticnerve_batches_split_total",
    "Batches that failed and were run again in parts, by reason (memory, error)",
    ["why"],
)
ITEMS_ENCODED = Counter("opticnerve_items_encoded_total", "Media items encoded")
ITEMS_AUDITED = Counter(
    "opticnerve_items_audited_total",
    "Items of --audit-share, encoded again by the torch tower, by result (equal, differs, failed)",
    ["result"],
)
DECODES_ENDED = Counter(
    "opticnerve_decodes_ended_total",
    "Heavy pictures whose decoding ended early, by reason (cancelled, timeout, died)",
    ["why"],
)
