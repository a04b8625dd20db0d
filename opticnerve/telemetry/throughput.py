"""How much work is done a second, while there is work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

DECAY_S = 10.0  # Seconds of work after which a measurement counts 1/e.


class Throughput:
    """Cost done a second; the newest counts most. Time without work does not count. ``clock``
    returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()  # When there began to be work, or some was last done.
        self._recent_cost = 0.0
        self._recent_seconds = 0.0

    def begin(self) -> None:
        """There is work, and there was none before."""
        self._since = self._clock()

    def record(self, cost: float) -> None:
        """Work of ``cost`` is done."""
        now = self._clock()
        passed, self._since = now - self._since, now
        decay = math.exp(-passed / DECAY_S)
        self._recent_cost = self._recent_cost * decay + cost
        self._recent_seconds = self._recent_seconds * decay + passed

    @property
    def per_s(self) -> float:
        """0 before anything was done."""
        return self._recent_cost / max(self._recent_seconds, 1e-6)
