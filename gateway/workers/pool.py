"""The workers of one kind: watches them, and lends them to requests.

A pool has one channel to each worker, and polls its health and description, more often while it
does not serve. Its ``Dispatcher`` decides which request gets which serving worker. A worker whose
connection breaks gets no work until its next good health check.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator

from gateway.clock import Deadline, expired
from gateway.workers.discovery import AddressSource, resolve, same_family, sources_of
from gateway.workers.dispatch import Accepts, Dispatcher, LeaseRequest
from gateway.workers.worker import PROBE_TIMEOUT_S, Check, Describe, Worker, WorkerState
from opticnerve.errors import Unavailable
from opticnerve.rpc.tls import ChannelTls

log = logging.getLogger(__name__)

UNUSABLE_WAIT_S = 5.0  # How long a request waits while every worker is misconfigured.
MAX_SHOWN_ADDRESSES = 8  # In a message.
MIN_PAUSE_S, MAX_PAUSE_S = 0.05, 5.0  # How long a worker that refused work gets none.


class Changes:
    """Wakes all tasks that wait for a change of any worker, of any of several pools."""

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
    """The workers of one kind, between ``start`` and ``close``."""

    def __init__(
        self,
        kind: str,
        addresses: Collection[str],
        describe: Describe,
        changes: Changes | None = None,
        token: str | None = None,
        check: Check | None = None,
        tls: ChannelTls | None = None,
        registered: AddressSource | None = None,
    ) -> None:
        """``kind``: "encoder" or "LLM", for messages. ``addresses``, ``registered``: see
        ``discovery.sources_of``. ``token``: sent with calls to the workers, which ``tls`` encrypts.
        ``check`` finds faults of a worker that describes itself."""
        self.kind = kind
        self.changes = changes or Changes()
        self._addresses = addresses
        self.sources = sources_of(addresses, registered)
        self._describe = describe
        self._token = token
        self._check = check
        self._tls = tls
        self.unpaired_cost = 0  # Cost of requests that wait until a pair is known.
        self._workers: dict[str, Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.dispatcher = Dispatcher(self._workers.values())

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def configured(self) -> bool:
        """Whether there is any source of workers."""
        return bool(self.sources)

    @property
    def unusable(self) -> bool:
        """Whether all workers are misconfigured, so that waiting rarely helps."""
        states = {worker.state for worker in self._workers.values()} - {WorkerState.ALIAS}
        return states == {WorkerState.UNUSABLE}

    @property
    def troubles(self) -> list[str]:
        """Why sources of addresses do not answer, in words; empty if all do."""
        return [source.trouble for source in self.sources if source.trouble]

    def absence(self, accepts: Accepts | None = None) -> str:
        """Why no worker that ``accepts`` returns true for serves, in words, with the state of
        each."""
        if not self._workers:
            return "; ".join([f"no {self.kind} is known", *self.troubles])
        shown = [_in_words(worker, accepts) for worker in self.workers[:MAX_SHOWN_ADDRESSES]]
        more = len(self._workers) - len(shown)
        states = ", ".join([*shown, f"{more} more"] if more else shown)
        faulty = any(worker.fault for worker in self.workers)
        why = "; /health says why" if faulty else ""
        return f"no {self.kind} is serving ({states}{why})"

    def serving(self, accepts: Accepts | None = None) -> list[Worker]:
        """Workers that take work now, and that ``accepts`` returns true for."""
        return self.dispatcher.serving(accepts)

    # ---- life

    async def start(self) -> None:
        for source in self.sources:
            self._spawn(self._follow(source))
        await asyncio.sleep(0)  # Lets the sources add the configured addresses.

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.channel.close() for worker in self.workers))
        self._workers.clear()

    # ---- lending

    @contextlib.contextmanager
    def unpaired(self, cost: int) -> Iterator[None]:
        """Surrounds a request's wait for a pair, before it can ask for a worker."""
        self.unpaired_cost += cost
        try:
            yield
        finally:
            self.unpaired_cost -= cost

    @contextlib.asynccontextmanager
    async def lease(self, request: LeaseRequest, absence_s: float) -> AsyncIterator[Worker]:
        """Lends a worker, once it is this request's turn and one has room. ``absence_s``: how long
        to wait while no worker serves. Work that ends with an error counts as not done. Raises
        Unavailable, DeadlineExceeded."""
        self.dispatcher.add(request)
        try:
            await self._wait_for_worker(request, absence_s)
            assert request.worker is not None
            yield request.worker
        except Exception:
            request.failed = True
            raise
        finally:
            if request.worker is None:
                self.dispatcher.remove(request)
            else:  # Even if it was cancelled in the turn in which it was lent a worker.
                self.dispatcher.end(request)

    async def _wait_for_worker(self, request: LeaseRequest, absence_s: float) -> None:
        absence: Deadline | None = None  # Runs while no worker serves.
        while request.worker is None:
            if self.serving(request.accepts):
                absence = None
            elif not self.configured:
                raise self._unavailable(request.accepts)
            else:
                absence = absence or request.deadline.within(absence_s)
                if self.unusable:
                    absence = absence.within(UNUSABLE_WAIT_S)
            try:
                async with asyncio.timeout((absence or request.deadline).remaining()):
                    await request.changed.wait()
            except TimeoutError as error:
                gone = self._unavailable(request.accepts) if absence else expired()
                raise gone from error
            request.changed.clear()

    def report_full(self, worker: Worker, retry_after_s: float | None) -> None:
        """``worker`` refused work for lack of room: it gets no work for a while."""
        pause = min(max(retry_after_s or MIN_PAUSE_S, MIN_PAUSE_S), MAX_PAUSE_S)
        worker.full_until = time.monotonic() + pause
        asyncio.get_running_loop().call_later(pause, self.dispatcher.dispatch)

    def report_down(self, worker: Worker) -> None:
        """A call to ``worker`` lost its connection: it gets no work, and is probed at once."""
        if worker.state is WorkerState.SERVING:
            log.warning("%s %s: connection lost", self.kind, worker.address)
            worker.state = WorkerState.DEAD
            self._notify(worker)
        worker.wake.set()

    def _notify(self, changed: Worker) -> None:
        """A worker's state or process has changed: wakes all that wait for one. Other addresses
        that may lead to the same process are probed at once, since only one of them gets work."""
        process = changed.description.instance_id
        for worker in self._workers.values():
            same = bool(process) and worker.description.instance_id == process
            if worker is not changed and (same or worker.state is WorkerState.ALIAS):
                worker.wake.set()
        self.changes.notify()
        for request in self.dispatcher.waiting:
            request.changed.set()
        self.dispatcher.dispatch()

    def _unavailable(self, accepts: Accepts | None) -> Unavailable:
        return Unavailable(
            f"no worker can take the request: {self.absence(accepts)}; retry later",
            retry_after_s=5.0,
        )

    # ---- watching

    async def _follow(self, source: AddressSource) -> None:
        """Adds and removes workers as ``source`` lists them. A worker listed by several sources
        stays until none lists it."""
        listed: dict[str, str] = {}
        async for found in source.watch():
            for address, said in found.items():
                worker = self._workers.get(address) or self._add(address)
                if listed.get(address, said) != said:
                    worker.wake.set()
                worker.sources.add(source)
                listed[address] = said
            for address in listed.keys() - found.keys():
                worker = self._workers[address]
                kept = source.keeps(listed[address], worker.description.instance_id)
                if kept and worker.state is WorkerState.SERVING:
                    worker.wake.set()  # The probe's result decides.
                else:
                    del listed[address]
                    self._leave(worker, source)

    def _add(self, address: str) -> Worker:
        self._workers[address] = worker = Worker(address, self._token, self._tls)
        self._spawn(self._watch(worker))
        return worker

    def _is_alias(self, worker: Worker) -> bool:
        """Whether an address known earlier reaches the same process."""
        process = worker.description.instance_id
        for other in self._workers.values():
            if other is worker:
                return False
            if process and other.description.instance_id == process and other.is_reached:
                return True
        return False

    def _leave(self, worker: Worker, source: AddressSource) -> None:
        worker.sources.remove(source)
        if not worker.sources:
            log.info("%s %s: no longer listed", self.kind, worker.address)
            del self._workers[worker.address]
            worker.wake.set()
            self._notify(worker)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, worker: Worker) -> None:
        """Probes a worker until it is removed; closes its channel once our calls have ended."""
        while self._workers.get(worker.address) is worker:
            before = _told(worker)
            await worker.probe(self.kind, self._describe, self._check)
            if self._is_alias(worker):
                worker.state = WorkerState.ALIAS
            if worker.fault is not None and worker.fault not in before:
                log.error("%s %s %s", self.kind, worker.address, worker.fault.text)
            if _told(worker) != before:
                log.info("%s %s: %s", self.kind, worker.address, worker.state.value)
                self._notify(worker)
                if worker.state is WorkerState.SERVING and worker.address in self._addresses:
                    await self._warn_of_several(worker.address)
            else:
                self.dispatcher.dispatch()  # Its throughput or its load may have changed.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(worker.poll_interval()):
                    await worker.wake.wait()
            if worker.wake.is_set():
                worker.wake.clear()
                worker.failures = 0
        await worker.idle.wait()
        await worker.channel.close()

    async def _warn_of_several(self, address: str) -> None:
        """Warns if a name has several addresses: gRPC calls one, so the others get no work."""
        found: set[str] | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                found = await resolve(address)
        several = same_family(found or set())
        if len(several) > 1:
            log.warning(
                "%s %s has %d addresses (%s), but only one gets work; to use all of them, "
                "write dns:///%s",
                self.kind, address, len(several), ", ".join(several[:MAX_SHOWN_ADDRESSES]), address,
            )  # fmt: skip


def _told(worker: Worker) -> tuple[object, ...]:
    """A worker's properties whose change wakes all that wait."""
    described = worker.description
    return worker.state, described.instance_id, described.fingerprint, worker.fault


def _in_words(worker: Worker, accepts: Accepts | None) -> str:
    serving = worker.state is WorkerState.SERVING
    strange = serving and accepts is not None and not accepts(worker)
    other = " another revision" if strange else ""
    return f"{worker.address} is {worker.state.value}{other}"
