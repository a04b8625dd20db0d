"""Dispatch as policy, in simulated time: order, room, workers of unequal speed."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.clock import Deadline
from gateway.workers.dispatch import Dispatcher, LeaseRequest
from gateway.workers.worker import WorkerState


class Machine:
    """A worker that finishes ``rate`` of cost a second, one job after the other."""

    state = WorkerState.SERVING

    def __init__(self, address, rate, max_cost_in_flight, known=True):
        self.address = address
        self.rate = rate
        self.max_cost_in_flight = max_cost_in_flight
        self.cost_per_s = rate if known else 0.0
        self.pending = self.heavy = self.cost_of_other_gateways = self.last_picked = 0
        self.free_at = 0.0
        self.done = 0

    def has_room(self, cost, heavy):
        pending = self.heavy if heavy else self.pending - self.heavy
        return not pending or pending + cost <= self.max_cost_in_flight

    def lend(self, cost, heavy):
        self.pending += cost
        self.heavy += cost if heavy else 0

    def take_back(self, cost, heavy, *, done):
        self.pending -= cost
        self.heavy -= cost if heavy else 0


def simulate(machines, costs, learn_after=0):
    """(seconds until everything is done, jobs in the order in which they were begun).

    ``learn_after``: jobs of its own after which a machine knows its throughput.
    """
    dispatcher = Dispatcher(machines)
    jobs = [LeaseRequest(cost, Deadline(float(number))) for number, cost in enumerate(costs)]
    begun, ends, now = [], [], 0.0

    def begin():
        for job in jobs:
            if job.worker is not None and job not in begun:
                begun.append(job)
                job.worker.free_at = max(job.worker.free_at, now) + job.cost / job.worker.rate
                heapq.heappush(ends, (job.worker.free_at, len(begun), job))

    for job in jobs:
        dispatcher.add(job)
    begin()
    while ends:
        now, _, job = heapq.heappop(ends)
        job.worker.pending -= job.cost
        job.worker.done += 1
        if job.worker.done > learn_after:
            job.worker.cost_per_s = job.worker.rate
        dispatcher.dispatch()
        begin()
    assert not dispatcher.waiting and dispatcher.waiting_cost == 0
    return now, [jobs.index(job) for job in begun]


@pytest.mark.parametrize("known", [True, False])
def test_two_workers_one_eight_times_as_slow_reach_the_sum_of_their_rates(known):
    machines = [Machine("a", 8.0, 3, known), Machine("b", 1.0, 3, known)]
    seconds, _ = simulate(machines, [1] * 400, learn_after=1)
    assert 400 / seconds >= 0.95 * 9.0


def test_a_slow_worker_takes_nothing_that_the_fast_one_finishes_sooner():
    machines = [Machine("slow", 1.0, 3), Machine("fast", 8.0, 3)]
    simulate(machines, [1] * 6)
    assert machines[0].done == 0


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 30)), min_size=1, max_size=4),
)
def test_everything_is_begun_in_order_and_in_bounded_time(costs, kinds):
    machines = [
        Machine(str(i), rate, max_cost_in_flight)
        for i, (rate, max_cost_in_flight) in enumerate(kinds)
    ]
    seconds, order = simulate(machines, costs)
    assert sorted(order) == list(range(len(costs)))
    assert all(machine.pending == 0 for machine in machines)
    if len(machines) == 1:
        assert order == sorted(order)
    # Never later than the fastest alone would be, but for what others had begun by then.
    fastest = max(machine.rate for machine in machines)
    assert seconds <= 2 * sum(costs) / fastest + max(costs) / fastest + 1e-6


def test_nobody_overtakes_a_job_that_waits_for_room():
    machine = Machine("a", 1.0, 10)
    dispatcher = Dispatcher([machine])
    large, small = LeaseRequest(9, Deadline(1.0)), LeaseRequest(1, Deadline(2.0))
    machine.pending = 5
    dispatcher.add(large)
    dispatcher.add(small)
    assert large.worker is small.worker is None
    other = LeaseRequest(1, Deadline(3.0), accepts=lambda worker: False)
    dispatcher.add(other)
    machine.pending = 0
    dispatcher.dispatch()
    assert large.worker is small.worker is machine
    assert dispatcher.waiting == [other]


def test_heavy_jobs_keep_no_others_waiting_and_not_the_other_way_round():
    machine = Machine("a", 1.0, 10)
    dispatcher = Dispatcher([machine])
    heavy = [LeaseRequest(9, Deadline(1.0), heavy=True) for _ in range(3)]
    light = [LeaseRequest(9, Deadline(2.0)) for _ in range(3)]
    for job in (*heavy, *light):
        dispatcher.add(job)
    assert [job.worker for job in heavy] == [machine, None, None]
    assert [job.worker for job in light] == [machine, None, None]
    machine.pending -= 9
    machine.heavy -= 9
    dispatcher.dispatch()
    assert heavy[1].worker is machine and heavy[2].worker is light[1].worker is None


def test_a_worker_has_one_suspect_at_a_time_and_others_pass_those_that_wait():
    machines = [Machine("a", 1.0, 10), Machine("b", 1.0, 10)]
    dispatcher = Dispatcher(machines)
    suspects = [LeaseRequest(1, Deadline(1.0), suspect=True) for _ in range(4)]
    other = LeaseRequest(1, Deadline(2.0))
    for job in (*suspects, other):
        dispatcher.add(job)
    assert {job.worker for job in suspects[:2]} == set(machines)
    assert suspects[2].worker is suspects[3].worker is None and other.worker is not None
    ended = suspects[0].worker
    dispatcher.end(suspects[0])
    assert suspects[2].worker is ended and suspects[3].worker is None


def test_requests_share_what_there_is_by_what_their_jobs_take():
    """Ten of one request, of a second each, and one of another that comes a little later."""
    machine = Machine("a", 1.0, 1)
    dispatcher = Dispatcher([machine])
    many = [
        LeaseRequest(1, Deadline(100.0), delay_within_request_s=float(number))
        for number in range(10)
    ]
    for job in many:
        dispatcher.add(job)
    one = LeaseRequest(1, Deadline(100.5))
    dispatcher.add(one)
    assert many[0].worker is machine
    assert dispatcher.waiting == [one, *many[1:]]


def test_a_job_that_leaves_makes_way_for_those_behind_it():
    machine = Machine("a", 1.0, 10)
    dispatcher = Dispatcher([machine])
    machine.pending = 5
    large, small = LeaseRequest(9, Deadline(1.0)), LeaseRequest(1, Deadline(2.0))
    dispatcher.add(large)
    dispatcher.add(small)
    assert small.worker is None
    dispatcher.remove(large)
    assert small.worker is machine and not dispatcher.waiting


def test_the_time_for_a_cost_is_that_of_all_workers_at_measured_speed():
    machines = [Machine("a", 10.0, 10), Machine("b", 30.0, 10)]
    dispatcher = Dispatcher(machines)
    machines[0].cost_of_other_gateways = 20
    assert dispatcher.expected_wait_s(60) == pytest.approx((60 + 20) / 40)
    machines[1].cost_per_s = 0.0  # Not known: taken for the mean of those that are.
    assert dispatcher.expected_wait_s(60) == pytest.approx((60 + 20) / 20)
    machines[0].state = machines[1].state = WorkerState.STARTING  # As last seen.
    assert dispatcher.expected_wait_s(60) == pytest.approx(60 / 20)  # Their queues died with them.
    machines[0].cost_per_s = 0.0
    assert dispatcher.expected_wait_s(60) == 0.0


def lent_order(jobs, max_cost_in_flight=1):
    """Names of the shares of ``jobs`` in the order in which one worker gets them, all there from
    the start."""
    machine = Machine("a", 1.0, max_cost_in_flight)
    machine.pending = max_cost_in_flight  # Busy until all are there.
    dispatcher = Dispatcher([machine])
    for job in jobs:
        dispatcher.add(job)
    order = []
    while dispatcher.waiting:
        machine.pending = machine.heavy = 0
        dispatcher.dispatch()
        (lent,) = [job for job in jobs if job.worker is not None and job not in order]
        order.append(lent)
    assert dispatcher.waiting_cost == 0
    return order


def job(share, number=0, cost=1, weight=1.0):
    return LeaseRequest(cost, Deadline(float(number)), share=share, weight=weight)


def test_one_picture_of_a_key_does_not_wait_for_the_hundreds_of_another():
    flood = [job("mallory", number) for number in range(192)]
    order = lent_order([*flood, job("ada", 192)])
    assert [each.share for each in order].index("ada") <= 1
    assert [each for each in order if each.share == "mallory"] == flood  # In their own order.


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=60, max_size=90))
def test_keys_that_always_want_more_get_cost_by_weight(wanted):
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    jobs = [job(share, n, cost, weights[share]) for n, (share, cost) in enumerate(wanted)]
    left = {share: [each for each in jobs if each.share == share] for share in weights}
    given = dict.fromkeys(weights, 0.0)
    for each in lent_order(jobs):
        given[each.share] += each.cost / each.weight
        left[each.share].remove(each)
        if not all(left.values()):
            break
        assert max(given.values()) - min(given.values()) <= 2 * 9 / 0.5


def test_a_key_that_comes_late_is_owed_nothing_for_the_time_before():
    machine = Machine("a", 1.0, 1)
    dispatcher = Dispatcher([machine])
    jobs = [job("mallory", number) for number in range(40)]
    for each in jobs:
        dispatcher.add(each)

    def lend(count):
        for _ in range(count):
            machine.pending = machine.heavy = 0
            dispatcher.dispatch()

    lend(19)
    jobs += [job("ada", number) for number in range(40)]
    before = [each for each in jobs if each.worker]
    for each in jobs[40:]:
        dispatcher.add(each)
    lend(10)
    after = [each.share for each in jobs if each.worker and each not in before]
    assert abs(after.count("ada") - after.count("mallory")) <= 2


def test_without_keys_the_order_is_that_of_arrival():
    jobs = [job("", number, cost) for number, cost in enumerate((5, 1, 9, 2))]
    assert lent_order([jobs[2], jobs[0], jobs[3], jobs[1]]) == jobs
