"""A queue for a bounded resource, shared fairly between those whose items wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator


class FairQueue:
    """Items take a part of ``capacity`` each; one always fits, however large it is.

    Self-clocked fair queueing (Golestani, 1994): an item's due time is its cost plus the due time
    of its owner's item before it, or of the item that was admitted last, whichever is later; the
    earliest due time is admitted first. So a small item passes large ones, the owner of many items
    waits behind the owner of one, and no item waits for ever. Items of one owner, and items that
    cost nothing, keep their order.

    Belongs to one event loop. An item that is cancelled while it waits leaves the queue.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._now = 0  # Due time of the item that was admitted last.
        self._due: dict[str, int] = {}  # Of the last item of each owner that has items waiting.
        self._items: Counter[str] = Counter()  # Waiting items by owner.
        self._queue: list[tuple[int, int, str, int, asyncio.Future[None]]] = []
        self._number = itertools.count()

    @property
    def waiting(self) -> int:
        return self._items.total()

    @contextlib.asynccontextmanager
    async def hold(self, size: int, owner: str = "", cost: int = 0) -> AsyncIterator[None]:
        """Holds ``size`` of the capacity while the context lasts; entering waits for the item's
        turn. ``cost``: what the item takes from its owner's fair share."""
        due = self._due[owner] = max(self._now, self._due.get(owner, 0)) + cost
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items[owner] += 1
        heapq.heappush(self._queue, (due, next(self._number), owner, size, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner)
                self._admit()
            else:
                self._release(size)  # The turn came together with the cancellation.
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
            due, _, owner, size, turn = self._queue[0]
            if not turn.done():  # Otherwise it was cancelled.
                if self.held and self.held + size > self.capacity:
                    return
                self.held += size
                self._now = due
                self._forget(owner)
                turn.set_result(None)
            heapq.heappop(self._queue)

    def _forget(self, owner: str) -> None:
        """Removes one waiting item of ``owner`` from the counts."""
        self._items[owner] -= 1
        if not self._items[owner]:
            del self._items[owner], self._due[owner]
