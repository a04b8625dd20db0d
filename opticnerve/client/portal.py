"""An event loop on a thread, through which synchronous code uses asynchronous clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Final, TypeVar

R = TypeVar("R")


class _End:
    pass


END: Final = _End()


class Portal:
    """One loop and thread for all synchronous clients of the process (gRPC wants one loop).

    ``acquire`` and ``release`` come in pairs; the last release ends the thread.
    """

    _shared: Portal | None = None
    _users = 0
    _lock = threading.Lock()

    @classmethod
    def acquire(cls) -> Portal:
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._users += 1
            return cls._shared

    @classmethod
    def release(cls) -> None:
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls._shared is not None:
                portal, cls._shared = cls._shared, None
                portal._stop()

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="opticnerve-client", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine to its end. An interrupt of the waiting thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncGenerator[R, None]) -> Generator[R, None, None]:
        """Iterates an asynchronous generator; leaving early closes it."""
        try:
            while not isinstance(item := self.call(_next(source)), _End):
                yield item
        finally:
            self.call(source.aclose())

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


def open_portal(make: Callable[[], Coroutine[Any, Any, R]]) -> tuple[Portal, R]:
    """The portal, and what ``make`` makes on its loop; a failure releases the portal again."""
    portal = Portal.acquire()
    try:
        return portal, portal.call(make())
    except BaseException:
        Portal.release()
        raise


async def _next(source: AsyncGenerator[R, None]) -> R | _End:
    return await anext(source, END)
