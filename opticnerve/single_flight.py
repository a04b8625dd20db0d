"""Single flight: concurrent calls for one key share one run.

The first call starts the run, and the others wait for it too. A call that leaves (is cancelled, or
out of time) does not disturb the others; when the last one leaves, the run is cancelled. Belongs to
one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class _Flight(Generic[R]):
    def __init__(self, task: asyncio.Task[R]) -> None:
        self.task = task
        self.waiters = 0


class Flights(Generic[R]):
    def __init__(self) -> None:
        self._flights: dict[str, _Flight[R]] = {}

    def __len__(self) -> int:
        """Runs under way."""
        return len(self._flights)

    def __contains__(self, key: str) -> bool:
        """Whether a run for ``key`` is under way, which ``run`` would join."""
        flight = self._flights.get(key)
        # A finished task stays in the dictionary until its callbacks run.
        return flight is not None and not flight.task.done()

    async def join(self, key: str) -> R:
        """The result of the run under way for ``key``. Raises KeyError if there is none."""
        return await self._wait(key, self._flights[key])

    async def run(
        self,
        key: str,
        start: Callable[[], Coroutine[Any, Any, R]],
        release: Callable[[], None] = lambda: None,
    ) -> R:
        """The result of the run under way for ``key``, or of one that is started now.

        ``release`` is called exactly once: when the run that was started has ended, or at once
        if another's was joined.
        """
        if key in self:
            release()
            return await self.join(key)
        flight = self._flights[key] = _Flight(asyncio.create_task(start()))
        flight.task.add_done_callback(lambda task: self._ended(key, task, release))
        return await self._wait(key, flight)

    async def _wait(self, key: str, flight: _Flight[R]) -> R:
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                flight.task.cancel()
                self._forget(key, flight.task)  # A new call must not join what is being cancelled.

    def _ended(self, key: str, task: asyncio.Task[R], release: Callable[[], None]) -> None:
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # Retrieved even if every call has left, or asyncio would log it.
        release()

    def _forget(self, key: str, task: asyncio.Task[R]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
