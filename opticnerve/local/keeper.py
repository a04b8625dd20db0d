"""Keeps child processes running: starts them, restarts those that end, and stops them all.

A child that ends is restarted with backoff; if it keeps crashing, the keeper gives up. Children of
the highest role are stopped first, and all children of one role together. After a second signal
they abort their work instead of finishing it. However a keeper ends, none of its processes is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Self

from opticnerve.errors import StartupError
from opticnerve.local.child import Child, Role

log = logging.getLogger(__name__)

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CRASH_WINDOW_S = 60.0


class Keeper(ABC):
    """Owns ``children``. ``async with`` it; then ``await run()``."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        start_timeout_s: float,
        stop_timeout_s: float,
        max_restarts: int,
        after_crash: Callable[[Child], object] = lambda child: None,
    ) -> None:
        """``after_crash`` is called before a child is restarted."""
        self.children = list(children)
        self._crashes: defaultdict[Child, deque[float]] = defaultdict(deque)  # Monotonic seconds.
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._max_restarts = max_restarts
        self._call_after_crash = after_crash
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    @abstractmethod
    async def start_and_watch(self) -> None:
        """Starts and watches all children; ends only with an error."""

    @abstractmethod
    async def until_started(self, child: Child) -> None:
        """Waits until a child that was just started works."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            for role in reversed(Role):
                await asyncio.gather(
                    *(
                        child.stop(self._stop_timeout_s, self._hurry)
                        for child in self.children
                        if child.role == role
                    )
                )
        finally:
            self.kill()

    def stop(self) -> None:
        """Makes ``run`` return; leaving the context then stops the children."""
        self._stopping.set()

    def hurry(self) -> None:
        """Like ``stop``, and makes the children abort their work instead of finishing it."""
        self._stopping.set()
        self._hurry.set()

    def hang_up(self) -> None:
        """Makes gateways reload their keys; one that has not started yet reads them when it
        does."""
        for child in self.children:
            if child.role == Role.GATEWAY:
                child.hang_up()

    def kill(self) -> None:
        """Kills every child that still runs."""
        for child in self.children:
            child.kill()

    async def run(self) -> None:
        """Starts everything and keeps it running until ``stop()``.

        Raises StartupError if a child cannot start, or keeps crashing.
        """
        work = asyncio.create_task(self.start_and_watch())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def start(self, child: Child) -> None:
        """Starts one child and waits until it works. Raises StartupError."""
        await child.start()
        ended = asyncio.create_task(child.wait())
        started = asyncio.create_task(self.until_started(child))
        try:
            done, _ = await asyncio.wait(
                {ended, started},
                timeout=self._start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if started in done:
                started.result()
                return
        finally:
            for task in (ended, started):
                task.cancel()
            await asyncio.gather(ended, started, return_exceptions=True)
        last_words = f"Its last words: {child.last_words or 'none'}"
        if ended in done:
            raise StartupError(
                f"{child.name} ended with status {ended.result()} before it served. {last_words}"
            )
        raise StartupError(
            f"{child.name} was not ready within {self._start_timeout_s:g} s. {last_words}"
        )

    async def watch(self, child: Child) -> None:
        """Restarts the child whenever it ends. Raises StartupError after too many crashes."""
        while True:
            await self._after_crash(child, await child.wait())
            try:
                await self.start(child)
                log.info("%s is back", child.name)
            except StartupError as error:
                log.error("%s", error.message)
                await child.stop(self._stop_timeout_s, self._hurry)

    async def _after_crash(self, child: Child, status: int) -> None:
        """Waits before the next start. Raises StartupError after too many crashes."""
        name, crashes, now = child.name, self._crashes[child], time.monotonic()
        crashes.append(now)
        self._call_after_crash(child)
        while crashes and now - crashes[0] > CRASH_WINDOW_S:
            crashes.popleft()
        if len(crashes) > self._max_restarts:
            raise StartupError(
                f"giving up: {name} ended {len(crashes)} times within {CRASH_WINDOW_S:g} s, last "
                f"with status {status}. Its last words: {child.last_words or 'none'}"
            )
        pause = BACKOFF_S[min(len(crashes), len(BACKOFF_S)) - 1]
        log.warning("%s ended with status %d; starting it again in %g s", name, status, pause)
        await asyncio.sleep(pause)


async def run_all(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Waits for all of ``work``; the first StartupError cancels the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except* StartupError as errors:
        failure = errors.exceptions[0]
    else:
        return
    raise failure
