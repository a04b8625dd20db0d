"""The workers behind the gateway: who they are, how they are, and which one works next.

A pool keeps one channel a worker, asks each for its health and description (more often while it
does not serve), and lends the serving worker with the least pending cost. Cost is patches for
encoders and sequences for LLM workers: what this gateway sent and has no answer to, plus what
others sent by the worker's own report. A worker whose connection breaks is out at once and comes
back with its next good health check. Names (``dns:///name:port``) are resolved again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

import grpc

from gateway.deadline import Deadline
from opticnerve.embeddings.store import StoreState
from opticnerve.errors import Unavailable
from opticnerve.rpc.channel import is_serving, open_channel

log = logging.getLogger(__name__)

POLL_SERVING_S = 1.0
POLL_DOWN_S = (0.1, 0.1, 0.2, 0.2, 0.5, 1.0)  # After one failure, two, ...; the last goes on.
PROBE_TIMEOUT_S = 2.0
RESOLVE_S = 5.0


class WorkerState(Enum):
    STARTING = "starting"  # Not reached yet, or reached and not ready.
    SERVING = "serving"
    DRAINING = "draining"  # Finishes what it has and takes nothing new.
    DEAD = "dead"  # Was reached once, and is not now.


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker says of itself; the same shape for encoders and LLM workers."""

    fingerprint: str = ""
    pair_id: str = ""
    family: str = ""
    device: str = ""
    dtype: str = ""
    version: str = ""
    shm_tier_id: str = ""
    hidden_size: int = 0
    draining: bool = False
    cost: int = 0  # Pending cost by the worker's own count, in the pool's unit.
    limits: dict[str, int] = field(default_factory=dict)
    load: dict[str, int] = field(default_factory=dict)
    store: StoreState | None = None
    extra: dict[str, str] = field(default_factory=dict)


Describe = Callable[[grpc.aio.Channel, float], Awaitable[Description]]


class Worker:
    """One address: its channel, its state, and the cost that we have with it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = open_channel(address)
        self.state = WorkerState.STARTING
        self.description = Description()
        self.pending = 0
        self.foreign = 0  # Reported cost that is not ours, at the last report.
        self.last_picked = 0
        self.failures = 0
        self.wake = asyncio.Event()  # Set: probe now.
        self.idle = asyncio.Event()  # Set while nobody has the worker on loan.
        self.idle.set()
        self._loans = 0

    def lend(self, cost: int) -> None:
        self._loans += 1
        self.pending += cost
        self.idle.clear()

    def take_back(self, cost: int) -> None:
        self._loans -= 1
        self.pending -= cost
        if not self._loans:
            self.idle.set()

    @property
    def score(self) -> tuple[int, int]:
        """Least is best; among equals, the one that waited longest."""
        return self.pending + self.foreign, self.last_picked

    def observe(self, description: Description | None, *, serving: bool) -> None:
        """Takes the outcome of one probe. None: not reached."""
        if description is not None:
            self.description = description
            self.foreign = max(0, description.cost - self.pending)
        if serving and description is not None and not description.draining:
            self.state, self.failures = WorkerState.SERVING, 0
            return
        self.failures += 1
        if description is not None:
            self.state = WorkerState.DRAINING if description.draining else WorkerState.STARTING
        elif self.state is not WorkerState.STARTING:
            self.state = WorkerState.DEAD

    def poll_interval(self) -> float:
        if self.state is WorkerState.SERVING:
            return POLL_SERVING_S
        return POLL_DOWN_S[min(self.failures, len(POLL_DOWN_S) - 1)]


class Changes:
    """Tells whoever waits that some worker of some pool changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next change. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):  # Not wait_for: it can swallow a cancellation.
            await self._event.wait()


