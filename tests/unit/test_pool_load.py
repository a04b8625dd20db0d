"""Seconds of work that wait for a pool, and the throughput that they are computed from."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from gateway.workers.load import PoolLoad
from gateway.workers.worker import Description, Worker, WorkerState
from opticnerve.telemetry.throughput import Throughput

pytestmark = pytest.mark.anyio


def pool_of(*workers, waiting=0, unpaired=0):
    serving = [worker for worker in workers if worker.state is WorkerState.SERVING]
    return SimpleNamespace(
        workers=list(workers),
        serving=lambda: serving,
        dispatcher=SimpleNamespace(waiting_cost=waiting),
        unpaired_cost=unpaired,
    )


def worker(rate=0.0, pending=0, others=0, **load):
    made = Worker("127.0.0.1:1")
    made.state = WorkerState.SERVING
    made.description = Description(cost_per_s=rate, load=load)
    made.pending, made.cost_of_other_gateways = pending, others
    return made


async def test_waiting_cost_by_what_the_workers_do_a_second():
    fast, slow = worker(300.0), worker(100.0)
    assert PoolLoad("encoder", pool_of(fast, slow, waiting=800), 1.0).seconds_waiting() == 2
    unknown = worker()  # Is taken to be as fast as the others.
    assert PoolLoad("encoder", pool_of(slow, unknown, waiting=800), 1.0).seconds_waiting() == 4


async def test_what_waits_in_a_workers_queue_counts_for_the_gateway_that_sent_it():
    busy = worker(2.0, pending=10, others=30, running=20, waiting=20)
    assert PoolLoad("llm", pool_of(busy), 1.0).seconds_waiting() == 2.5


async def test_the_throughput_of_a_worker_is_estimated_for_all_gateways():
    shared = worker(pending=10, others=30, running=20, waiting=20)  # Serves others more.
    shared.throughput = SimpleNamespace(per_s=0.5)  # A quarter of the 2 that it does in all.
    assert PoolLoad("llm", pool_of(shared), 1.0).seconds_waiting() == 2.5
    shared.pending = 0
    assert PoolLoad("llm", pool_of(shared, waiting=1), 1.0).seconds_waiting() == 2


async def test_an_empty_pool_has_work_waiting_as_for_one_worker():
    load = PoolLoad("encoder", pool_of(waiting=100, unpaired=100), 50.0)
    assert load.seconds_waiting() == 4
    load.pool = pool_of(worker(100.0), worker(300.0), waiting=400, unpaired=100)
    assert load.seconds_waiting() == 1
    load.pool = pool_of(waiting=400)  # Both have left, and what they did is remembered.
    assert load.seconds_waiting() == 2


async def test_workers_are_counted_by_state():
    dead = worker()
    dead.state = WorkerState.DEAD
    PoolLoad("llm", pool_of(worker(), worker(), dead), 1.0).export()

    def number(state):
        return REGISTRY.get_sample_value("opticnerve_workers", {"pool": "llm", "state": state})

    counted = {WorkerState.SERVING: 2, WorkerState.DEAD: 1}
    assert all(number(state.value) == counted.get(state, 0) for state in WorkerState)


def test_time_without_work_does_not_count_and_the_newest_counts_most():
    now = [0.0]
    done = Throughput(lambda: now[0])
    assert done.per_s == 0
    done.begin()
    now[0] = 2.0
    done.record(20)
    assert done.per_s == 10
    now[0] = 100.0
    done.begin()
    now[0] = 140.0
    done.record(4000)
    assert 95 < done.per_s < 100
