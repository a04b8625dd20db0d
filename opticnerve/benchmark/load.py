"""One run of load: when each request is sent, and what came of it.

In a closed loop, a number of clients each send their next request when their last has ended. In an
open loop, requests are due at given times, whether or not the server keeps up. Their latencies
count from when they were due: otherwise a client that is late would hide the server's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.connection import LoadTarget
from opticnerve.benchmark.workload import Asking, Dialogue


@dataclass(frozen=True)
class Pace:
    """How fast requests are sent. ``times``: for an open loop, when each dialogue is due, in
    seconds from the start; None: a closed loop of ``concurrency`` clients."""

    concurrency: int | None  # None in an open loop: unbounded.
    times: Sequence[float] | None = None
    duration_s: float | None = None  # Nothing is sent after it.
    ramp_s: float = 0.0  # Not measured: clients start one after the other, or the rate rises.


@dataclass(frozen=True)
class Record:
    """One request."""

    dialogue: int
    turn: int
    asking: Asking
    answer: Answer
    measured: bool  # False for requests of the ramp.


class LoadRun:
    """Sends dialogues at a pace; ``on_record`` is called after each request."""

    def __init__(
        self,
        target: LoadTarget,
        dialogues: Sequence[Dialogue],
        pace: Pace,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.records: list[Record] = []
        self.unfinished = 0  # Requests that were under way when this was cancelled.
        self.dropped = 0  # Turns that were not asked, because the one before was not answered.
        self.began = 0.0
        self.cpu_s = 0.0  # CPU time of this process.
        self.exhausted = False  # All dialogues were used before the duration ended.
        self._target = target
        self._pace = pace
        self._dialogues = dialogues
        self._on_record = on_record

    async def run(self) -> None:
        """Returns when every request has ended. If cancelled, what is recorded so far stays."""
        self.began, cpu = time.perf_counter(), time.process_time()
        try:
            async with asyncio.TaskGroup() as group:
                await (self._closed(group) if self._pace.times is None else self._open(group))
            lasts = self._pace.times is None and self._pace.duration_s is not None
            self.exhausted = lasts and self._has_time()
        finally:
            self.cpu_s = time.process_time() - cpu

    # ---- closed

    async def _closed(self, group: asyncio.TaskGroup) -> None:
        clients = min(self._pace.concurrency or 1, len(self._dialogues))
        waiting = iter(enumerate(self._dialogues))
        for index in range(clients):
            group.create_task(self._client(self._pace.ramp_s * index / clients, waiting))

    async def _client(self, start_s: float, waiting: Iterator[tuple[int, Dialogue]]) -> None:
        await asyncio.sleep(start_s)
        for number, dialogue in waiting:
            await self._play(number, dialogue)
            if not self._has_time():
                return

    def _has_time(self) -> bool:
        passed, end = time.perf_counter() - self.began, self._pace.duration_s
        return end is None or passed < end

    # ---- open

    async def _open(self, group: asyncio.TaskGroup) -> None:
        most = self._pace.concurrency
        places = asyncio.Semaphore(most) if most else contextlib.nullcontext()
        for number, due_s in enumerate(self._pace.times or ()):
            due = self.began + due_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(self._begin(places, number, due))

    async def _begin(
        self, places: contextlib.AbstractAsyncContextManager[object], number: int, due: float
    ) -> None:
        async with places:
            await self._play(number, self._dialogues[number], due)

    # ---- either

    async def _play(self, number: int, dialogue: Dialogue, due: float | None = None) -> None:
        """Asks the turns of a dialogue one after the other."""
        said: list[str] = []
        for turn, asking in enumerate(dialogue.askings):
            if turn and not self._has_time():
                return
            answer = await self._ask(dialogue.body(said))
            answer = replace(answer, scheduled=due)
            measured = answer.due - self.began >= self._pace.ramp_s
            self._keep(Record(number, turn, asking, answer, measured))
            if answer.outcome != "answered":
                self.dropped += len(dialogue.askings) - turn - 1
                return
            said.append(answer.text)
            due = None if due is None else answer.ended

    async def _ask(self, body: bytes) -> Answer:
        try:
            return await self._target.ask(body)
        except asyncio.CancelledError:
            self.unfinished += 1
            raise

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._on_record(record)
