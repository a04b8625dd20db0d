"""Measures the work done per second, while there is work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

DECAY_S = 10.0  # After so many seconds of work, a measurement's weight is 1/e.


class Throughput:
    """Work done per second, as an exponentially decaying average. Time without work does not count.
    ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()  # When work began, or was last recorded.
        self._recent_cost = 0.0
        self._recent_seconds = 0.0

    def begin(self) -> None:
        """Call this when there is work after a time without."""
        self._since = self._clock()

    def record(self, cost: float) -> None:
        """Call this when work of ``cost`` is done."""
        now = self._clock()
        passed, self._since = now - self._since, now
        decay = math.exp(-passed / DECAY_S)
        self._recent_cost = self._recent_cost * decay + cost
        self._recent_seconds = self._recent_seconds * decay + passed

    @property
    def per_s(self) -> float:
        """Cost per second; 0 before anything was done."""
        return self._recent_cost / max(self._recent_seconds, 1e-6)
