"""Where conversations that send their pictures again go, and what of their prompts is cached there.

    python -m bench.routing [--conversations N] [--real]

Each conversation shows three pictures in its first turn and has none to three turns after it; every
turn sends all before it again, behind a system prompt that all conversations have. They begin as a
Poisson process; between an answer and the next turn is time to think.

What decides is the product's: the gateway's ``Dispatcher`` and ``Affinity``, and in each worker the
engine with its scheduler and block manager. What takes time is scripted: a step takes a fixed time
for itself, for each sequence that decodes and for each token of prefill, and a clock counts it.
Policies:

* affine: what the gateway does;
* affine, 2 gateways: turns arrive at either by chance, and each knows only what it sent itself, and
  once a second how many sequences a worker has;
* least loaded: the worker with the fewest sequences, else the one that had no work for longest;
* round robin;
* one big worker, with all workers' KV blocks, and as many times as fast: the upper bound.

``cached`` is the part of all prompt tokens that came from a prefix cache; ``of the bound`` divides
it by the big worker's; ``load`` is the most loaded worker's requests, and its computed prompt
tokens, over the mean. ``--real`` plays the same conversations, shorter, with the demo checkpoint's
LLM workers as processes, over HTTP.

A decision is timed with a prompt of 32,768 tokens and 64 workers, each of which had many others:
its summary, and the choice with what is then remembered. What counts is CPU time, which other work
on the machine lengthens all the same; ``least`` is without it.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from bench import report
from gateway.clock import Deadline
from gateway.workers.affinity import PromptChain
from gateway.workers.dispatch import Dispatcher, LeaseRequest
from gateway.workers.worker import Description, WorkerState
from llm_service.engine.engine import Engine, Message
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import (
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    PrefilledEvent,
)
from llm_service.policy.step_plan import StepPlan, WorkResult
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid, Modality, Span
from tests.fake_runner import EveryRow, Machine

WORKERS = (2, 4)
KV_TOKENS = 98_304  # Of one worker.
BLOCK = 16
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 400, 60, 120
PICTURES, PICTURE_TOKENS = 3, 768
MORE_TURNS = 3  # At most.
THINKING_S = 10.0  # On average.
CONVERSATIONS_PER_S = 0.6  # For each worker, on average.
STEP_S, DECODE_S, PREFILL_S = 0.012, 0.0006, 0.0002  # A step, a sequence, a token.
DECISION_TOKENS, DECISION_WORKERS = 32_768, 64
LEAST_OF_BOUND, MOST_LOAD, MOST_DECISION_MS = 0.9, 1.3, 1.0


# ---- the traffic


@dataclass
class Conversation:
    """What one client sends: ``tokens`` so far, and how many turns are left."""

    number: int
    tokens: list[int]
    spans: tuple[Span, ...]
    keys: tuple[str, ...]
    thinking: list[float]  # Before each turn that is left.

    @classmethod
    def begin(cls, number: int, chance: random.Random) -> Conversation:
        tokens, spans = list(range(SYSTEM_TOKENS)), []
        for item in range(PICTURES):
            spans.append(
                Span(len(tokens), PICTURE_TOKENS, item, 0, Modality.IMAGE, Grid(1, 48, 64))
            )
            tokens += [1] * PICTURE_TOKENS
        keys = tuple(f"{chance.getrandbits(256):064x}" for _ in range(PICTURES))
        turns = chance.randint(0, MORE_TURNS)
        thinking = [chance.expovariate(1 / THINKING_S) for _ in range(turns)]
        made = cls(number, tokens, tuple(spans), keys, thinking)
        made.ask(chance)
        return made

    def ask(self, chance: random.Random) -> None:
        self.tokens += [chance.randrange(1000, 50_000) for _ in range(QUESTION_TOKENS)]

    def request(self, name: str) -> GenerateRequest:
        sampling = Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        return GenerateRequest(name, tuple(self.tokens), self.spans, self.keys, sampling)

    def chain(self) -> PromptChain:
        return PromptChain.of(self.tokens, self.spans, self.keys)


# ---- workers


class Scripted:
    """A runner that computes nothing: its clock moves as if it did."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        self.machine.run(plan)
        return [WorkResult(2 if work.samples else None) for work in plan.works]


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


