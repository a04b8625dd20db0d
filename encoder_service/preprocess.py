"""The CPU side of encoding: a pool of threads for Pillow and numpy, which release the GIL.

Compressed items wait cheaply, decoded ones do not: ``staging`` bounds how many patches may be
decoded ahead of the device, in order of arrival. Work that has not started can be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


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
                self._release(cost)  # It was this one's turn already.
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


class PreprocessPool:
    """Owns the threads. ``close`` waits for what runs and drops what does not yet."""

    def __init__(self, workers: int, max_staged_patches: int) -> None:
        self.workers = workers
        self.staging = Gate(max_staged_patches)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="preprocess")

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs ``work`` on a thread; cancelling drops it if it has not started."""
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
