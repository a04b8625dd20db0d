"""The work of one device: the backlog of accepted items, and its batches. Knows no tensors.

The backlog bounds memory and waiting time, and measures throughput. An item that does not fit is
refused with a retry hint: before its bytes are read, and again once they have arrived. It counts
only once they have, so that a caller that sends no bytes does not keep others out.

Batches are made by cost, not by count. As soon as the device is free it takes the items that wait,
first in first out, up to ``max_cost``. An item that does not fit waits for the next batch,
one larger than the budget runs alone, and no timer delays a batch. The device has a thread of its
own, so that neither a forward pass nor a busy event loop keeps the other waiting.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from encoder_service import metrics
from encoder_service.backends.base import Recovery
from opticnerve.errors import OpticNerveError, Overloaded, Unavailable

log = logging.getLogger(__name__)

CLOSE_S = 5.0  # For the batch on the device to end.
T = TypeVar("T")
R = TypeVar("R")

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0  # Before the first item, while the throughput is unknown.
DECAY_S = 10.0  # Seconds of work after which a measurement counts 1/e.


class BacklogPlace:
    """One accepted item's place in the backlog. ``release`` is idempotent."""

    def __init__(self, backlog: Backlog, patches: int, num_bytes: int) -> None:
        self.patches = patches
        self.num_bytes = num_bytes
        self._backlog: Backlog | None = backlog

    def release(self) -> None:
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            backlog._add(-1, -self.patches, -self.num_bytes)


class Backlog:
    """The items that the encoder has accepted and not finished. Belongs to one event loop.

    Bounds: ``max_patches``, ``max_items`` and ``max_bytes`` (compressed). One item always fits an
    empty backlog, however large it is. ``clock`` returns seconds.
    """

    def __init__(
        self,
        max_patches: int,
        max_items: int,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_patches = max_patches
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.patches = 0
        self.items = 0
        self.num_bytes = 0
        self._clock = clock
        self._since = 0.0  # When the backlog stopped being empty, or an item was last encoded.
        self._recent_patches = 0.0  # Encoded, in ``_recent_seconds``; the newest count most.
        self._recent_seconds = 0.0

    def can_admit(self, patches: int, num_bytes: int) -> bool:
        return self.items == 0 or (
            self.items < self.max_items
            and self.patches + patches <= self.max_patches
            and self.num_bytes + num_bytes <= self.max_bytes
        )

    def check_room(self, patches: int, num_bytes: int) -> None:
        """Raises Overloaded if an item could not be admitted now."""
        if not self.can_admit(patches, num_bytes):
            raise Overloaded(
                f"the encoder's queue is full: {self.items} items, {self.patches} patches",
                retry_after_s=self.retry_after_s,
            )

    def admit(self, patches: int, num_bytes: int) -> BacklogPlace:
        """Takes a place, which the caller releases. Raises Overloaded if there is none."""
        self.check_room(patches, num_bytes)
        if self.items == 0:
            self._since = self._clock()
        self._add(1, patches, num_bytes)
        return BacklogPlace(self, patches, num_bytes)

    def _add(self, items: int, patches: int, num_bytes: int) -> None:
        self.items += items
        self.patches += patches
        self.num_bytes += num_bytes
        metrics.PATCHES_PENDING.set(self.patches)

    def record(self, patches: int) -> None:
        """An item of ``patches`` has been encoded; its place is still taken."""
        now = self._clock()
        passed, self._since = now - self._since, now
        decay = math.exp(-passed / DECAY_S)
        self._recent_patches = self._recent_patches * decay + patches
        self._recent_seconds = self._recent_seconds * decay + passed

    @property
    def patches_per_s(self) -> float:
        """Throughput from arrival to embedding while there is work; 0 before the first item."""
        return self._recent_patches / max(self._recent_seconds, 1e-6)

    @property
    def retry_after_s(self) -> float:
        """Seconds until about half of the backlog will be done, by the throughput so far."""
        if self.patches_per_s == 0:
            return UNKNOWN_RETRY_S
        wait = self.patches / 2 / self.patches_per_s
        return min(max(wait, MIN_RETRY_S), MAX_RETRY_S)

    def check_integrity(self) -> None:
        """Raises RuntimeError when an idle backlog still counts something."""
        if self.items == 0 and (self.patches or self.num_bytes):
            raise RuntimeError(f"no items, but {self.patches} patches, {self.num_bytes} bytes")
        if min(self.items, self.patches, self.num_bytes) < 0:
            raise RuntimeError("released more than was admitted")


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

    ``run`` gets a batch of payloads and returns their results in order; ``classify`` says what
    to do after an exception of ``run``, and may free memory.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R]],
        max_cost: int,
        *,
        classify: Callable[[Exception], Recovery] = lambda error: Recovery.ISOLATE,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.max_cost = max_cost
        self._run = run
        self._classify = classify
        self._on_lost = on_lost
        self._queue: deque[_Entry[T, R]] = deque()  # Not launched; cancelled ones included.
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self._thread.start()

    def submit(self, payload: T, cost: int, *, alone: bool = False) -> Future[BatchResult[R]]:
        """Queues one item. Cancelling the future drops the item if it has not been launched."""
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
        log.warning("a batch of %d is split (%s): %s", len(batch), recovery.name.lower(), error)
        size = (len(batch) + 1) // 2 if recovery is Recovery.SPLIT else 1
        for start in range(0, len(batch), size):
            self._launch(batch[start : start + size])

    def _lose(self, batch: list[_Entry[T, R]], error: Exception) -> None:
        """Fails the batch on a lost device and reports the loss."""
        for entry in batch:
            if not entry.future.done():
                entry.future.set_exception(error)
        self._on_lost(error)