class SimulatedWorker:
    """An engine whose steps take scripted time."""

    def __init__(self, kv_tokens: int, speed: float) -> None:
        self.machine = Machine(STEP_S / speed, DECODE_S / speed, PREFILL_S / speed)
        config = EngineConfig(kv_tokens // BLOCK, BLOCK, 32_768, max_num_seqs=int(64 * speed))
        self.events: list[Message] = []
        self.engine = Engine(config, Scripted(self.machine), EveryRow(), self.events.extend)
        self.engine.clock = self.machine.clock
        self.busy = False
        self.requests = 0
        self.computed_tokens = 0


# ---- policies


Policy = Callable[["Run", Conversation], tuple[int, Callable[[], None], Callable[[], None]]]
"""Chooses a worker for a turn: its number, and what to call when its prompt is computed, and at its
end."""


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


# ---- the simulation


@dataclass
class Run:
    """One policy's run over the same conversations."""

    policy: Policy
    workers: list[SimulatedWorker]
    rate: float  # Conversations a second.
    seed: int
    now: float = 0.0
    polled: list[float] = field(default_factory=lambda: [0.0, 0.0])
    reasons: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed + 1)  # Of gateways: not the traffic's.
        self._order = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._open: dict[str, tuple[Conversation, float, Callable[[], None], Callable[[], None]]]
        self._open = {}

    def play(self, conversations: int) -> None:
        traffic = random.Random(self.seed)
        at = 0.0
        for number in range(conversations):
            at += traffic.expovariate(self.rate)
            made = Conversation.begin(number, random.Random(f"{self.seed} {number}"))
            self._at(at, functools.partial(self._send, made))
        while self._due:
            self.now, _, action = heappop(self._due)
            action()

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heappush(self._due, (when, next(self._order), action))

    def _send(self, conversation: Conversation) -> None:
        number, computed, ended = self.policy(self, conversation)
        worker = self.workers[number]
        name = f"{conversation.number}.{len(conversation.thinking)}"
        self._open[name] = (conversation, self.now, computed, ended)
        worker.requests += 1
        if not worker.busy:
            worker.machine.now = self.now
        worker.engine.submit(conversation.request(name))
        if not worker.busy:
            self._step(worker)

    def _step(self, worker: SimulatedWorker) -> None:
        """Computes a step; what it made known is known at its end."""
        worker.busy = worker.engine.step()
        events = list(worker.events)
        worker.events.clear()
        if worker.busy:
            self._at(worker.machine.now, lambda: self._stepped(worker, events))

    def _stepped(self, worker: SimulatedWorker, events: Sequence[Message]) -> None:
        for event in events:
            if isinstance(event, FailedEvent):
                raise event.error
            if isinstance(event, PrefilledEvent):
                self._prefilled(event)
            elif isinstance(event, FinishedEvent):
                self._finished(worker, event)
        self._step(worker)

    def _prefilled(self, event: PrefilledEvent) -> None:
        _, sent, computed, _ = self._open[event.request_id]
        self.ttft_s.append(self.now - sent)
        computed()

    def _finished(self, worker: SimulatedWorker, event: FinishedEvent) -> None:
        conversation, _, _, ended = self._open.pop(event.request_id)
        ended()
        self.prompt_tokens += event.usage.prompt_tokens
        self.cached_tokens += event.usage.cached_tokens
        worker.computed_tokens += event.usage.prompt_tokens - event.usage.cached_tokens
        if conversation.thinking:
            conversation.tokens += [2] * ANSWER_TOKENS
            conversation.ask(random.Random(event.request_id))
            self._at(self.now + conversation.thinking.pop(), lambda: self._send(conversation))

    def figures(self) -> dict[str, Any]:
        requests = [worker.requests for worker in self.workers]
        computed = [worker.computed_tokens for worker in self.workers]
        cuts = statistics.quantiles(self.ttft_s, n=100)
        return {
            "requests": sum(requests),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "cached": self.cached_tokens / self.prompt_tokens,
            "requests_max_over_mean": max(requests) / statistics.mean(requests),
            "computed_max_over_mean": max(computed) / statistics.mean(computed),
            "ttft_p50_s": cuts[49],
            "ttft_p95_s": cuts[94],
            "ttft_mean_s": statistics.mean(self.ttft_s),
            "reasons": self.reasons,
        }


