"""The metrics that an encoder exports."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from opticnerve.telemetry.metrics import CACHE_LOOKUPS, STAGE_SECONDS

__all__ = ["CACHE_LOOKUPS", "DECODES_ENDED", "ITEMS_ENCODED", "PATCHES_PENDING", "STAGE_SECONDS"]

PATCHES_PENDING = Gauge("opticnerve_patches_pending", "Patches waiting for or in the encoder")
ITEMS_ENCODED = Counter("opticnerve_items_encoded_total", "Media items encoded")
DECODES_ENDED = Counter(
    "opticnerve_decodes_ended_total",
    "Heavy pictures whose decoding ended early, by why (cancelled, timeout, died)",
    ["why"],
)
