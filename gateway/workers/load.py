"""How busy the pools are, as metrics for operators and autoscalers."""

from __future__ import annotations

import asyncio

from gateway import metrics
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Worker, WorkerState

EXPORT_S = 0.5  # Interval at which the gauges are set.
# The throughput assumed for a worker before any has been measured, in cost per second.
FIRST_PATCHES_PER_S = 1000.0
FIRST_SEQUENCES_PER_S = 1.0


async def export_load(encoders: WorkerPool, llms: WorkerPool) -> None:
    """Sets the gauges of both pools until it is cancelled."""
    loads = (
        PoolLoad("encoder", encoders, FIRST_PATCHES_PER_S),
        PoolLoad("llm", llms, FIRST_SEQUENCES_PER_S),
    )
    while True:
        metrics.PATCHES_WAITING.set(encoders.dispatcher.waiting_cost)
        for load in loads:
            load.export()
        await asyncio.sleep(EXPORT_S)


class PoolLoad:
    """``name``: the pool's name in metrics. ``usual_rate``: the throughput assumed for a worker
    before any has been measured."""

    def __init__(self, name: str, pool: WorkerPool, usual_rate: float) -> None:
        self.name = name
        self.pool = pool
        self.usual_rate = usual_rate

    def export(self) -> None:
        metrics.WORK_WAITING_SECONDS.labels(self.name).set(self.seconds_waiting())
        for state in WorkerState:
            number = sum(worker.state is state for worker in self.pool.workers)
            metrics.WORKERS.labels(self.name, state.value).set(number)

    def seconds_waiting(self) -> float:
        """Seconds that the serving workers would take for this gateway's waiting work, both here
        and in the queues of LLM workers. While none serves, the seconds that one worker would
        take."""
        serving = self.pool.serving()
        known = [rate for rate in map(_rate, serving) if rate]
        if known:
            self.usual_rate = sum(known) / len(known)
        waiting = self.pool.dispatcher.waiting_cost + sum(map(_queued, serving))
        if not serving:
            waiting += self.pool.unpaired_cost
        rates = [_rate(worker) or self.usual_rate for worker in serving]
        return waiting / (sum(rates) or self.usual_rate)


def _rate(worker: Worker) -> float:
    """The worker's throughput for all gateways, in cost per second: as it reports it, or else
    estimated from its work for this gateway."""
    return worker.cost_per_s or worker.throughput.per_s / (_own_part(worker) or 1.0)


def _queued(worker: Worker) -> float:
    """This gateway's part of the sequences that wait in an LLM worker's queue."""
    waiting: int = worker.description.load.get("waiting", 0)
    return waiting * _own_part(worker)


def _own_part(worker: Worker) -> float:
    """This gateway's fraction of a worker's work; 0 while it has none."""
    cost = worker.pending + worker.cost_of_other_gateways
    return worker.pending / cost if cost else 0.0