def simulate(workers: int, conversations: int, seed: int, rate: float) -> dict[str, Any]:
    """Figures of every policy, and of the bound."""
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


# ---- the decision


def decide(rounds: int) -> dict[str, float]:
    """CPU milliseconds of this thread for one prompt's way to a worker."""
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


# ---- the report


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, each in found.items():
        yield [
            name,
            f"{100 * each['cached']:.1f}",
            f"{100 * each['of_bound']:.1f}",
            f"{each['requests_max_over_mean']:.2f}",
            f"{each['computed_max_over_mean']:.2f}",
            f"{1e3 * each['ttft_mean_s']:.0f}",
            f"{1e3 * each['ttft_p50_s']:.0f}",
            f"{1e3 * each['ttft_p95_s']:.0f}",
        ]


HEADER = (
    "policy",
    "cached %",
    "of the bound %",
    "load, requests",
    "load, computed",
    "TTFT mean ms",
    "p50",
    "p95",
)


def misses(simulated: dict[str, Any], decision: dict[str, float]) -> list[str]:
    """What is not as it has to be."""
    found = []
    for workers, policies in simulated.items():
        affine = policies["affine"]
        if affine["of_bound"] < LEAST_OF_BOUND:
            found.append(f"{workers}: {affine['of_bound']:.2f} of the bound's cached tokens")
        load = max(affine["requests_max_over_mean"], affine["computed_max_over_mean"])
        if load > MOST_LOAD:
            found.append(f"{workers}: a worker has {load:.2f} times the mean load")
    if decision["whole_least_ms"] > MOST_DECISION_MS:
        found.append(f"a decision takes {decision['whole_least_ms']:.2f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=160, help="for each two workers")
    parser.add_argument("--rounds", type=int, default=300, help="decisions that are timed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="also real workers, over HTTP")
    args = parser.parse_args()
    decision = decide(args.rounds)
    print(f"A decision for {DECISION_TOKENS:,} tokens and {DECISION_WORKERS} workers, CPU ms:")
    rows_of = [[name, f"{ms:.3f}"] for name, ms in decision.items()]
    print(report.table(("", "ms"), rows_of), flush=True)
    simulated = {}
    for workers in WORKERS:
        conversations = args.conversations * workers // 2
        found = simulate(workers, conversations, args.seed, CONVERSATIONS_PER_S)
        simulated[f"{workers} workers"] = found
        print(f"\n{workers} workers, {conversations} conversations, scripted service times:")
        print(report.table(HEADER, list(rows(found))), flush=True)
    results: dict[str, Any] = {"decision": decision, "simulated": simulated}
    if args.real:
        from bench.routing_real import HEADER as REAL_HEADER
        from bench.routing_real import play

        results["real"] = play(args.seed)
        print("\nTwo LLM workers with the demo checkpoint, over HTTP:")
        print(report.table(REAL_HEADER, [[k, *v.values()] for k, v in results["real"].items()]))
    results["misses"] = misses(simulated, decision)
    print(report.save("routing", results))
    if results["misses"]:
        raise SystemExit("; ".join(results["misses"]))


if __name__ == "__main__":
    main()
