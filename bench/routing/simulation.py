"""Conversations, and workers whose steps take scripted time, in simulated time."""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from gateway.workers.affinity import PromptChain
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

KV_TOKENS = 98_304  # Of one worker.
BLOCK = 16
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 400, 60, 120
PICTURES, PICTURE_TOKENS = 3, 768
MORE_TURNS = 3  # At most.
THINKING_S = 10.0  # On average.
STEP_S, DECODE_S, PREFILL_S = 0.012, 0.0006, 0.0002  # A step, a sequence, a token.


@dataclass
class Conversation:
    """One client's conversation: its ``tokens`` so far, and its remaining turns."""

    number: int
    tokens: list[int]
    spans: tuple[Span, ...]
    keys: tuple[str, ...]
    thinking: list[float]  # Seconds before each remaining turn.

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


class Scripted:
    """A runner that computes nothing, but moves its clock as if it did."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        self.machine.run(plan)
        return [WorkResult(2 if work.samples else None) for work in plan.works]


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


Policy = Callable[["Run", Conversation], tuple[int, Callable[[], None], Callable[[], None]]]
"""Chooses a worker for a turn. Returns (its number, what to call when the prompt is computed, what
to call at the turn's end)."""


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
        self.chance = random.Random(self.seed + 1)  # For gateways; the traffic has its own.
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
        """Computes a step, whose events take effect at its end."""
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
