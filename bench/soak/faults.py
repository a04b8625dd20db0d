"""Faults: a seeded schedule, and what it does to a stack.

One of each pair of services is the victim of every fault of its kind, so that the other can be
observed from the beginning to the end of a run. In runs of at least POOLS_FROM_S, all encoders and
all LLM workers are killed once at the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from bench.soak.stack import START_S, SoakStack, filled
from tests.system import wait_for

POOLS_FROM_S = 240.0  # In shorter runs, the other faults would have no time.
FULL_S = (2.0, 6.0)
DOWN_S = (0.5, 4.0)  # Of Redis, and of hanging services.
KINDS = (
    "encoder killed", "llm killed", "gateway killed", "redis killed",
    "encoder hangs", "llm hangs", "redis hangs", "tmpfs full",
)  # fmt: skip
POOLS = ("all encoders killed", "all llms killed")
TWO_AT_ONCE = 0.25  # Share of faults that coincide with another.
SETTLE_S = 1.0


@dataclass
class Fault:
    """One fault. Times are of ``time.monotonic``. ``ended``: when the stack was whole again."""

    kind: str
    victim: str
    began: float
    ended: float = math.inf

    def overlaps(self, began: float, ended: float) -> bool:
        return self.began <= ended and began <= self.ended


@dataclass
class Injector:
    """Injects faults into ``stack`` for ``seconds``, and records them in ``faults``."""

    stack: SoakStack
    seconds: float
    seed: int
    gap_s: float  # Between faults, at most.
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.victims = {
            service: f"{service}-{self._random.choice((1, 2))}"
            for service in ("encoder", "llm", "gateway")
        }

    @property
    def survivors(self) -> list[str]:
        """Services that no fault after the first ones kills."""
        return [f"{service}-{3 - int(name[-1])}" for service, name in self.victims.items()]

    async def run(self) -> None:
        """Runs until the last fault is over; ``ended`` stays infinite for one that is not."""
        began = time.monotonic()
        if self.seconds >= POOLS_FROM_S:
            await asyncio.gather(*map(self._inject, POOLS))
        todo: list[str] = []
        while time.monotonic() - began < self.seconds:
            await asyncio.sleep(self._random.uniform(0.3, 1.0) * self.gap_s)
            todo = todo or self._random.sample(self._kinds, len(self._kinds))
            kinds = [todo.pop()]
            if todo and self._random.random() < TWO_AT_ONCE:
                kinds += [kind for kind in todo[-1:] if kind.split()[0] != kinds[0].split()[0]]
                todo = [kind for kind in todo if kind not in kinds]
            await asyncio.gather(*map(self._inject, kinds))

    async def _inject(self, kind: str) -> None:
        harm, victim = self._harm(kind)
        fault = Fault(kind, victim, time.monotonic())
        self.faults.append(fault)
        with contextlib.suppress(AssertionError):
            await harm
            for _ in range(2):  # Gateways notice a worker's end a moment later.
                await asyncio.sleep(SETTLE_S)
                await _until(self.stack.is_whole)
            fault.ended = time.monotonic()

    def _harm(self, kind: str) -> tuple[Awaitable[object], str]:
        """(an awaitable that does the harm, the victim)"""
        stack = self.stack
        match kind.split():
            case ["all", pool, _]:
                names = [name for name in stack.services if name[:-2] == pool[:-1]]
                return asyncio.to_thread(stack.replace, *names), pool
            case ["redis", "killed"]:
                return self._for(DOWN_S, stack.redis.stop, stack.redis.start), "redis"
            case ["redis", _]:
                return self._for(DOWN_S, stack.redis.hang, stack.redis.go_on), "redis"
            case ["tmpfs", _]:
                full = filled(stack.tier)
                enter, leave = full.__enter__, lambda: full.__exit__(None, None, None)
                return self._for(FULL_S, enter, leave), "tmpfs"
            case [service, "killed"]:
                victim = self.victims[service]
                return asyncio.to_thread(stack.replace, victim), victim
        victim = self.victims[kind.split()[0]]
        harm = stack.services[victim].signal
        stop, go_on = partial(harm, signal.SIGSTOP), partial(harm, signal.SIGCONT)
        return self._for(DOWN_S, stop, go_on), victim

    @property
    def _kinds(self) -> list[str]:
        return [kind for kind in KINDS if kind != "tmpfs full" or self.stack.mounted]

    async def _for(
        self,
        span_s: tuple[float, float],
        begin: Callable[[], object],
        end: Callable[[], object],
    ) -> None:
        """Does harm for a random time."""
        await asyncio.to_thread(begin)
        try:
            await asyncio.sleep(self._random.uniform(*span_s))
        finally:
            await asyncio.to_thread(end)


async def _until(condition: Callable[[], bool]) -> None:
    """Raises AssertionError after ``START_S``."""
    await asyncio.to_thread(wait_for, "the stack's recovery", condition, START_S)
