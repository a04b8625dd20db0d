"""Batches for one device. Knows no tensors.

Batches are made by cost, not by count. As soon as the device is free, it takes the waiting items,
first in first out, up to ``max_cost``. An item that does not fit waits for the next batch, an item
that costs more than ``max_cost`` runs alone, and no timer delays a batch. The device has a thread
of its own, so that neither a forward pass nor a busy event loop keeps the other waiting.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from encoder_service.backends.base import Recovery
from opticnerve.errors import OpticNerveError, Unavailable

log = logging.getLogger(__name__)

CLOSE_S = 5.0  # Time for the batch on the device to end.
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BatchResult(Generic[R]):
    """One item's result, and figures of the batch that it was part of."""

    result: R
    submitted: float  # time.monotonic() at submit.
    queue_s: float  # From submit to launch.
    run_s: float
    batch_items: int
    batch_cost: int


@dataclass(slots=True)
class _Entry(Generic[T, R]):
    payload: T
    cost: int
    alone: bool
    future: Future[BatchResult[R]] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)


class Batcher(Generic[T, R]):
    """Owns the device's thread. ``close`` ends it; items that still wait then fail as Unavailable.

    ``run`` gets a batch of payloads and returns their results in order. ``classify`` decides what
    to do after an exception of ``run``, and may free memory. ``on_split`` is called for each batch
    that is run again in parts, ``on_lost`` when the device is lost.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R]],
        max_cost: int,
        *,
        classify: Callable[[Exception], Recovery] = lambda error: Recovery.ISOLATE,
        on_split: Callable[[Recovery], None] = lambda recovery: None,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.max_cost = max_cost
        self._run = run
        self._classify = classify
        self._on_split = on_split
        self._on_lost = on_lost
        self._queue: deque[_Entry[T, R]] = deque()  # Not launched yet; includes cancelled ones.
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self._thread.start()

    def submit(self, payload: T, cost: int, *, alone: bool = False) -> Future[BatchResult[R]]:
        """Queues one item. Cancelling the future drops the item if it has not been launched. Raises
        Unavailable after ``close``."""
        entry: _Entry[T, R] = _Entry(payload, cost, alone)
        with self._changed:
            if self._closed:
                raise Unavailable("the encoder is shutting down; try another")
            self._queue.append(entry)
            self._changed.notify()
        return entry.future

    def close(self) -> None:
        """Fails the waiting items, and waits up to ``CLOSE_S`` for the batch on the device."""
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for entry in left:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(Unavailable("the encoder is shutting down; try another"))
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("a batch did not end within %g s; closing without it", CLOSE_S)

    def _loop(self) -> None:
        while batch := self._take():
            try:
                self._launch(batch)
            except Exception as error:  # Raised by ``classify`` or another step of recovery.
                log.exception("recovering from a failed batch failed")
                self._lose(batch, error)

    def _take(self) -> list[_Entry[T, R]]:
        """Waits for work and removes one batch from the queue; empty once closed."""
        with self._changed:
            while True:
                batch = self._fill()
                if batch or self._closed:
                    return batch
                self._changed.wait()

    def _fill(self) -> list[_Entry[T, R]]:
        batch: list[_Entry[T, R]] = []
        cost = 0
        while self._queue:
            head = self._queue[0]
            fits = not batch or (cost + head.cost <= self.max_cost and not head.alone)
            if not fits and not head.future.cancelled():
                break
            self._queue.popleft()
            if not head.future.set_running_or_notify_cancel():
                continue
            batch.append(head)
            cost += head.cost
            if head.alone:
                break
        return batch

    def _launch(self, batch: list[_Entry[T, R]]) -> None:
        started = time.monotonic()
        try:
            results = self._run([entry.payload for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as caught:
            # The traceback holds the frames, which hold the tensors; memory must be free below.
            trace = traceback.format_exc()
            error: Exception = caught.with_traceback(None)
            recovery = self._classify(error)
        else:
            self._resolve(batch, results, started)
            return
        if recovery is not Recovery.SPLIT and not isinstance(error, OpticNerveError):
            log.error("a batch of %d failed\n%s", len(batch), trace)
        self._recover(batch, error, recovery)

    def _resolve(self, batch: list[_Entry[T, R]], results: Sequence[R], started: float) -> None:
        seconds = time.monotonic() - started
        cost = sum(entry.cost for entry in batch)
        for entry, result in zip(batch, results, strict=True):
            waited = started - entry.submitted
            done = BatchResult(result, entry.submitted, waited, seconds, len(batch), cost)
            entry.future.set_result(done)

    def _recover(self, batch: list[_Entry[T, R]], error: Exception, recovery: Recovery) -> None:
        if recovery is Recovery.STOP:
            self._lose(batch, error)
            return
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        log.warning(
            "a batch of %d runs again in parts (%s): %s", len(batch), recovery.name.lower(), error
        )
        self._on_split(recovery)
        size = (len(batch) + 1) // 2 if recovery is Recovery.SPLIT else 1
        for start in range(0, len(batch), size):
            self._launch(batch[start : start + size])

    def _lose(self, batch: list[_Entry[T, R]], error: Exception) -> None:
        """Fails the batch on a lost device and reports the loss."""
        for entry in batch:
            if not entry.future.done():
                entry.future.set_exception(error)
        self._on_lost(error)
