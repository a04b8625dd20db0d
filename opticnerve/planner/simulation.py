"""One simulation of traffic on given pools."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from opticnerve.benchmark.figures import Slo, percentile
from opticnerve.planner.rates import Rates
from opticnerve.planner.traffic import Traffic, Visit, visits
from opticnerve.planner.workers import EncoderModel, LlmModel, after

WARM_UP = 0.25  # Requests in this first part of the arrivals' time are not counted.
PATIENCE = 1.0  # How long to wait for the last requests, as a multiple of the arrivals' time.


@dataclass(frozen=True)
class Pools:
    """``encoders`` and ``llms``, or with ``copies`` as many whole copies of the model."""

    encoders: int = 0
    llms: int = 0
    copies: int = 0

    @property
    def devices(self) -> int:
        return self.encoders + self.llms + self.copies

    def times(self, factor: int) -> Pools:
        return Pools(self.encoders * factor, self.llms * factor, self.copies * factor)

    def __str__(self) -> str:
        if self.copies:
            return f"{self.copies} whole {'copy' if self.copies == 1 else 'copies'}"
        encoders = f"{self.encoders} encoder{'s' * (self.encoders != 1)}"
        return f"{encoders} and {self.llms} LLM worker{'s' * (self.llms != 1)}"


@dataclass(frozen=True)
class Forecast:
    """Figures of the requests that arrived after the warm-up."""

    pools: Pools
    requests: int
    unfinished: int
    requests_per_s: float  # Requests that ended within the arrivals' time, per second.
    attained: float  # Share of requests within the SLO; without an SLO, that ended.
    ttft_s: tuple[float, ...]  # Of requests that ended.
    tpot_s: tuple[float, ...]
    encoder_use: float  # Share of time that an encoder works; 0: no encoders.
    llm_use: float  # The same of an LLM worker or whole copy, which works while it has a sequence.
    llm_sequences: float  # Decoding sequences in one of them, on average.

    def quantile(self, name: str, rank: float) -> float | None:
        """A quantile of ``ttft`` or ``tpot``, in seconds; None if there are no values."""
        values = self.ttft_s if name == "ttft" else self.tpot_s
        return percentile(values, rank) if values else None

    def document(self) -> dict[str, Any]:
        ms = {
            f"{name}_p{rank}_ms": None if value is None else round(value * 1000, 3)
            for name in ("ttft", "tpot")
            for rank in (50, 90, 99)
            for value in [self.quantile(name, rank)]
        }
        lists = ("ttft_s", "tpot_s", "pools")
        rest = {name: value for name, value in vars(self).items() if name not in lists}
        return {**vars(self.pools), **rest, **ms}


def simulate(
    rates: Rates, traffic: Traffic, pools: Pools, requests: int, slo: Slo | None, seed: int = 0
) -> Forecast:
    """Lets ``requests`` arrive, then waits up to PATIENCE for the last ones."""
    env = simpy.Environment()
    cluster = Cluster(env, rates, pools)
    asked = list(itertools.islice(visits(traffic, rates, seed), requests))
    env.process(_arrive(env, asked, cluster.serve))
    end = asked[-1].arrived
    env.run(until=end)
    busy = cluster.busy()
    env.run(until=end * (1 + PATIENCE) + 1.0)
    begin = end * WARM_UP
    counted = [visit for visit in asked if visit.arrived >= begin]
    ended = [visit for visit in counted if visit.ended < math.inf]
    good = sum(_is_good(visit, slo) for visit in counted)
    within = sum(begin <= visit.ended < end for visit in asked)
    decoded = sum(min(visit.ended, end) - visit.first for visit in asked if visit.first < end)
    return Forecast(
        pools,
        len(counted),
        len(counted) - len(ended),
        within / (end - begin) if end > begin else 0.0,
        good / len(counted),
        tuple(visit.ttft for visit in ended),
        tuple(visit.tpot for visit in ended if visit.output > 1),
        busy[0] / end / max(1, pools.encoders),
        busy[1] / end / max(1, pools.llms or pools.copies),
        decoded / end / max(1, pools.llms or pools.copies),
    )


def _arrive(env: simpy.Environment, asked: Sequence[Visit], serve: Callable[[Visit], None]) -> Any:
    for visit in asked:
        yield env.timeout(visit.arrived - env.now)
        serve(visit)


def _is_good(visit: Visit, slo: Slo | None) -> bool:
    values = {"ttft": visit.ttft, "tpot": visit.tpot, "e2e": visit.ended - visit.arrived}
    limits = slo.limits if slo else {}
    return visit.ended < math.inf and all(values[name] <= limits[name] for name in limits)


class Cluster:
    """The pools, and a gateway that gives work to the worker with the least."""

    def __init__(self, env: simpy.Environment, rates: Rates, pools: Pools) -> None:
        self._env = env
        self._rates = rates
        whole = bool(pools.copies)
        llms = pools.copies or pools.llms
        self._llms = [LlmModel(env, rates, encodes=whole) for _ in range(llms)]
        self._encoders = [] if whole else [EncoderModel(env, rates) for _ in range(pools.encoders)]

    def busy(self) -> tuple[float, float]:
        """Seconds of work so far of (encoders, LLM workers or whole copies)."""
        encoders = sum(worker.busy_s for worker in self._encoders)
        return encoders, sum(worker.busy_s for worker in self._llms)

    def serve(self, visit: Visit) -> None:
        after(self._env, self._rates.gateway_s, lambda _: self._dispatch(visit))

    def _dispatch(self, visit: Visit) -> None:
        """Chooses the LLM worker before encoding, as the gateway does."""
        llm = _least(self._llms)
        llm.load += 1
        left = len(visit.patches)
        if not left:
            llm.generate(visit)

        def encoded() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                llm.generate(visit)

        for patches in visit.patches:
            (_least(self._encoders) if self._encoders else llm).encode(patches, encoded)


def _least(workers: Sequence[Any]) -> Any:
    return min(workers, key=_load)


def _load(worker: EncoderModel | LlmModel) -> int:
    return worker.load
