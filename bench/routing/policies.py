"""Policies that choose the worker of a turn, their runs over the same conversations, and the time
of a decision."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from bench.routing.simulation import KV_TOKENS, Conversation, Policy, Run, SimulatedWorker
from gateway.clock import Deadline
from gateway.workers.affinity import PromptChain
from gateway.workers.dispatch import Dispatcher, LeaseRequest
from gateway.workers.worker import Description, WorkerState

DECISION_TOKENS, DECISION_WORKERS = 32_768, 64


@dataclass(eq=False)
class Member:
    """A worker as one gateway sees it."""

    address: str
    description: Description
    pending: int = 0
    heavy: int = 0
    cost_of_other_gateways: int = 0
    last_picked: int = 0
    cost_per_s: float = 0.0
    state: WorkerState = WorkerState.SERVING

    def has_room(self, cost: int, heavy: bool = False) -> bool:
        return True

    def lend(self, cost: int, heavy: bool = False) -> None:
        self.pending += cost

    def take_back(self, cost: int, heavy: bool = False, *, done: bool = True) -> None:
        self.pending -= cost


def members(number: int, kv_tokens: int = KV_TOKENS) -> list[Any]:
    limits = {"prefix_cache_tokens": kv_tokens}
    return [
        Member(f"10.0.0.{i}:7002", Description(limits=limits, instance_id=str(i)))
        for i in range(number)
    ]


def dispatched(*, by_prefix: bool, gateways: int = 1) -> Callable[[int], Policy]:
    def make(workers: int) -> Policy:
        pools = [members(workers) for _ in range(gateways)]
        dispatchers = [Dispatcher(pool) for pool in pools]

        def choose(
            run: Run, conversation: Conversation
        ) -> tuple[int, Callable[[], None], Callable[[], None]]:
            place = run.chance.randrange(gateways)
            dispatcher, pool = dispatchers[place], pools[place]
            if gateways > 1 and run.now - run.polled[place] >= 1.0:
                run.polled[place] = run.now
                for member, worker in zip(pool, run.workers, strict=True):
                    stats = worker.engine.stats()
                    others = stats.running + stats.waiting - member.pending
                    member.cost_of_other_gateways = max(0, others)
            prompt = conversation.chain() if by_prefix else None
            lease = LeaseRequest(1, Deadline(0.0), prompt=prompt)
            dispatcher.add(lease)
            assert lease.worker is not None
            number = pool.index(lease.worker)
            run.reasons[lease.reason] = run.reasons.get(lease.reason, 0) + 1
            return (
                number,
                lambda: dispatcher.prompt_computed(lease),
                lambda: dispatcher.end(lease),
            )

        return choose

    return make


def round_robin(workers: int) -> Policy:
    turn = count()

    def choose(
        run: Run, conversation: Conversation
    ) -> tuple[int, Callable[[], None], Callable[[], None]]:
        return next(turn) % workers, lambda: None, lambda: None

    return choose


POLICIES: dict[str, Callable[[int], Policy]] = {
    "affine": dispatched(by_prefix=True),
    "affine, 2 gateways": dispatched(by_prefix=True, gateways=2),
    "least loaded": dispatched(by_prefix=False),
    "round robin": round_robin,
}


def simulate(workers: int, conversations: int, seed: int, rate: float) -> dict[str, Any]:
    """Figures of every policy, and of the upper bound."""
    found: dict[str, Any] = {}
    for name, make in POLICIES.items():
        pool = [SimulatedWorker(KV_TOKENS, 1.0) for _ in range(workers)]
        run = Run(make(workers), pool, rate * workers, seed)
        run.play(conversations)
        found[name] = run.figures()
    big = [SimulatedWorker(KV_TOKENS * workers, float(workers))]
    run = Run(round_robin(1), big, rate * workers, seed)
    run.play(conversations)
    found["one big worker"] = run.figures()
    for figures in found.values():
        figures["of_bound"] = figures["cached_tokens"] / run.cached_tokens
    return found


def decide(rounds: int) -> dict[str, float]:
    """CPU milliseconds of this thread for choosing a prompt's worker."""
    chance = random.Random(1)
    pool = members(DECISION_WORKERS, 1_000_000)
    dispatcher = Dispatcher(pool)
    tokens = [chance.randrange(1000, 50_000) for _ in range(DECISION_TOKENS)]
    for worker in pool:
        for _ in range(40):
            others = [chance.randrange(1000, 50_000) for _ in range(2_000)]
            dispatcher.affinity.begin(PromptChain.of(others), worker)
        begin = tokens[: chance.randrange(DECISION_TOKENS)]
        dispatcher.affinity.begin(PromptChain.of([*begin, *others]), worker)
    times: dict[str, list[float]] = {"summary": [], "choice": [], "whole": []}
    for _ in range(rounds):
        ids = tuple(tokens)
        began = time.thread_time()
        prompt = PromptChain.of(ids)
        summarised = time.thread_time()
        lease = LeaseRequest(1, Deadline(0.0), prompt=prompt)
        dispatcher.add(lease)
        ended = time.thread_time()
        dispatcher.end(lease)
        times["summary"].append(summarised - began)
        times["choice"].append(ended - summarised)
        times["whole"].append(ended - began)
    return {
        f"{name}_{label}_ms": 1e3 * value
        for name, values in times.items()
        for label, value in (
            ("least", min(values)),
            ("p50", statistics.median(values)),
            ("p99", statistics.quantiles(values, n=100)[98]),
        )
    }
