"""When the requests of an open loop are due: a renewal process, Poisson's by default."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator


def arrivals(
    rate: float, source: random.Random, *, burstiness: float = 1.0, ramp_s: float = 0.0
) -> Iterator[float]:
    """Yields times in seconds from the start, ascending and endless.

    ``rate``: arrivals a second, on average. ``burstiness``: the squared coefficient of variation of
    the gaps, which have a gamma distribution: 1 is a Poisson process, 4 comes in bunches, and 0 is
    one every ``1 / rate`` seconds. ``ramp_s``: the rate rises linearly from 0 over this time.
    """
    work = 0.0  # Expected arrivals until the next one.
    while True:
        work += source.gammavariate(1 / burstiness, burstiness) if burstiness > 0 else 1.0
        yield _when(work, rate, ramp_s)


def _when(work: float, rate: float, ramp_s: float) -> float:
    """The time until which ``work`` arrivals are expected."""
    in_ramp = rate * ramp_s / 2
    if work < in_ramp:
        return math.sqrt(2 * work * ramp_s / rate)
    return ramp_s + (work - in_ramp) / rate


def until(times: Iterator[float], end_s: float) -> Iterator[float]:
    return itertools.takewhile(lambda time: time < end_s, times)
