"""The metrics that an encoder exports."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

PATCHES_PENDING = Gauge("opticnerve_patches_pending", "Patches waiting for or in the encoder")
ITEMS_ENCODED = Counter("opticnerve_items_encoded_total", "Media items encoded")
ITEMS_AUDITED = Counter(
    "opticnerve_items_audited_total",
    "Items of --audit-share, encoded again by the torch tower, by result (equal, differs, failed)",
    ["result"],
)
DECODES_ENDED = Counter(
    "opticnerve_decodes_ended_total",
    "Heavy pictures whose decoding ended early, by why (cancelled, timeout, died)",
    ["why"],
)
