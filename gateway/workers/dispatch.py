"""Which waiting work goes to which worker, and when. Policy alone: no sockets, no tasks.

Work waits here and not at the workers. A worker gets only enough to keep it busy, so order is
preserved, work whose client has left is never sent, and a slow worker hoards nothing. The earliest
deadline goes first, which is the order of arrival, since all requests have the same timeout; work
behind other work of its own request counts as due that much later. Between API keys the order is
start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): the key that got the least so far, by
cost and weight, goes first; a key earns no credit while it has nothing waiting. Work without a key
shares one queue, in order of arrival. Heavy work, which would keep a worker's device waiting, has
room of its own at the workers, and other work overtakes it. A suspect is work that some worker died
with. A worker gets one suspect at a time, so that if it dies too, that one is to blame.

The worker that is expected to finish the work first is chosen. If it has no room, a slower one
takes the work only if it would finish before the others had finished everything that waits: with a
long queue it helps, at the queue's end it would only delay a request. For LLM workers, prefix
caches are part of the choice; see ``affinity``.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from gateway.clock import Deadline
from gateway.workers.affinity import Affinity, PromptChain, Reason
from gateway.workers.worker import Worker, WorkerState

Accepts = Callable[[Worker], bool]


@dataclass(slots=True, eq=False)
class LeaseRequest:
    """Work that waits for a worker; ``worker`` is set once it is lent one.

    ``avoid``: addresses to use only if no other worker serves. ``suspect``: whether a worker was
    lost while it had this work. ``delay_within_request_s``: how long the earlier work of its own
    request takes. ``share``: the fair-queueing key, which is the name of an API key; ``weight``:
    its weight relative to others. ``prompt``: for LLM workers, the prompt to compute; ``reason``:
    why the worker was chosen. ``failed``: set by the borrower if the worker refused the work or was
    lost with it, so that it does not count as done.
    """

    cost: int
    deadline: Deadline
    accepts: Accepts | None = None
    avoid: Collection[str] = ()
    heavy: bool = False
    suspect: bool = False
    delay_within_request_s: float = 0.0
    share: str = ""
    weight: float = 1.0
    prompt: PromptChain | None = None
    worker: Worker | None = None
    reason: Reason = Reason.LOAD
    failed: bool = False
    # Set when ``worker`` is set, or the state of any worker changes.
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def due(self) -> float:
        return self.deadline.at + self.delay_within_request_s


class Dispatcher:
    """The requests that wait for one pool's workers."""

    def __init__(self, workers: Collection[Worker]) -> None:
        """``workers``: a view of the current ones."""
        self.waiting_cost = 0
        self._queues: dict[str, _ShareQueue] = {}  # By share.
        self._virtual_time = 0.0  # ``virtual_start`` of the queue served last.
        self.affinity = Affinity()
        self._workers = workers
        self._with_suspect: set[Worker] = set()  # Workers that have a suspect.
        self._lease_number = itertools.count(1)

    @property
    def waiting(self) -> list[LeaseRequest]:
        """In order of due time within each share."""
        return [request for queue in self._queues.values() for request in queue.waiting]

    def add(self, request: LeaseRequest) -> None:
        queue = self._queues.setdefault(request.share, _ShareQueue())
        if not queue.waiting:
            queue.virtual_start = max(queue.virtual_start, self._virtual_time)
        insort(queue.waiting, request, key=lambda request: request.due)
        self.waiting_cost += request.cost
        self.dispatch()

    def remove(self, request: LeaseRequest) -> None:
        """Removes a request that no longer waits, and lends to those behind it."""
        self._dequeue(request)
        self.dispatch()

    def end(self, request: LeaseRequest) -> None:
        """Ends the lease of a request, and lends to those that wait."""
        assert request.worker is not None
        self.prompt_computed(request)
        if request.suspect:
            self._with_suspect.discard(request.worker)
        request.worker.take_back(request.cost, request.heavy, done=not request.failed)
        self.dispatch()

    def prompt_computed(self, request: LeaseRequest) -> None:
        """The request's worker no longer computes its prompt: it is done, or the call has ended."""
        if request.prompt is not None and request.worker is not None:
            self.affinity.computed(request.prompt, request.worker)

    def dispatch(self) -> None:
        """Lends workers with room to the requests that come first.

        A request that gets no worker reserves every worker that it could use, so that later
        requests of its kind (heavy or not) do not overtake it.
        """
        reserved_for: dict[bool, set[Worker]] = {False: set(), True: set()}
        serving = self.serving()
        for request in self._in_turn():
            if all(len(workers) == len(serving) for workers in reserved_for.values()):
                return
            accepts, avoid = request.accepts, request.avoid
            able = [worker for worker in serving if accepts is None or accepts(worker)]
            able = [worker for worker in able if worker.address not in avoid] or able
            if request.suspect:
                able = [worker for worker in able if worker not in self._with_suspect]
                if not able:
                    continue
            reserved = reserved_for[request.heavy]
            if reserved.issuperset(able):
                continue
            free = [worker for worker in able if worker not in reserved]
            worker = self._choose(request, free, able)
            if worker is None:
                reserved.update(able)
            else:
                self._lend(request, worker)

    def _in_turn(self) -> Iterator[LeaseRequest]:
        """The waiting requests in fair order, each as if those before it had been lent a worker."""
        turns = [
            (queue.virtual_start, queue.waiting[0].due, share, iter(tuple(queue.waiting)))
            for share, queue in self._queues.items()
            if queue.waiting
        ]
        heapify(turns)
        while turns:
            virtual_start, _, share, requests = heappop(turns)
            request = next(requests, None)
            if request is not None:
                yield request
                virtual_start += request.cost / request.weight
                heappush(turns, (virtual_start, request.due, share, requests))

    def serving(self, accepts: Accepts | None = None) -> list[Worker]:
        """Workers that take work now, and that ``accepts`` returns true for."""
        return [
            worker
            for worker in self._workers
            if worker.state is WorkerState.SERVING and (accepts is None or accepts(worker))
        ]

    def expected_wait_s(self, cost: int, accepts: Accepts | None = None) -> float:
        """Seconds until the workers would finish ``cost`` and the work of other gateways; 0 if no
        throughput is known. If no worker serves, all known ones count."""
        known = [worker for worker in self._workers if accepts is None or accepts(worker)]
        able = self.serving(accepts) or known
        if not any(worker.cost_per_s for worker in able):
            return 0.0
        usual = _usual_rate(able)
        cost += sum(
            worker.cost_of_other_gateways for worker in able if worker.state is WorkerState.SERVING
        )
        return cost / sum(worker.cost_per_s or usual for worker in able)

    # ---- choice

    def _choose(
        self, request: LeaseRequest, free: Sequence[Worker], able: Sequence[Worker]
    ) -> Worker | None:
        """One of ``free`` that has room, or None if the request should wait."""
        with_room = [worker for worker in free if worker.has_room(request.cost, request.heavy)]
        if not with_room:
            return None
        if request.prompt is not None:
            worker, request.reason = self.affinity.choose(request.prompt, with_room)
            return worker
        usual = _usual_rate(able)

        def finish_s(worker: Worker) -> tuple[float, int]:
            cost = worker.pending + worker.cost_of_other_gateways + request.cost
            return cost / (worker.cost_per_s or usual), worker.last_picked

        best = min(able, key=finish_s)
        worker = min(with_room, key=finish_s)
        others = [other for other in able if other is not worker]
        if worker is best or finish_s(worker)[0] <= self._all_done_s(others, usual):
            return worker
        return None

    def _all_done_s(self, workers: Sequence[Worker], usual: float) -> float:
        """Seconds until ``workers`` alone would finish their work and all that waits."""
        cost = self.waiting_cost + sum(
            worker.pending + worker.cost_of_other_gateways for worker in workers
        )
        return cost / sum(worker.cost_per_s or usual for worker in workers)

    def _lend(self, request: LeaseRequest, worker: Worker) -> None:
        worker.last_picked = next(self._lease_number)
        worker.lend(request.cost, request.heavy)
        if request.suspect:
            self._with_suspect.add(worker)
        if request.prompt is not None:
            self.affinity.begin(request.prompt, worker)
        request.worker = worker
        request.changed.set()
        queue = self._queues[request.share]
        self._virtual_time = max(self._virtual_time, queue.virtual_start)
        queue.virtual_start += request.cost / request.weight
        self._dequeue(request)

    def _dequeue(self, request: LeaseRequest) -> None:
        self._queues[request.share].waiting.remove(request)
        self.waiting_cost -= request.cost
        for share, queue in tuple(self._queues.items()):
            if not queue.waiting and (
                queue.virtual_start <= self._virtual_time or not self.waiting_cost
            ):
                del self._queues[share]


@dataclass(slots=True)
class _ShareQueue:
    waiting: list[LeaseRequest] = field(default_factory=list)  # By due time.
    virtual_start: float = 0.0  # Start tag of the next lease: cost / weight of earlier ones.


def _usual_rate(workers: Sequence[Worker]) -> float:
    """The throughput assumed for a worker that has not measured its own: the others' mean."""
    known = [worker.cost_per_s for worker in workers if worker.cost_per_s]
    return sum(known) / len(known) if known else 1.0
