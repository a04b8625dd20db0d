"""The workers behind the gateway: who they are, how they are, and waiting for one of them.

A pool keeps one channel a worker, asks each for its health and description (more often while it
does not serve), and lends serving workers in the order and by the choice of ``Dispatcher``. A
worker whose connection breaks is out at once and comes back with its next good health check. Names
(``dns:///name:port``) are resolved again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

import grpc

from gateway.edge.deadline import Deadline, expired
from gateway.workers.dispatch import Accepts, Dispatcher, Job
from gateway.workers.worker import POLL_SERVING_S, Describe, Description, Fault, Worker, WorkerState
from opticnerve.errors import Unavailable
from opticnerve.rpc.channel import is_serving

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
UNUSABLE_WAIT_S = 5.0  # Of a request, while somebody has to mend a flag.
RESOLVE_S = 5.0
SHOWN = 8  # Addresses of one name in a message.
REFUSED = Fault(
    "takes no calls of this gateway: give both the same --rpc-token-file, and start again "
    "whichever has read an older one"
)
FULL_S = (0.05, 5.0)  # Least and most that a worker which refused work is left alone.

Check = Callable[[Worker, Description], Awaitable[Fault | None]]


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
        token: str | None = None,
        check: Check | None = None,
    ) -> None:
        """``token``: what calls to the workers carry. ``check`` finds what is wrong with a worker
        that describes itself."""
        self.kind = kind  # "encoder" or "LLM"; for messages.
        self._static = tuple(a for a in addresses if not a.startswith("dns:///"))
        self._names = tuple(a.removeprefix("dns:///") for a in addresses if a.startswith("dns:///"))
        self._describe = describe
        self._token = token
        self._check = check
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.changes = changes or Changes()
        self._dispatcher = Dispatcher(lambda: self.workers)

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def configured(self) -> bool:
        """Whether any address was given at all."""
        return bool(self._static or self._names)

    @property
    def unusable(self) -> bool:
        """Whether all workers answer and can be given no work: waiting for one is of little use."""
        return bool(self._workers) and all(
            worker.state is WorkerState.UNUSABLE for worker in self._workers.values()
        )

    @property
    def states(self) -> str:
        """How every worker is, in words."""
        told = ", ".join(f"{w.address} is {w.state.value}" for w in self.workers)
        blamed = any(worker.fault for worker in self.workers)
        return (told or "none is known") + ("; /health says why" if blamed else "")

    def serving(self, accepts: Accepts | None = None) -> list[Worker]:
        """Workers that take work now, those that ``accepts`` agrees to."""
        return self._dispatcher.serving(accepts)

    def clear_s(self, cost: int, accepts: Accepts | None = None) -> float:
        """Seconds in which the workers would finish ``cost`` and what others have with them; 0
        where no throughput is known."""
        return self._dispatcher.clear_s(cost, accepts)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a worker with room."""
        return len(self._dispatcher.waiting)

    @property
    def waiting_cost(self) -> int:
        return self._dispatcher.waiting_cost

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
        absence_s: float,
        accepts: Accepts | None = None,
        avoid: Collection[str] = (),
        heavy: bool = False,
        behind_s: float = 0.0,
        share: str = "",
        weight: float = 1.0,
    ) -> AsyncIterator[Worker]:
        """Lends a worker, waiting until one that has room is this job's turn.

        ``absence_s``: how long it waits while none serves; the rest is a Job's. Raises Unavailable,
        DeadlineExceeded.
        """
        job = Job(cost, deadline, accepts, avoid, heavy, behind_s, share, weight)
        worker = await self._turn(job, absence_s)
        try:
            yield worker
        finally:
            self._take_back(worker, job)

    async def _turn(self, job: Job, absence_s: float) -> Worker:
        self._dispatcher.add(job)
        try:
            await self._await_turn(job, absence_s)
        except BaseException:
            self._dispatcher.remove(job)
            if job.worker is not None:  # Lent and cancelled in one turn of the loop.
                self._take_back(job.worker, job)
            raise
        assert job.worker is not None
        return job.worker

    async def _await_turn(self, job: Job, absence_s: float) -> None:
        absence: Deadline | None = None  # Runs while nobody serves.
        while job.worker is None:
            if self.serving(job.accepts):
                absence = None
            elif not self.configured:
                raise self._unavailable()
            else:
                absence = absence or job.deadline.within(absence_s)
                if self.unusable:
                    absence = absence.within(UNUSABLE_WAIT_S)
            try:
                async with asyncio.timeout((absence or job.deadline).remaining()):
                    await job.changed.wait()
            except TimeoutError as error:
                raise (self._unavailable() if absence else expired()) from error
            job.changed.clear()

    def _take_back(self, worker: Worker, job: Job) -> None:
        worker.take_back(job.cost, job.heavy)
        self._dispatcher.dispatch()

    def _changed(self) -> None:
        """Some worker's state is another: tells all that wait for one."""
        self.changes.notify()
        for job in self._dispatcher.waiting:
            job.changed.set()
        self._dispatcher.dispatch()

    def report_full(self, worker: Worker, retry_after_s: float | None) -> None:
        """``worker`` refused work for lack of room: it gets none for a while."""
        least, most = FULL_S
        pause = min(max(retry_after_s or least, least), most)
        worker.full_until = time.monotonic() + pause
        asyncio.get_running_loop().call_later(pause, self._dispatcher.dispatch)

    def report_down(self, worker: Worker) -> None:
        """A call to ``worker`` lost its connection: out at once, and probed at once."""
        if worker.state is WorkerState.SERVING:
            log.warning("%s %s: connection lost", self.kind, worker.address)
            worker.state = WorkerState.DEAD
            self._changed()
        worker.wake.set()

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            f"no {self.kind} worker can take the request ({self.states}); retry later",
            retry_after_s=5.0,
        )

    # ---- watching

    def _add(self, address: str) -> None:
        worker = Worker(address, self._token)
        self._workers[address] = worker
        self._tasks[address] = asyncio.create_task(self._watch(worker))

    async def _remove(self, address: str) -> None:
        """Forgets a worker that its name no longer resolves to, after the calls under way."""
        worker = self._workers.pop(address)
        self._tasks.pop(address).cancel()
        self._changed()
        await worker.idle.wait()
        await worker.channel.close()

    async def _watch(self, worker: Worker) -> None:
        while True:
            before = worker.state, worker.description.fingerprint, worker.fault
            await self._probe(worker)
            if worker.fault is not None and worker.fault != before[2]:
                log.error("%s %s %s", self.kind, worker.address, worker.fault.text)
            if (worker.state, worker.description.fingerprint, worker.fault) != before:
                log.info("%s %s: %s", self.kind, worker.address, worker.state.value)
                self._changed()
                if worker.state is WorkerState.SERVING and worker.address in self._static:
                    await self._warn_if_many(worker.address)
            else:
                self._dispatcher.dispatch()  # Its throughput, or what others have with it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(worker.poll_interval()):
                    await worker.wake.wait()
            if worker.wake.is_set():
                worker.wake.clear()
                worker.failures = 0

    async def _warn_if_many(self, address: str) -> None:
        """Of a name with several addresses gRPC calls one, and the others get nothing."""
        found: set[str] | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                found = await _resolve(address)
        # Two of one machine are often of two families, as localhost's are.
        six = {each for each in found or () if each.startswith("[")}
        several = max(six, (found or set()) - six, key=len)
        if len(several) > 1:
            log.warning(
                "%s %s has %d addresses (%s), and one of them gets all the work; to spread it, "
                "write dns:///%s",
                self.kind, address, len(several), ", ".join(sorted(several)[:SHOWN]), address,
            )  # fmt: skip

    async def _probe(self, worker: Worker) -> None:
        try:
            serving, description = await asyncio.gather(
                is_serving(worker.channel, PROBE_TIMEOUT_S),
                self._describe(worker.channel, PROBE_TIMEOUT_S),
            )
            fault = await self._check(worker, description) if self._check else None
        except grpc.RpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            worker.observe(None, serving=False, fault=REFUSED if refused else None)
        except Exception:
            log.exception("%s %s: cannot be described", self.kind, worker.address)
            worker.observe(None, serving=False)
        else:
            worker.observe(description, serving=serving, fault=fault)

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
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )
    except (OSError, ValueError) as error:
        log.warning("%s: %s", name, error)
        return None
    hosts = {str(entry[4][0]) for entry in found}
    return {f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts}