class WorkerPool:
    """Workers of one kind. ``start`` and ``close`` frame its life."""

    def __init__(
        self,
        kind: str,
        addresses: Collection[str],
        describe: Describe,
        changes: Changes | None = None,
    ) -> None:
        self.kind = kind  # "encoder" or "LLM"; for messages.
        self._static = tuple(a for a in addresses if not a.startswith("dns:///"))
        self._names = tuple(a.removeprefix("dns:///") for a in addresses if a.startswith("dns:///"))
        self._describe = describe
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.changes = changes or Changes()
        self._ticket = itertools.count(1)

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def configured(self) -> bool:
        """Whether any address was given at all."""
        return bool(self._static or self._names)

    def serving(self, accepts: Callable[[Worker], bool] | None = None) -> list[Worker]:
        """Workers that take work now, those that ``accepts`` agrees to."""
        return [
            worker
            for worker in self._workers.values()
            if worker.state is WorkerState.SERVING and (accepts is None or accepts(worker))
        ]

    # ---- life

    async def start(self) -> None:
        for address in self._static:
            self._add(address)
        for name in self._names:
            self._tasks[name] = asyncio.create_task(self._resolve_forever(name))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.channel.close() for worker in self.workers))
        self._workers.clear()

    # ---- lending

    @contextlib.asynccontextmanager
    async def lease(
        self,
        cost: int,
        deadline: Deadline,
        accepts: Callable[[Worker], bool] | None = None,
        avoid: Collection[str] = (),
    ) -> AsyncIterator[Worker]:
        """Lends the least busy serving worker, waiting for one until ``deadline``.

        ``avoid``: addresses taken only where nothing else serves. Raises Unavailable.
        """
        worker = await self.pick(deadline, accepts, avoid)
        worker.lend(cost)
        try:
            yield worker
        finally:
            worker.take_back(cost)

    async def pick(
        self,
        deadline: Deadline,
        accepts: Callable[[Worker], bool] | None = None,
        avoid: Collection[str] = (),
    ) -> Worker:
        """The worker that ``lease`` would lend, without counting any cost against it."""
        while True:
            able = self.serving(accepts)
            if able:
                preferred = [worker for worker in able if worker.address not in avoid]
                worker = min(preferred or able, key=lambda worker: worker.score)
                worker.last_picked = next(self._ticket)
                return worker
            if not self.configured:
                raise self._unavailable()
            try:
                await self.changes.wait(deadline.remaining())
            except TimeoutError as error:
                raise self._unavailable() from error

    def report_down(self, worker: Worker) -> None:
        """A call to ``worker`` lost its connection: out at once, and probed at once."""
        if worker.state is WorkerState.SERVING:
            log.warning("%s %s: connection lost", self.kind, worker.address)
            worker.state = WorkerState.DEAD
        worker.wake.set()

    def _unavailable(self) -> Unavailable:
        states = ", ".join(f"{w.address} is {w.state.value}" for w in self.workers)
        return Unavailable(
            f"no {self.kind} worker can take the request ({states or 'none is known'}); "
            "retry later",
            retry_after_s=5.0,
        )

    # ---- watching

    def _add(self, address: str) -> None:
        worker = Worker(address)
        self._workers[address] = worker
        self._tasks[address] = asyncio.create_task(self._watch(worker))

    async def _remove(self, address: str) -> None:
        """Forgets a worker that its name no longer resolves to, after the calls under way."""
        worker = self._workers.pop(address)
        self._tasks.pop(address).cancel()
        await worker.idle.wait()
        await worker.channel.close()

    async def _watch(self, worker: Worker) -> None:
        while True:
            before = worker.state, worker.description.fingerprint
            await self._probe(worker)
            if (worker.state, worker.description.fingerprint) != before:
                log.info("%s %s: %s", self.kind, worker.address, worker.state.value)
                self.changes.notify()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(worker.poll_interval()):
                    await worker.wake.wait()
            if worker.wake.is_set():
                worker.wake.clear()
                worker.failures = 0

    async def _probe(self, worker: Worker) -> None:
        try:
            serving, description = await asyncio.gather(
                is_serving(worker.channel, PROBE_TIMEOUT_S),
                self._describe(worker.channel, PROBE_TIMEOUT_S),
            )
        except grpc.RpcError:
            worker.observe(None, serving=False)
        except Exception:
            log.exception("%s %s: cannot be described", self.kind, worker.address)
            worker.observe(None, serving=False)
        else:
            worker.observe(description, serving=serving)

    async def _resolve_forever(self, name: str) -> None:
        removing: set[asyncio.Task[None]] = set()
        owned: set[str] = set()
        try:
            while True:
                found = await _resolve(name)
                if found is not None:
                    for address in found - owned - self._workers.keys():
                        self._add(address)
                        owned.add(address)
                    for address in owned - found:
                        owned.discard(address)
                        removing.add(asyncio.create_task(self._remove(address)))
                removing = {task for task in removing if not task.done()}
                await asyncio.sleep(RESOLVE_S if found else POLL_SERVING_S)
        finally:
            for task in removing:
                task.cancel()


async def _resolve(name: str) -> set[str] | None:
    """Every host:port behind ``name:port``; None when the resolver does not answer."""
    host, _, port = name.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM
        )
    except (OSError, ValueError) as error:
        log.warning("%s: %s", name, error)
        return None
    hosts = {str(entry[4][0]) for entry in found}
    return {f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts}
