"""Several jobs of one request, run at once, as one answer."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace

from gateway.clock import Stopwatch
from gateway.edge.admission import Ticket
from gateway.edge.limits import MAX_PROMPTS_AT_ONCE
from gateway.job import Job
from gateway.output.events import AnswerEvent, End
from opticnerve.errors import OpticNerveError, Overloaded
from opticnerve.generation.values import Usage
from opticnerve.telemetry import logs

Run = Callable[[Job], AsyncGenerator[AnswerEvent, None]]


class JobGroup:
    """Jobs with the same number n of choices each. The i-th job's choices are numbered from i * n
    on."""

    def __init__(self, run: Run, jobs: Sequence[Job]) -> None:
        self._run = run
        self._jobs = jobs
        self._todo: Iterator[tuple[int, Job]] = iter(enumerate(jobs))
        self._came: asyncio.Queue[tuple[int, AnswerEvent | BaseException]] = asyncio.Queue(1)
        self._usage: dict[int, Usage] = {}  # So far, by job.
        self._ends: dict[int, End] = {}
        self._began = time.monotonic()

    async def events(self) -> AsyncGenerator[AnswerEvent, None]:
        """The events of all jobs as they come, with one End. Jobs start in order; ``count_places``
        says how many run at once. If one fails, cancels the others and raises its error, which
        names the job's index."""
        places = count_places(self._jobs[0].ticket, min(len(self._jobs), MAX_PROMPTS_AT_ONCE))
        lanes = [asyncio.create_task(self._lane()) for _ in range(places)]
        try:
            while len(self._ends) < len(self._jobs):
                index, event = await self._came.get()
                if isinstance(event, BaseException):
                    raise of_prompt(event, index)
                if isinstance(event, End):
                    self._ends[index] = event
                else:
                    yield self._numbered(index, event)
            await asyncio.gather(*lanes)
            yield self._end()
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    async def _lane(self) -> None:
        """Runs one job after another, until none is left."""
        for index, job in self._todo:
            job.watch = Stopwatch()
            try:
                async with contextlib.aclosing(self._run(job)) as events:
                    async for event in events:
                        await self._came.put((index, event))
            except (Exception, asyncio.CancelledError) as error:
                if _is_being_cancelled():
                    raise
                await self._came.put((index, error))
                return

    def _numbered(self, index: int, event: AnswerEvent) -> AnswerEvent:
        """The event with its choice's number in the whole answer, and the usage of all jobs."""
        assert not isinstance(event, End)
        choice = event.choice + index * (self._jobs[0].options.sampling.n or 1)
        if event.usage is None:
            return replace(event, choice=choice)
        self._usage[index] = event.usage
        return replace(event, choice=choice, usage=total(self._usage.values()))

    def _end(self) -> End:
        ends = [self._ends[index] for index in range(len(self._jobs))]
        usage = total(end.usage for end in ends)
        logs.note(
            prompts=len(ends),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )
        whole = round((time.monotonic() - self._began) * 1000, 3)
        return End(usage, {"total_ms": whole, "prompts": [end.timings for end in ends]})


def _is_being_cancelled() -> bool:
    """Whether the current task itself is being cancelled, not just work that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def count_places(ticket: Ticket, most: int) -> int:
    """How many jobs may run at once, up to ``most``. The first runs in the request's own place.
    Each further one is counted as another request in flight, as long as there is room, because it
    is as much work."""
    places = 1
    with contextlib.suppress(Overloaded):
        while places < most:
            ticket.count_request()
            places += 1
    return places


def of_prompt(error: BaseException, index: int) -> BaseException:
    """``error`` with the index of the job that raised it in its message and ``param``."""
    if not isinstance(error, OpticNerveError):
        return error
    found, name = copy.copy(error), f"prompt[{index}]"
    found.message = f"{name}: {error.message.removeprefix('prompt: ')}"
    if error.param in (None, "prompt"):
        found.param = name
    return found


def total(usages: Iterable[Usage]) -> Usage:
    found = list(usages)
    return Usage(*(sum(getattr(usage, each.name) for usage in found) for each in fields(Usage)))
