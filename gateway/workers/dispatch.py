"""Which waiting work goes to which worker, and when. Policy alone: no sockets, no tasks.

Work waits here and not at the workers. A worker is given only what keeps it busy, so that the
order is kept, work whose client has left is never sent, and a slow worker hoards nothing. The
earliest deadline goes first, which is the order of arrival, since all requests have the same time;
but what is behind other work of its own request counts as so much later. Between keys the order is
that of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): first comes the work of who
was lent least so far, by cost and weight; who had nothing waiting earns nothing by that. Work
without a key is that of one sharer, in order of arrival. Heavy work, which keeps a worker's device
waiting, has room of its own at the workers, and other work passes it.

A job goes to the worker that is expected to finish it first. Where that one has no room, a slower
one takes the job only if it would finish it before the others had finished everything that waits:
inside a long queue it helps; at the end of the queue it would only keep a request waiting.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from gateway.edge.deadline import Deadline
from gateway.workers.worker import Worker, WorkerState

Accepts = Callable[[Worker], bool]


class Job:
    """Work that waits for a worker. ``worker`` is set once it is lent one."""

    def __init__(
        self,
        cost: int,
        deadline: Deadline,
        accepts: Accepts | None = None,
        avoid: Collection[str] = (),
        heavy: bool = False,
        behind_s: float = 0.0,
        share: str = "",
        weight: float = 1.0,
    ) -> None:
        """``avoid``: addresses that are taken only where nothing else serves. ``behind_s``: what
        comes before it in its request will take so long. ``share``: whose it is."""
        self.cost = cost
        self.deadline = deadline
        self.heavy = heavy
        self.due = deadline.at + behind_s
        self.share = share
        self.weight = weight
        self.accepts = accepts
        self.avoid = avoid
        self.worker: Worker | None = None
        self.changed = asyncio.Event()  # It has a worker, or some worker's state has changed.


class Dispatcher:
    """The jobs that wait for one pool's workers. ``workers`` tells who there is now."""

    def __init__(self, workers: Callable[[], Sequence[Worker]]) -> None:
        self.waiting_cost = 0
        self._sharers: dict[str, _Sharer] = {}
        self._now = 0.0  # Virtual time: what the last that was lent to had before.
        self._workers = workers
        self._ticket = itertools.count(1)

    @property
    def waiting(self) -> list[Job]:
        """Each sharer's by when they are due."""
        return [job for sharer in self._sharers.values() for job in sharer.waiting]

    def add(self, job: Job) -> None:
        sharer = self._sharers.setdefault(job.share, _Sharer())
        if not sharer.waiting:
            sharer.lent = max(sharer.lent, self._now)
        insort(sharer.waiting, job, key=lambda job: job.due)
        self.waiting_cost += job.cost
        self.dispatch()

    def remove(self, job: Job) -> None:
        """Takes a job out that waits no more, and lends to those that waited behind it; nothing
        happens where it has a worker."""
        if job in self.waiting:
            self._take_out(job)
            self.dispatch()

    def dispatch(self) -> None:
        """Lends workers that have room to the jobs that come first.

        A job without a worker keeps those of its kind behind it from every worker that it could
        use.
        """
        kept: dict[bool, set[Worker]] = {False: set(), True: set()}
        serving = self.serving()
        for job in self._in_turn():
            if all(len(workers) == len(serving) for workers in kept.values()):
                return
            able = self._able(job, serving)
            taken = kept[job.heavy]
            if taken.issuperset(able):
                continue
            worker = self._choose(job, [worker for worker in able if worker not in taken], able)
            if worker is None:
                taken.update(able)
            else:
                self._lend(job, worker)

    def _in_turn(self) -> Iterator[Job]:
        """The jobs that wait in fair order, as if those before had been lent already."""
        turns = [
            (sharer.lent, sharer.waiting[0].due, name, iter(tuple(sharer.waiting)))
            for name, sharer in self._sharers.items()
            if sharer.waiting
        ]
        heapify(turns)
        while turns:
            lent, _, name, jobs = heappop(turns)
            job = next(jobs, None)
            if job is not None:
                yield job
                heappush(turns, (lent + job.cost / job.weight, job.due, name, jobs))

    def serving(self, accepts: Accepts | None = None) -> list[Worker]:
        """Workers that take work now, those that ``accepts`` agrees to."""
        return [
            worker
            for worker in self._workers()
            if worker.state is WorkerState.SERVING and (accepts is None or accepts(worker))
        ]

    def clear_s(self, cost: int, accepts: Accepts | None = None) -> float:
        """Seconds in which the workers would finish ``cost`` and what others have with them; 0
        where no throughput is known. Where none serves, those count that are to come back."""
        known = [worker for worker in self._workers() if accepts is None or accepts(worker)]
        able = self.serving(accepts) or known
        if not any(worker.cost_per_s for worker in able):
            return 0.0
        usual = _usual_rate(able)
        cost += sum(worker.foreign for worker in able if worker.state is WorkerState.SERVING)
        return cost / sum(worker.cost_per_s or usual for worker in able)

    # ---- choice

    def _able(self, job: Job, serving: Sequence[Worker]) -> list[Worker]:
        able = [worker for worker in serving if job.accepts is None or job.accepts(worker)]
        return [worker for worker in able if worker.address not in job.avoid] or able

    def _choose(self, job: Job, free: Sequence[Worker], able: Sequence[Worker]) -> Worker | None:
        """One of ``free`` that has room, or None where the job had better wait."""
        usual = _usual_rate(able)

        def finish_s(worker: Worker) -> tuple[float, int]:
            cost = worker.pending + worker.foreign + job.cost
            return cost / (worker.cost_per_s or usual), worker.last_picked

        best = min(able, key=finish_s)
        with_room = [worker for worker in free if worker.has_room(job.cost, job.heavy)]
        if not with_room:
            return None
        worker = min(with_room, key=finish_s)
        others = [other for other in able if other is not worker]
        if worker is best or finish_s(worker)[0] <= self._all_done_s(others, usual):
            return worker
        return None

    def _all_done_s(self, workers: Sequence[Worker], usual: float) -> float:
        """Seconds in which ``workers`` alone would finish what they have and all that waits."""
        cost = self.waiting_cost + sum(worker.pending + worker.foreign for worker in workers)
        return cost / sum(worker.cost_per_s or usual for worker in workers)

    def _lend(self, job: Job, worker: Worker) -> None:
        worker.last_picked = next(self._ticket)
        worker.lend(job.cost, job.heavy)
        job.worker = worker
        job.changed.set()
        sharer = self._sharers[job.share]
        self._now = max(self._now, sharer.lent)
        sharer.lent += job.cost / job.weight
        self._take_out(job)

    def _take_out(self, job: Job) -> None:
        self._sharers[job.share].waiting.remove(job)
        self.waiting_cost -= job.cost
        for name, sharer in tuple(self._sharers.items()):
            if not sharer.waiting and (sharer.lent <= self._now or not self.waiting_cost):
                del self._sharers[name]


@dataclass(slots=True)
class _Sharer:
    """Those whose work waits in one queue."""

    waiting: list[Job] = field(default_factory=list)  # By when they are due.
    lent: float = 0.0  # Cost by weight, in virtual time.


def _usual_rate(workers: Sequence[Worker]) -> float:
    """What a worker of unknown throughput is taken for: the mean of the others."""
    known = [worker.cost_per_s for worker in workers if worker.cost_per_s]
    return sum(known) / len(known) if known else 1.0
