"""Audits what is served: encodes a share of the pictures again, and compares the rows.

An item is audited while its pixels are still in memory, since pictures are not kept. The reference
is the torch tower, run on the item alone. It detects an engine that drifts, rows that depend on
their batch, and a device that computes wrongly.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from encoder_service import metrics
from encoder_service.backends.base import Backend, Embedding, Recovery
from opticnerve.errors import ConfigError
from opticnerve.media.plan import Plan
from opticnerve.tensors.distance import LIMITS, compare

log = logging.getLogger(__name__)

KEY_DIGITS = 8  # The hex digits of a content key that are used.


class Audit:
    """``check`` is called on the device's thread, and never fails an item."""

    def __init__(self, backend: Backend, share: float) -> None:
        """Raises ConfigError for a backend that holds no torch tower."""
        self._backend = backend
        self._share = share
        if share and backend.reference is None:
            raise ConfigError(
                "--audit-share compares with the torch tower, which this encoder does not hold: "
                "add --beyond-buckets torch",
                param="audit_share",
            )

    def chooses(self, key: str) -> bool:
        """Whether the item is audited. The choice depends on the key alone, so it is even, and the
        same on every encoder. Items of the warm-up have no key."""
        number = int(key[:KEY_DIGITS], 16) if key else 16**KEY_DIGITS
        return bool(number < self._share * 16**KEY_DIGITS)

    def check(self, key: str, pixels: NDArray[np.uint8], plan: Plan, served: Embedding) -> None:
        """Compares the served rows with the reference's, and counts and logs the outcome."""
        reference = self._backend.reference
        assert reference is not None
        try:
            (again,) = reference.encode([pixels], [plan])
        except Exception as error:
            if self._backend.classify(error) is Recovery.STOP:
                raise
            metrics.ITEMS_AUDITED.labels(result="failed").inc()
            log.warning("audit: item %s could not be encoded again: %s", key[:12], error)
            return
        fault = self._fault(served, again)
        metrics.ITEMS_AUDITED.labels(result="differs" if fault else "equal").inc()
        if fault:
            log.warning("audit: item %s has %s", key[:12], fault)

    def _fault(self, served: Embedding, again: Embedding) -> str | None:
        """What is wrong with the served rows; None: they are close enough to the reference's."""
        shapes = [{name: rows.shape for name, rows in each.items()} for each in (served, again)]
        if shapes[0] != shapes[1]:
            return "rows of another shape than the torch tower's"
        distance = compare([(rows.float(), again[name].float()) for name, rows in served.items()])
        limit = LIMITS[self._backend.precision]
        if distance.within(limit):
            return None
        return f"rows too far from the torch tower's: {distance.describe(limit)}"
