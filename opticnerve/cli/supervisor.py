"""The local supervisor: encoders, LLM workers and one gateway as children of one process.

Start: encoders and LLM workers at once, each waited for until its gRPC health says SERVING, the
gateway last. While it runs, a child that ends is started again at its old port, with backoff.
Stop: gateway, LLM workers, encoders, in this order; in a hurry each ends its work instead of
letting it end. Whatever ends it, no process, port or file is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field

import httpx2

from opticnerve.cli.child import Child
from opticnerve.errors import StartupError
from opticnerve.options import is_service_link
from opticnerve.rpc.channel import is_serving, open_channel

log = logging.getLogger(__name__)

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CRASH_WINDOW_S = 60.0
POLL_S = 0.1


@dataclass
class Service:
    """A child, how it is told its port, and its recent crashes (monotonic seconds)."""

    child: Child
    stage: int  # 0: encoder, 1: LLM, 2: gateway. Started upwards, stopped downwards.
    base_command: Sequence[str]
    port_flag: str = "--port"
    crashes: deque[float] = field(default_factory=deque)


class Supervisor:
    """Owns the children. ``async with`` it; then ``await run()``."""

    def __init__(
        self,
        services: Sequence[Service],
        gateway: Callable[[list[str], list[str]], Service],
        *,
        start_timeout_s: float,
        stop_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self._workers = list(services)
        self._make_gateway = gateway
        self._all: list[Service] = list(services)
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._max_restarts = max_restarts
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> Supervisor:
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await self._stop_all()
        finally:
            self.kill()

    def stop(self) -> None:
        """Asks ``run`` to return; the children are stopped on the way out."""
        self._stopping.set()

    def hurry(self) -> None:
        """The children end their work now instead of letting it end."""
        self._stopping.set()
        self._hurry.set()

    def hang_up(self) -> None:
        """The gateway reads its keys again; one that is yet to be started reads them then."""
        for service in self._all:
            if service.stage == 2:
                service.child.hang_up()

    def kill(self) -> None:
        """Kills every child that still runs, at once."""
        for service in self._all:
            service.child.kill()

    async def run(self) -> None:
        """Starts everything and keeps it running until ``stop()``.

        Raises StartupError when a child cannot start, or crashes again and again.
        """
        work = asyncio.create_task(self._startup_and_watch())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _startup_and_watch(self) -> None:
        await _all(self._start(service) for service in self._workers)
        encoders = [s.child.address for s in self._workers if s.stage == 0]
        llms = [s.child.address for s in self._workers if s.stage == 1]
        gateway = self._make_gateway(encoders, llms)
        self._all.append(gateway)
        await self._start(gateway)
        self.url = gateway.child.address
        print(f"OpticNerve is ready at {self.url}", flush=True)
        await _all(self._watch(service) for service in self._all)

    async def _start(self, service: Service) -> None:
        """Starts one child and waits until it serves. Raises StartupError."""
        child = service.child
        await child.start()
        ended = asyncio.create_task(child.wait())
        serving = asyncio.create_task(self._until_serving(service))
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
        if ended in done:
            raise StartupError(
                f"{child.name} ended with status {ended.result()} before it served. "
                f"Its last words: {child.last_words or 'none'}"
            )
        raise StartupError(
            f"{child.name} was not ready within {self._start_timeout_s:g} s (--start-timeout-s). "
            f"Its last words: {child.last_words or 'none'}"
        )

    async def _until_serving(self, service: Service) -> None:
        address = await service.child.listening()
        port = address.rsplit(":", 1)[1].rstrip("/")
        service.child.command = [*service.base_command, service.port_flag, port]
        check = _gateway_ready if service.stage == 2 else _worker_ready
        while not await check(address):  # noqa: ASYNC110 (another process's state)
            await asyncio.sleep(POLL_S)

    async def _watch(self, service: Service) -> None:
        """Restarts the child whenever it ends. Raises StartupError after too many crashes."""
        while True:
            status = await service.child.wait()
            await self._after_crash(service, status)
            try:
                await self._start(service)
                log.info("%s is back", service.child.name)
            except StartupError as error:
                log.error("%s", error.message)
                await service.child.stop(self._stop_timeout_s, self._hurry)

    async def _after_crash(self, service: Service, status: int) -> None:
        name, crashes = service.child.name, service.crashes
        now = time.monotonic()
        crashes.append(now)
        while crashes and now - crashes[0] > CRASH_WINDOW_S:
            crashes.popleft()
        if len(crashes) > self._max_restarts:
            raise StartupError(
                f"giving up: {name} ended {len(crashes)} times within {CRASH_WINDOW_S:g} s, last "
                f"with status {status}. Its last words: {service.child.last_words or 'none'}"
            )
        pause = BACKOFF_S[min(len(crashes), len(BACKOFF_S)) - 1]
        log.warning("%s ended with status %d; starting it again in %g s", name, status, pause)
        await asyncio.sleep(pause)

    async def _stop_all(self) -> None:
        for stage in (2, 1, 0):
            children = [service.child for service in self._all if service.stage == stage]
            await asyncio.gather(
                *(child.stop(self._stop_timeout_s, self._hurry) for child in children)
            )


async def _all(work: Iterable[Coroutine[None, None, None]]) -> None:
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


async def _worker_ready(address: str) -> bool:
    channel = open_channel(address)
    try:
        return await is_serving(channel)
    finally:
        await channel.close()


async def _gateway_ready(address: str) -> bool:
    try:
        async with httpx2.AsyncClient(trust_env=False, timeout=2.0) as client:
            return (await client.get(f"{address}/ready?pictures=true")).status_code == 200
    except httpx2.HTTPError:
        return False


def child_environment(threads: int, devices: Sequence[str], index: int) -> dict[str, str]:
    """The environment of one child: its share of cores and, where given, its device. Without the
    service links that `up` has told of."""
    environment = {
        name: value for name, value in os.environ.items() if not is_service_link(name, value)
    }
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["MKL_NUM_THREADS"] = str(threads)
    environment["PYTHONUNBUFFERED"] = "1"
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    return environment
