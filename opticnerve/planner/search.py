"""Finds the smallest pools that keep an SLO. More workers never make it worse, so bisection
works."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from opticnerve.benchmark.figures import Slo
from opticnerve.errors import StartupError
from opticnerve.planner.rates import Rates
from opticnerve.planner.simulation import Forecast, Pools, simulate
from opticnerve.planner.traffic import Traffic

REQUESTS = 20_000  # Requests of one simulation.
LIFETIMES = 20  # A simulation's arrivals last at least so many lifetimes of a request.
MAX_SCALE = 64  # Most workers tried, as a multiple of those that the work alone needs.
MAX_UNFINISHED = 0.001  # If a larger share of requests is unfinished, a queue grows.


@dataclass(frozen=True)
class Question:
    """What is asked of the search. ``attain``: the share of requests that keep the SLO."""

    rates: Rates
    traffic: Traffic
    slo: Slo
    attain: float = 0.99
    requests: int = REQUESTS
    seed: int = 0

    @functools.cached_property
    def slices(self) -> int:
        """The number of equal parts into which traffic and pools are divided, of which one is
        simulated: a simulation must cover LIFETIMES of a request within its number of requests.
        Small pools balance load less well than one large pool, so the answer is on the safe
        side."""
        needed = self.traffic.rate * LIFETIMES * self._lifetime_s
        return max(1, math.floor(needed / self.requests))

    @property
    def _lifetime_s(self) -> float:
        """The lifetime of a request if the SLO is just kept, roughly."""
        limits, rates = self.slo.limits, self.rates
        token = limits.get("tpot", 4 * (rates.step_s + rates.sequence_s))
        lifetime = limits.get("ttft", 1.0) + token * self.traffic.output_tokens[1]
        return min(lifetime, limits.get("e2e", math.inf))

    @property
    def slice_traffic(self) -> Traffic:
        return replace(self.traffic, rate=self.traffic.rate / self.slices)

    def forecast(self, pools: Pools) -> Forecast:
        """The forecast for one slice."""
        return simulate(self.rates, self.slice_traffic, pools, self.requests, self.slo, self.seed)

    def keeps(self, pools: Pools) -> bool:
        """Whether pools of a slice keep the SLO."""
        encoder_s, llm_s = self.work_s()
        pool_s = [(encoder_s, pools.encoders), (llm_s, pools.llms)]
        if pools.copies:
            pool_s = [(encoder_s + llm_s, pools.copies)]
        if any(work and work >= workers for work, workers in pool_s):
            return False  # A queue grows without bound.
        found = self.forecast(pools)
        stable = found.unfinished <= MAX_UNFINISHED * found.requests
        return stable and found.attained >= self.attain

    def work_s(self) -> tuple[float, float]:
        """Lower bounds on the seconds of work of (encoders, LLM workers) for a second of a slice's
        traffic: as if batches and steps had no fixed cost."""
        traffic, rates = self.slice_traffic, self.rates
        patches = tokens = 0.0
        if traffic.pictures:
            costs = [rates.picture(size) for size in traffic.sizes]
            patches = traffic.pictures * sum(cost.patches for cost in costs) / len(costs)
            tokens = traffic.pictures * sum(cost.tokens for cost in costs) / len(costs)
        prompt = (sum(traffic.prompt_tokens) / 2 + tokens) * (1 - traffic.cached_prompt)
        output = sum(traffic.output_tokens) / 2
        encode = rates.patch_s * patches * (1 - traffic.repeat)
        generate = rates.prefill_token_s * prompt + rates.sequence_s * output
        return traffic.rate * encode, traffic.rate * generate

    @property
    def needs_encoders(self) -> bool:
        return self.traffic.pictures > 0 and self.traffic.repeat < 1


@dataclass(frozen=True)
class Proposal:
    """The answer: forecasts of the split pools for the whole traffic, of the whole copies that keep
    the SLO, and of whole copies on as many devices as the split pools have."""

    slices: int
    split: Forecast
    whole: Forecast
    whole_on_as_many: Forecast

    @property
    def forecasts(self) -> list[Forecast]:
        """All forecasts, without duplicates."""
        found = [self.split, self.whole, self.whole_on_as_many]
        return found[:2] if found[1].pools == found[2].pools else found


def propose(question: Question, say: Callable[[str], None] = lambda text: None) -> Proposal:
    """Raises StartupError where no number of workers keeps the SLO."""
    alone = _alone(question)
    if alone.attained < 1:
        told = ", ".join(
            f"{name} {(alone.quantile(name, 50) or 0) * 1000:.0f} ms" for name in ("ttft", "tpot")
        )
        raise StartupError(
            f"--slo {question.slo} cannot be kept by more workers: a request alone has {told}"
        )
    split = _smallest_split(question, say)
    least = max(1, math.ceil(sum(question.work_s())))
    copies = _smallest(lambda n: _check(question, Pools(copies=n), say), least)
    equal = Pools(copies=split.devices)
    return Proposal(
        question.slices,
        *(_scaled(question, pools) for pools in (split, Pools(copies=copies), equal)),
    )


def _alone(question: Question) -> Forecast:
    """The forecast for one request at a time."""
    quiet = replace(question.traffic, rate=1e-4)
    pools = Pools(max(1, question.traffic.pictures), 1)
    return simulate(question.rates, quiet, pools, 50, question.slo, question.seed)


def _scaled(question: Question, pools: Pools) -> Forecast:
    """The forecast of a slice, with the pools and the throughput of all slices."""
    found = question.forecast(pools)
    return replace(
        found,
        pools=pools.times(question.slices),
        requests_per_s=found.requests_per_s * question.slices,
    )


def _check(question: Question, pools: Pools, say: Callable[[str], None]) -> bool:
    say(str(pools.times(question.slices)))
    return question.keeps(pools)


def _smallest_split(question: Question, say: Callable[[str], None]) -> Pools:
    keeps = functools.cache(lambda e, n: _check(question, Pools(e, n), say))
    least_e, least_n = (max(1, math.ceil(work)) for work in question.work_s())
    if not question.needs_encoders:
        return Pools(0, _smallest(lambda n: keeps(0, n), least_n))
    scale = 1
    while not keeps(least_e * scale, least_n * scale):
        scale *= 2
        _check_scale(scale)
    ample = least_n * scale
    encoders = _smallest(lambda e: keeps(e, ample), least_e)
    llms = _smallest(lambda n: keeps(encoders, n), least_n)
    # One more encoder may save several LLM workers.
    for more in range(encoders + 1, encoders + 1 + max(1, encoders // 4)):
        if llms <= 2 or not keeps(more, llms - (more - encoders) - 1):
            break
        encoders, llms = more, llms - (more - encoders) - 1
    return Pools(encoders, llms)


def _smallest(keeps: Callable[[int], bool], least: int) -> int:
    """The smallest number, at least ``least``, for which ``keeps`` is true."""
    low, high = least, least
    while not keeps(high):
        low, high = high + 1, high * 2
        _check_scale(high / least)
    while low < high:
        middle = (low + high) // 2
        if keeps(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _check_scale(scale: float) -> None:
    if scale > MAX_SCALE:
        raise StartupError(
            f"not even {MAX_SCALE} times the workers that this traffic keeps busy keep the SLO"
        )
