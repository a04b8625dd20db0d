"""The encoder's smaller parts: backlog, single flight, the staging gate, the crash record."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from encoder_service.backlog import MAX_RETRY_S, UNKNOWN_RETRY_S, Backlog
from encoder_service.crash_record import FORGET_AFTER_S, CrashRecord
from encoder_service.fair_queue import FairQueue
from encoder_service.pictures.decode_pool import PreprocessPool
from opticnerve.errors import Overloaded, PoisonousItem
from opticnerve.single_flight import Flights
from tests.preprocessors import mean_colour

KEY, OTHER = "a" * 64, "b" * 64


# ---- backlog


def test_backlog_refuses_beyond_each_bound_and_hints_when_to_retry() -> None:
    backlog = Backlog(max_patches=100, max_items=3, max_bytes=1000)
    slot = backlog.admit(60, 100)
    with pytest.raises(Overloaded) as refused:
        backlog.admit(41, 100)
    assert refused.value.retry_after_s == UNKNOWN_RETRY_S
    with pytest.raises(Overloaded):
        backlog.admit(1, 901)
    others = [backlog.admit(1, 1), backlog.admit(1, 1)]
    with pytest.raises(Overloaded):
        backlog.admit(1, 1)
    for each in (slot, slot, *others):  # Twice is once.
        each.release()
    assert (backlog.items, backlog.patches, backlog.num_bytes) == (0, 0, 0)
    backlog.check_integrity()


def test_backlog_takes_one_item_of_any_size_when_empty() -> None:
    backlog = Backlog(max_patches=10, max_items=3, max_bytes=10)
    slot = backlog.admit(1000, 1000)
    assert not backlog.can_admit(0, 0)
    slot.release()
    assert backlog.can_admit(10, 10)


def test_retry_hint_follows_throughput() -> None:
    now = 0.0
    backlog = Backlog(max_patches=1000, max_items=10, max_bytes=10, clock=lambda: now)
    backlog.admit(1000, 0)
    assert backlog.patches_per_s == 0 and backlog.retry_after_s == UNKNOWN_RETRY_S
    now = 1.0
    backlog.record(100)
    assert backlog.patches_per_s == 100 and backlog.retry_after_s == pytest.approx(5.0)
    for _ in range(100):
        now += 1.0
        backlog.record(1000)
    assert backlog.retry_after_s == pytest.approx(0.5, rel=0.01)
    for _ in range(5):
        now += 100.0
        backlog.record(1)
    assert backlog.retry_after_s == MAX_RETRY_S


def test_throughput_counts_the_time_that_there_was_work() -> None:
    now = 0.0
    backlog = Backlog(max_patches=1000, max_items=10, max_bytes=10, clock=lambda: now)
    for _ in range(3):
        slot = backlog.admit(50, 0)
        now += 0.5
        backlog.record(50)
        slot.release()
        now += 1000.0  # Nothing to do.
    assert backlog.patches_per_s == pytest.approx(100)


# ---- single flight


async def until(condition: object, what: str = "condition") -> None:
    """Lets the loop run until ``condition()`` holds."""
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


def test_two_calls_share_one_run() -> None:
    async def scenario() -> None:
        flights: Flights[int] = Flights()
        gate, runs, released = asyncio.Event(), [], []

        async def work() -> int:
            runs.append(1)
            await gate.wait()
            return 7

        calls = [
            asyncio.create_task(flights.run("k", work, lambda i=i: released.append(i)))
            for i in range(3)
        ]
        await until(lambda: runs)
        assert "k" in flights
        assert sorted(released) == [1, 2]
        gate.set()
        assert await asyncio.gather(*calls) == [7, 7, 7]
        await until(lambda: len(released) == 3)
        assert len(runs) == 1 and "k" not in flights

    asyncio.run(scenario())


def test_the_first_callers_end_leaves_the_run_to_the_second() -> None:
    async def scenario() -> None:
        flights: Flights[int] = Flights()
        gate = asyncio.Event()

        async def work() -> int:
            await gate.wait()
            return 7

        first = asyncio.create_task(flights.run("k", work))
        await until(lambda: "k" in flights)
        second = asyncio.create_task(flights.join("k"))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set()
        assert await second == 7

    asyncio.run(scenario())


def test_the_last_callers_end_cancels_the_run_and_releases_once() -> None:
    async def scenario() -> None:
        flights: Flights[int] = Flights()
        begun, ended, released = asyncio.Event(), [], []

        async def work() -> int:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(1)
            return 0

        calls = [
            asyncio.create_task(flights.run("k", work, lambda: released.append(0))),
            asyncio.create_task(flights.run("k", work)),
        ]
        await begun.wait()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert "k" not in flights
        await until(lambda: ended and released)
        assert (len(ended), len(released)) == (1, 1)

    asyncio.run(scenario())


def test_all_callers_hear_of_a_failure_and_the_next_call_starts_anew() -> None:
    async def scenario() -> None:
        flights: Flights[int] = Flights()

        async def work() -> int:
            await asyncio.sleep(0)
            raise ValueError("bad")

        results = await asyncio.gather(
            flights.run("k", work), flights.run("k", work), return_exceptions=True
        )
        assert [str(result) for result in results] == ["bad", "bad"]

        async def good() -> int:
            return 1

        assert await flights.run("k", good) == 1

    asyncio.run(scenario())


def test_a_call_between_a_runs_end_and_its_callbacks_starts_anew() -> None:
    """It would join the failed run, again and again, without the loop ever getting on."""

    async def scenario() -> None:
        flights: Flights[int] = Flights()
        ending, runs = asyncio.Event(), []

        async def work() -> int:
            runs.append(1)
            if len(runs) == 1:
                ending.set()
                raise ValueError("bad")
            return 7

        async def late() -> int:
            await ending.wait()
            return await flights.run("k", work)

        later = asyncio.create_task(late())
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="bad"):
            await flights.run("k", work)
        assert await later == 7
        assert len(runs) == 2 and "k" not in flights

    asyncio.run(scenario())


# ---- staging and the pool


def test_gate_is_first_in_first_out_and_lets_one_of_any_size_in() -> None:
    async def scenario() -> None:
        gate, order = FairQueue(10), []
        leave = {name: asyncio.Event() for name in "abcd"}

        async def pass_through(name: str, cost: int) -> None:
            async with gate.hold(cost):
                order.append(name)
                await leave[name].wait()

        tasks = [
            asyncio.create_task(pass_through(name, cost))
            for name, cost in [("a", 99), ("b", 6), ("c", 6), ("d", 1)]
        ]
        await until(lambda: order)
        assert order == ["a"]
        leave["a"].set()
        await until(lambda: len(order) == 2)
        await asyncio.sleep(0)
        assert order == ["a", "b"]  # d would fit, but c came first.
        leave["b"].set()
        await until(lambda: len(order) == 4)
        assert order == ["a", "b", "c", "d"]
        leave["c"].set()
        leave["d"].set()
        await asyncio.gather(*tasks)
        assert gate.held == 0

    asyncio.run(scenario())


def test_gate_forgets_who_left_while_waiting() -> None:
    async def scenario() -> None:
        gate, done = FairQueue(10), []

        async def pass_through(name: str, cost: int) -> None:
            async with gate.hold(cost):
                done.append(name)

        async with gate.hold(10):
            gone = asyncio.create_task(pass_through("gone", 10))
            small = asyncio.create_task(pass_through("small", 1))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            late = asyncio.create_task(pass_through("late", 1))
            await asyncio.sleep(0)
        late_cancelled = asyncio.create_task(pass_through("never", 1))
        await asyncio.gather(small, late, late_cancelled)
        assert gate.held == 0 and done[:2] == ["small", "late"]

    asyncio.run(scenario())


def test_gate_gives_a_turn_back_that_came_with_the_cancellation() -> None:
    async def scenario() -> None:
        gate = FairQueue(10)
        leave = asyncio.Event()

        async def holder() -> None:
            async with gate.hold(10):
                await leave.wait()

        async def waiter() -> None:
            async with gate.hold(10):
                pass

        first, second = asyncio.create_task(holder()), asyncio.create_task(waiter())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leave.set()
        await asyncio.sleep(0)  # The holder runs and wakes the waiter, whose turn it now is.
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert gate.held == 0
        async with asyncio.timeout(60), gate.hold(10):
            pass

    asyncio.run(scenario())


def test_pool_drops_cancelled_work_that_has_not_started(tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = PreprocessPool(mean_colour, CrashRecord(tmp_path), 1, 10)
        gate, ran = threading.Event(), []
        first = asyncio.create_task(pool.run(gate.wait, 20.0))
        await asyncio.sleep(0)
        second = asyncio.create_task(pool.run(ran.append, 2))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gate.set()
        assert await first is True
        pool.close()
        assert ran == []

    asyncio.run(scenario())


# ---- crash record

DIE = """
import os, signal, sys
from pathlib import Path
from encoder_service.crash_record import CrashRecord
record = CrashRecord(Path(sys.argv[1]))
with record.working_on(sys.argv[2:]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_worker(directory: Path, *keys: str) -> None:
    done = subprocess.run([sys.executable, "-c", DIE, str(directory), *keys], timeout=200)
    assert done.returncode == -9


@pytest.mark.process
def test_an_item_that_killed_two_workers_is_refused_the_third_time(tmp_path: Path) -> None:
    kill_a_worker(tmp_path, KEY, OTHER)
    record = CrashRecord(tmp_path)
    assert record.check(KEY) == 1 and record.check(OTHER) == 1
    record.clear(OTHER)
    assert record.check(OTHER) == 0
    kill_a_worker(tmp_path, KEY)
    with pytest.raises(PoisonousItem):
        record.check(KEY)
    record.close()
    again = CrashRecord(tmp_path)
    assert again.crashes(KEY) == 2 and again.crashes(OTHER) == 0
    again.close()


def test_living_workers_are_no_suspects_and_leave_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "record"
    one, two = CrashRecord(directory), CrashRecord(directory)
    with one.working_on([KEY]):
        assert one.crashes(KEY) == two.crashes(KEY) == 0
        assert len(list(directory.iterdir())) == 3
    one.close()
    assert two.crashes(KEY) == 0
    two.close()
    assert not directory.exists()


@pytest.mark.process
def test_old_deaths_are_forgotten_and_swept(tmp_path: Path) -> None:
    kill_a_worker(tmp_path, KEY)
    old = time.time() - FORGET_AFTER_S - 60
    for path in tmp_path.glob("*-*"):
        os.utime(path, (old, old))
    record = CrashRecord(tmp_path)
    assert record.crashes(KEY) == 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{record.worker}.lock"]
    record.close()


def test_without_a_directory_nothing_is_remembered_and_work_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    record = CrashRecord(tmp_path / "file" / "below")
    assert "cannot be remembered" in caplog.text and not record.active
    with record.working_on([KEY]):
        assert record.check(KEY) == 0
    record.clear(KEY)
    record.close()
