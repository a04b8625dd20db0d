"""Two queues for places: first in first out by cost, and fair between requests.

Both belong to one event loop. An item that is cancelled while it waits leaves its queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections import Counter, deque
from collections.abc import AsyncIterator


class Gate:
    """A first in, first out semaphore by cost. One holder always fits, however large it is."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def hold(self, cost: int) -> AsyncIterator[None]:
        await self._acquire(cost)
        try:
            yield
        finally:
            self._release(cost)

    def _fits(self, cost: int) -> bool:
        return self.held == 0 or self.held + cost <= self.capacity

    async def _acquire(self, cost: int) -> None:
        if not self._waiting and self._fits(cost):
            self.held += cost
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((cost, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(cost)  # The turn came together with the cancellation.
            self._wake()
            raise

    def _release(self, cost: int) -> None:
        self.held -= cost
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            cost, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(cost):
                    return
                self.held += cost
                turn.set_result(None)
            self._waiting.popleft()


class FairQueue:
    """A number of places, shared fairly between owners by the cost of their items.

    Self-clocked fair queueing (Golestani, 1994): an item's due time is its cost plus the due time
    of its owner's item before it, or of the item that was admitted last, whichever is later; the
    earliest due time is admitted first. So a small item passes large ones, the owner of many items
    waits behind the owner of one, and no item waits for ever.
    """

    def __init__(self, places: int) -> None:
        self.free = places
        self._now = 0  # Due time of the item that was admitted last.
        self._due: dict[str, int] = {}  # Of the last item of each owner that has items waiting.
        self._items: Counter[str] = Counter()  # Waiting items by owner.
        self._queue: list[tuple[int, int, str, asyncio.Future[None]]] = []
        self._ticket = itertools.count()

    @property
    def waiting(self) -> int:
        return self._items.total()

    @contextlib.asynccontextmanager
    async def hold(self, owner: str, cost: int) -> AsyncIterator[None]:
        """Holds a place while the context lasts; entering waits for the item's turn."""
        due = self._due[owner] = max(self._now, self._due.get(owner, 0)) + cost
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items[owner] += 1
        heapq.heappush(self._queue, (due, next(self._ticket), owner, turn))
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner)
            else:
                self._leave()  # The turn came together with the cancellation.
            raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self.free += 1
        self._wake()

    def _wake(self) -> None:
        while self._queue and (self.free or self._queue[0][3].done()):
            due, _, owner, turn = heapq.heappop(self._queue)
            if turn.done():  # Cancelled, and removed from the counts by its own task.
                continue
            self.free -= 1
            self._now = due
            self._forget(owner)
            turn.set_result(None)

    def _forget(self, owner: str) -> None:
        """Removes one waiting item of ``owner`` from the counts."""
        self._items[owner] -= 1
        if not self._items[owner]:
            del self._items[owner], self._due[owner]
