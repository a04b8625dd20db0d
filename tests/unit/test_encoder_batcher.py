"""Batching by cost: order, budget, cancellation, recovery. No tensors, no event loop."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_service.backends.base import Recovery
from encoder_service.batcher import Batcher
from opticnerve.errors import Unavailable

WAIT_S = 60.0


class Device:
    """Records batches; holds each until it may go, so that tests fill the queue meanwhile."""

    def __init__(self, fail: Callable[[Sequence[str]], None] = lambda batch: None) -> None:
        self.batches: list[list[str]] = []
        self.may_go = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.fail = fail

    def __call__(self, batch: Sequence[str]) -> list[str]:
        self.batches.append(list(batch))
        self.entered.release()
        assert self.may_go.acquire(timeout=WAIT_S)
        self.fail(batch)
        return [item.upper() for item in batch]

    def go(self, times: int = 100) -> None:
        self.may_go.release(times)


@contextmanager
def occupied(device: Device, max_cost: int = 10, **options: object) -> Iterator[Batcher[str, str]]:
    """A batcher whose device is busy with item "first", so that what follows queues."""
    batcher = Batcher(device, max_cost, **options)  # type: ignore[arg-type]
    first = batcher.submit("first", 1)
    assert device.entered.acquire(timeout=WAIT_S)
    try:
        yield batcher
        device.go()
        assert first.result(WAIT_S).result == "FIRST"
    finally:
        device.go()
        batcher.close()


def classify(error: Exception) -> Recovery:
    if isinstance(error, MemoryError):
        return Recovery.SPLIT
    return Recovery.STOP if isinstance(error, OSError) else Recovery.ISOLATE


def test_takes_what_waits_up_to_the_budget_in_order() -> None:
    device = Device()
    with occupied(device) as batcher:
        futures = [batcher.submit(name, cost) for name, cost in [("a", 4), ("b", 6), ("c", 1)]]
        device.go()
        assert [future.result(WAIT_S).result for future in futures] == ["A", "B", "C"]
    assert device.batches == [["first"], ["a", "b"], ["c"]]
    done = futures[0].result()
    assert (done.batch_items, done.batch_cost) == (2, 10)
    assert done.queue_s > 0 and done.run_s > 0


def test_an_item_that_does_not_fit_is_not_overtaken() -> None:
    device = Device()
    with occupied(device) as batcher:
        futures = [batcher.submit(name, cost) for name, cost in [("a", 6), ("b", 6), ("c", 1)]]
        device.go()
        for future in futures:
            future.result(WAIT_S)
    assert device.batches == [["first"], ["a"], ["b", "c"]]


def test_an_item_larger_than_the_budget_runs_alone() -> None:
    device = Device()
    with occupied(device) as batcher:
        futures = [batcher.submit(name, cost) for name, cost in [("a", 1), ("big", 99), ("b", 1)]]
        device.go()
        for future in futures:
            future.result(WAIT_S)
    assert device.batches == [["first"], ["a"], ["big"], ["b"]]


def test_a_suspect_runs_alone() -> None:
    device = Device()
    with occupied(device) as batcher:
        futures = [
            batcher.submit("a", 1),
            batcher.submit("suspect", 1, alone=True),
            batcher.submit("b", 1),
        ]
        device.go()
        for future in futures:
            future.result(WAIT_S)
    assert device.batches == [["first"], ["a"], ["suspect"], ["b"]]


def test_cancelled_items_are_dropped_before_launch() -> None:
    device = Device()
    with occupied(device) as batcher:
        big, kept = batcher.submit("gone", 10), batcher.submit("kept", 1)
        assert big.cancel()
        device.go()
        kept.result(WAIT_S)
    assert device.batches == [["first"], ["kept"]]


def test_a_cancelled_item_too_large_for_the_batch_does_not_end_it() -> None:
    device = Device()
    with occupied(device) as batcher:
        futures = [batcher.submit(name, cost) for name, cost in [("a", 5), ("gone", 9), ("b", 5)]]
        assert futures[1].cancel()
        device.go()
        futures[2].result(WAIT_S)
    assert device.batches == [["first"], ["a", "b"]]


def test_an_item_on_the_device_cannot_be_cancelled() -> None:
    device = Device()
    batcher = Batcher(device, 10)
    future = batcher.submit("a", 1)
    assert device.entered.acquire(timeout=WAIT_S)
    assert not future.cancel()
    device.go()
    assert future.result(WAIT_S).result == "A"
    batcher.close()


def test_one_bad_item_fails_alone() -> None:
    def fail(batch: Sequence[str]) -> None:
        if "bad" in batch:
            raise ValueError("bad item")

    device = Device(fail)
    with occupied(device, classify=classify) as batcher:
        good, bad, fine = (batcher.submit(name, 1) for name in ["good", "bad", "fine"])
        device.go()
        assert good.result(WAIT_S).result == "GOOD"
        assert fine.result(WAIT_S).result == "FINE"
        with pytest.raises(ValueError, match="bad item"):
            bad.result(WAIT_S)
    assert device.batches[1:] == [["good", "bad", "fine"], ["good"], ["bad"], ["fine"]]


def test_out_of_memory_halves_the_batch_then_fails_one_item() -> None:
    def fail(batch: Sequence[str]) -> None:
        if len(batch) > 2 or "huge" in batch:
            raise MemoryError

    device = Device(fail)
    with occupied(device, classify=classify) as batcher:
        names = ["a", "b", "c", "huge"]
        futures = {name: batcher.submit(name, 1) for name in names}
        device.go()
        for name in "abc":
            assert futures[name].result(WAIT_S).result == name.upper()
        with pytest.raises(MemoryError):
            futures["huge"].result(WAIT_S)
    assert device.batches[1:] == [
        ["a", "b", "c", "huge"],
        ["a", "b"],
        ["c", "huge"],
        ["c"],
        ["huge"],
    ]


def test_a_lost_device_fails_the_whole_batch_and_tells() -> None:
    def fail(batch: Sequence[str]) -> None:
        if "a" in batch:
            raise OSError("device lost")

    lost: list[Exception] = []
    device = Device(fail)
    with occupied(device, classify=classify, on_lost=lost.append) as batcher:
        futures = [batcher.submit(name, 1) for name in "ab"]
        device.go()
        for future in futures:
            with pytest.raises(OSError, match="device lost"):
                future.result(WAIT_S)
    assert len(lost) == 1
    assert device.batches[1:] == [["a", "b"]]


def test_a_device_that_fails_while_it_recovers_is_lost() -> None:
    """The thread outlives it: what follows fails too, and nobody waits for ever."""

    def fail(batch: Sequence[str]) -> list[str]:
        raise MemoryError

    def broken(error: Exception) -> Recovery:
        raise OSError("emptying the cache failed")

    lost: list[Exception] = []
    batcher: Batcher[str, str] = Batcher(fail, 10, classify=broken, on_lost=lost.append)
    for name in "ab":
        with pytest.raises(OSError, match="emptying the cache failed"):
            batcher.submit(name, 1).result(WAIT_S)
    batcher.close()
    assert len(lost) == 2


def test_a_result_too_few_fails_instead_of_shifting_results() -> None:
    batcher: Batcher[str, str] = Batcher(lambda batch: [], 10)
    with pytest.raises(RuntimeError, match="0 results for 1"):
        batcher.submit("a", 1).result(WAIT_S)
    batcher.close()


def test_close_fails_what_waits_and_ends_the_thread() -> None:
    device = Device()
    batcher = Batcher(device, 10)
    running = batcher.submit("a", 1)
    assert device.entered.acquire(timeout=WAIT_S)
    waiting = batcher.submit("b", 1)
    closer = threading.Thread(target=batcher.close)
    closer.start()
    assert isinstance(waiting.exception(WAIT_S), Unavailable)
    device.go()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert running.result(WAIT_S).result == "A"
    with pytest.raises(Unavailable):
        batcher.submit("c", 1)


@given(
    costs=st.lists(st.integers(1, 15), min_size=1, max_size=12),
    gone=st.sets(st.integers(0, 11)),
    suspects=st.sets(st.integers(0, 11)),
)
@settings(max_examples=60, deadline=None)
def test_batches_keep_order_and_budget_and_lose_nothing(
    costs: list[int], gone: set[int], suspects: set[int]
) -> None:
    device = Device()
    with occupied(device) as batcher:
        futures = [
            batcher.submit(str(index), cost, alone=index in suspects)
            for index, cost in enumerate(costs)
        ]
        for index in gone & set(range(len(costs))):
            assert futures[index].cancel()
        device.go()
        kept = [index for index in range(len(costs)) if index not in gone]
        for index in kept:
            futures[index].result(WAIT_S)
    batches = [[int(item) for item in batch] for batch in device.batches[1:]]
    assert [index for batch in batches for index in batch] == kept
    for batch, following in itertools.pairwise([*batches, []]):
        cost = sum(costs[index] for index in batch)
        assert len(batch) == 1 or cost <= 10
        alone = suspects & {batch[0], *following[:1]}
        assert not following or alone or cost + costs[following[0]] > 10  # No room was left.
        assert len(batch) == 1 or not suspects & set(batch)
