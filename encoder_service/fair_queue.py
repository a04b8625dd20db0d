"""A queue for a bounded capacity, fair between sharers by cost. Knows no pictures."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator


class FairQueue:
    """Each item holds a part of ``capacity``; while none is held, any item is admitted.

    Self-clocked fair queueing (Golestani, 1994): an item's due time is its cost plus the due time
    of its sharer's previous item or of the item admitted last, whichever is later; the earliest due
    time is admitted first. So a small item overtakes large ones, a sharer with many items waits
    behind a sharer with one, and no item waits for ever. Items of one sharer keep their order, and
    so do items that cost nothing.

    Belongs to one event loop. An item that is cancelled while it waits leaves the queue.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._now = 0  # Due time of the item that was admitted last.
        self._due: dict[str, int] = {}  # Due time of the last waiting item, by sharer.
        self._items: Counter[str] = Counter()  # Waiting items by sharer.
        self._queue: list[tuple[int, int, str, int, asyncio.Future[None]]] = []
        self._number = itertools.count()

    @property
    def waiting(self) -> int:
        return self._items.total()

    @contextlib.asynccontextmanager
    async def hold(self, size: int, sharer: str = "", cost: int = 0) -> AsyncIterator[None]:
        """Holds ``size`` of the capacity while the context lasts; entering waits for the item's
        turn. ``cost``: what the item takes from its sharer's fair share."""
        due = self._due[sharer] = max(self._now, self._due.get(sharer, 0)) + cost
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items[sharer] += 1
        heapq.heappush(self._queue, (due, next(self._number), sharer, size, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(sharer)
                self._admit()
            else:
                self._release(size)  # Its turn came in the moment of the cancellation.
            raise
        try:
            yield
        finally:
            self._release(size)

    def _release(self, size: int) -> None:
        self.held -= size
        self._admit()

    def _admit(self) -> None:
        """Lets in the items that fit, in the order of their due times."""
        while self._queue:
            due, _, sharer, size, turn = self._queue[0]
            if not turn.done():  # Otherwise it was cancelled.
                if self.held and self.held + size > self.capacity:
                    return
                self.held += size
                self._now = due
                self._forget(sharer)
                turn.set_result(None)
            heapq.heappop(self._queue)

    def _forget(self, sharer: str) -> None:
        """Removes one waiting item of ``sharer`` from the counts."""
        self._items[sharer] -= 1
        if not self._items[sharer]:
            del self._items[sharer], self._due[sharer]
