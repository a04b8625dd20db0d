"""The local supervisor: encoders, LLM workers and one gateway as children of one process.

Start: encoders and LLM workers at once, each waited for until its gRPC health says SERVING, the
gateway last, until it says that it is ready. While it runs, a child that ends is started again at
its old port, with backoff. Stop: gateway, LLM workers, encoders, in this order; after a second
signal each cuts its work instead of finishing it. However it ends, it leaves no process, port or
file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence

from opticnerve.errors import StartupError
from opticnerve.local.child import Child, Role
from opticnerve.rpc.channel import is_serving, open_channel
from opticnerve.rpc.tls import ChannelTls

log = logging.getLogger(__name__)

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CRASH_WINDOW_S = 60.0
POLL_S = 0.1


class Supervisor:
    """Owns the children. ``async with`` it; then ``await run()``."""

    def __init__(
        self,
        workers: Sequence[Child],
        gateway: Callable[[list[str], list[str]], Child],
        *,
        start_timeout_s: float,
        stop_timeout_s: float,
        max_restarts: int,
        tls: ChannelTls | None = None,
    ) -> None:
        """``gateway`` makes the gateway's child from the addresses of encoders and LLM workers.
        ``tls``: for the workers' health checks."""
        self._workers = list(workers)
        self._make_gateway = gateway
        self._children = list(workers)
        self._crashes: defaultdict[Child, deque[float]] = defaultdict(deque)  # Monotonic seconds.
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._max_restarts = max_restarts
        self._tls = tls
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> Supervisor:
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            for role in reversed(Role):
                await asyncio.gather(
                    *(
                        child.stop(self._stop_timeout_s, self._hurry)
                        for child in self._children
                        if child.role == role
                    )
                )
        finally:
            self.kill()

    def stop(self) -> None:
        """Asks ``run`` to return; the children are stopped on the way out."""
        self._stopping.set()

    def hurry(self) -> None:
        """Stops, and makes the children cut their work instead of finishing it."""
        self._stopping.set()
        self._hurry.set()

    def hang_up(self) -> None:
        """Makes the gateway read its keys again; one that has yet to start reads them then."""
        for child in self._children:
            if child.role == Role.GATEWAY:
                child.hang_up()

    def kill(self) -> None:
        """Kills every child that still runs, at once."""
        for child in self._children:
            child.kill()

    async def run(self) -> None:
        """Starts everything and keeps it running until ``stop()``.

        Raises StartupError when a child cannot start, or crashes again and again.
        """
        work = asyncio.create_task(self._start_and_watch())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _start_and_watch(self) -> None:
        await _run_all(self._start(child) for child in self._workers)
        encoders = [child.address for child in self._workers if child.role == Role.ENCODER]
        llms = [child.address for child in self._workers if child.role == Role.LLM]
        gateway = self._make_gateway(encoders, llms)
        self._children.append(gateway)
        await self._start(gateway)
        self.url = gateway.address
        print(f"OpticNerve is ready at {self.url}", flush=True)
        await _run_all(self._watch(child) for child in self._children)

    async def _start(self, child: Child) -> None:
        """Starts one child and waits until it serves. Raises StartupError."""
        await child.start()
        ended = asyncio.create_task(child.wait())
        serving = asyncio.create_task(self._until_serving(child))
        try:
            done, _ = await asyncio.wait(
                {ended, serving},
                timeout=self._start_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if serving in done:
                serving.result()
                return
        finally:
            for task in (ended, serving):
                task.cancel()
            await asyncio.gather(ended, serving, return_exceptions=True)
        last_words = f"Its last words: {child.last_words or 'none'}"
        if ended in done:
            raise StartupError(
                f"{child.name} ended with status {ended.result()} before it served. {last_words}"
            )
        raise StartupError(
            f"{child.name} was not ready within {self._start_timeout_s:g} s (--start-timeout-s). "
            f"{last_words}"
        )

    async def _until_serving(self, child: Child) -> None:
        """Waits until the child serves; from then on it is started at the same port."""
        address = await child.listening()
        child.port = int(address.rsplit(":", 1)[1].rstrip("/"))
        if child.role == Role.GATEWAY:
            await child.ready()
            return
        while not await self._is_worker_ready(address):  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(POLL_S)

    async def _is_worker_ready(self, address: str) -> bool:
        channel = open_channel(address, tls=self._tls)
        try:
            return await is_serving(channel)
        finally:
            await channel.close()

    async def _watch(self, child: Child) -> None:
        """Restarts the child whenever it ends. Raises StartupError after too many crashes."""
        while True:
            await self._after_crash(child, await child.wait())
            try:
                await self._start(child)
                log.info("%s is back", child.name)
            except StartupError as error:
                log.error("%s", error.message)
                await child.stop(self._stop_timeout_s, self._hurry)

    async def _after_crash(self, child: Child, status: int) -> None:
        """Waits before the next start. Raises StartupError after too many crashes."""
        name, crashes, now = child.name, self._crashes[child], time.monotonic()
        crashes.append(now)
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


async def _run_all(work: Iterable[Coroutine[None, None, None]]) -> None:
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
