"""Any workload, any interleaving: each request's tokens are those that it has alone.

Requests share prefixes, pictures come late or vanish, pages are few, clients leave, steps break.
The fake runner's tokens depend on every cell that a block table reaches, so equality with the
oracle says that no page, row, slot or copy was ever wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.engine.engine import Engine, Message
from llm_service.engine.stream import coalesce
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import (
    AbortedEvent,
    EngineStats,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    NeedRowsEvent,
    PromptLogprobsEvent,
    TokensEvent,
)
from opticnerve.errors import EmbeddingNotFound, EngineFailure
from opticnerve.generation.values import ChoiceOutput, Sampling
from opticnerve.media.plan import Grid, Modality, Span, SpanAttention
from tests.fake_runner import FakeRows, FakeRunner, Machine, clear_cache, oracle

KEYS = ("red", "green", "blue")
PLACEHOLDER = 9
GRIDS = (Grid(1, 2, 4), Grid(1, 4, 2))
TERMINAL = (FinishedEvent, FailedEvent, AbortedEvent)


@dataclass(frozen=True)
class Picture:
    length: int
    item: int = 0
    row: int = 0
    grid: Grid = GRIDS[0]
    attention: SpanAttention = SpanAttention.CAUSAL


Part = tuple[int, ...] | Picture  # Text, or a run of placeholders.


def picture(chance: Random) -> Picture:
    return Picture(
        chance.choice((3, 14, 20)),
        chance.randrange(len(KEYS)),
        chance.randrange(2),
        chance.choice(GRIDS),
        chance.choice(tuple(SpanAttention)),
    )


def text(chance: Random) -> tuple[int, ...]:
    return (chance.choice((1, 2, PLACEHOLDER)),) * chance.choice((1, 9, 16, 30))


def prompt(chance: Random) -> list[Part]:
    return [chance.choice((text, picture))(chance) for _ in range(chance.randint(2, 6))]


def variant(chance: Random, part: Part) -> Part:
    """Another part in its place, or the same picture but for one thing."""
    if not isinstance(part, Picture):
        return text(chance)
    name = chance.choice(("length", "item", "row", "grid", "attention"))
    return replace(part, **{name: getattr(picture(chance), name)})


def request(chance: Random, parts: list[Part]) -> GenerateRequest:
    """``parts``, or what differs from them in one place, so that prefixes meet often."""
    if chance.random() < 0.5:
        index = max(chance.randrange(len(parts)) for _ in range(2))
        parts = [*parts[:index], variant(chance, parts[index]), *parts[index + 1 :]]
    tokens, spans = layout(parts)
    max_tokens = chance.randint(1, 40)
    continues = chance.random() < 0.2
    sampling = Sampling(
        max_tokens=max_tokens,
        min_tokens=chance.randrange(5),
        seed=chance.randrange(2),
        n=chance.choice((1, 1, 1, 2, 3)),
        stop_token_ids=chance.choice(((), (1, 2, 3))),
        prompt_logprobs=chance.choice((None, None, None, 0)),
    )
    request = GenerateRequest(
        "",
        tokens,
        spans=spans,
        items=KEYS,
        sampling=sampling,
        priority=chance.randrange(3),
        cache_salt=chance.choice(("",) * 9 + ("salt",)),
        skip_prefix_cache=chance.random() < 0.1,
        share=chance.choice(("", "", "ada", "bob")),
        weight=chance.choice((0.5, 1.0, 4.0)),
    )
    if continues:
        choices = [c for c in range(sampling.n) if chance.random() < 0.8]
        request = replace(request, outputs=tuple(sent(chance, request, c) for c in choices))
    return request


def sent(chance: Random, request: GenerateRequest, choice: int) -> ChoiceOutput:
    """A part of the choice's tokens, perhaps all of them, perhaps all that anybody wants."""
    tokens = oracle(request, choice)
    count = chance.choice((0, chance.randint(1, len(tokens)), len(tokens)))
    return ChoiceOutput(choice, tuple(tokens[:count]), chance.random() < 0.3)


def layout(parts: list[Part]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    tokens: list[int] = []
    spans: list[Span] = []
    for part in parts:
        if isinstance(part, Picture):
            place = (len(tokens), part.length, part.item, part.row)
            spans.append(Span(*place, Modality.IMAGE, part.grid, 0.0, part.attention))
            tokens += [PLACEHOLDER] * part.length
        else:
            tokens += part
    return tuple(tokens), tuple(spans)


def config(chance: Random) -> EngineConfig:
    block_size = chance.choice((16, 16, 32))
    tokens = chance.choice((256, 320, 512))  # A request has at most 220.
    return EngineConfig(
        num_blocks=tokens // block_size,
        block_size=block_size,
        max_model_len=256,
        max_num_seqs=chance.randint(1, 5),
        max_num_batched_tokens=chance.choice((20, 33, 64, 200)),
        max_step_s=chance.choice((0.0, 0.05, 0.2)),
        prefix_caching=chance.random() < 0.9,
        row_bytes=1,
    )


@dataclass
class World:
    """The engine, the servicer's part, and what every request was sent."""

    config: EngineConfig
    budget: int
    machine: Machine
    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    wanted: set[str] = field(default_factory=set)
    disturbed: set[str] = field(default_factory=set)  # Requests that may fail.
    opened: dict[str, GenerateRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = FakeRows(budget=self.budget)
        self.runner = FakeRunner(self.config, self.rows, self.machine)
        self.engine = Engine(self.config, self.runner, self.rows, self.emit)
        self.engine.clock = self.machine.clock

    def emit(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, EngineStats):
                continue
            assert isinstance(message, Event)
            self.events[message.request_id].append(message)
            if isinstance(message, NeedRowsEvent):
                self.wanted.update(message.keys)

    def submit(self, request: GenerateRequest) -> None:
        request = replace(request, request_id=f"r{len(self.opened)}")
        self.opened[request.request_id] = request
        self.engine.submit(request)

    def deliver(self, key: str) -> None:
        self.rows.present.add(key)
        self.wanted.discard(key)
        self.engine.rows_ready(key)

    def evict(self, key: str) -> None:
        """Rows vanish, leased or not, as when somebody deletes the file."""
        self.rows.present.discard(key)

    def break_step(self) -> None:
        self.runner.failures.append(RuntimeError("broken"))
        before = len(self.runner.plans)
        self.engine.step()
        self.runner.failures.clear()
        for plan in self.runner.plans[before:]:
            self.disturbed.update(work.seq.request_id for work in plan.works)
        self.disturbed.update(seq.request_id for seq in self.engine.scheduler.copied)

    def break_sequence(self) -> None:
        self.runner.slot_errors.append(EngineFailure("not finite"))
        before = len(self.runner.plans)
        self.engine.step()
        self.runner.slot_errors.clear()
        for plan in self.runner.plans[before:]:
            self.disturbed.add(plan.works[0].seq.request_id)

    def fail_rows(self, request_id: str, key: str) -> None:
        self.disturbed.add(request_id)
        self.engine.rows_failed(request_id, key, EmbeddingNotFound("gone"))

    def abort(self, request_id: str) -> None:
        self.disturbed.add(request_id)
        self.engine.abort(request_id)

    def finish(self) -> None:
        """Everything that is asked for comes; the engine must come to rest, with all answered."""
        for _ in range(5000):
            if not self.engine.step():
                if not self.wanted:
                    break
                for key in tuple(self.wanted):
                    self.deliver(key)
        else:
            raise AssertionError("the engine does not come to rest")
        assert not self.engine.scheduler.running
        assert not self.engine.scheduler.shares.num_waiting

    def check(self) -> None:
        self.engine.check_integrity()
        assert self.engine.blocks.num_free == self.config.num_blocks
        assert not self.rows.leases
        for request_id, request in self.opened.items():
            self._check_events(request, self.events[request_id])

    def _check_events(self, request: GenerateRequest, events: list[Event]) -> None:
        assert sum(isinstance(event, TERMINAL) for event in events) == 1
        assert isinstance(events[-1], TERMINAL)
        tokens: dict[int, list[int]] = {choice: [] for choice in range(request.sampling.n)}
        tokens |= {output.choice: list(output.output_ids) for output in request.outputs}
        finishes: Counter[int] = Counter()
        for event in coalesce(events):
            if isinstance(event, TokensEvent):
                delta = event.delta
                assert delta.first_index == len(tokens[delta.choice])
                assert not finishes[delta.choice]
                tokens[delta.choice] += delta.token_ids
                finishes[delta.choice] += delta.finish_reason is not None
        if isinstance(events[-1], FinishedEvent):
            self._check_finished(request, events, tokens)
            ended = {output.choice for output in request.outputs if output.finished}
            assert finishes == dict.fromkeys(set(range(request.sampling.n)) - ended, 1)
        else:
            assert request.request_id in self.disturbed
            for choice, got in tokens.items():
                assert got == oracle(request, choice)[: len(got)]

    def _check_finished(
        self, request: GenerateRequest, events: list[Event], tokens: dict[int, list[int]]
    ) -> None:
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        for choice in range(request.sampling.n):
            assert tokens[choice] == oracle(request, choice)
        assert finished.usage.completion_tokens == sum(len(each) for each in tokens.values())
        assert finished.usage.cached_tokens <= len(request.token_ids)
        scores = [event for event in events if isinstance(event, PromptLogprobsEvent)]
        given = dict.fromkeys(tokens, 0)
        given |= {output.choice: len(output.output_ids) for output in request.outputs}
        ended_already = all(given[choice] == len(each) for choice, each in tokens.items())
        if request.sampling.prompt_logprobs is not None and not ended_already:
            assert sum(len(each.positions) for each in scores) == len(request.token_ids)
            last = events.index(scores[-1])
            assert not any(
                event.delta.token_ids for event in events[:last] if isinstance(event, TokensEvent)
            )
        else:
            assert not scores


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_every_request_gets_what_it_would_get_alone(seed: int) -> None:
    chance = Random(seed)
    slowness = 10 ** chance.uniform(-4, 1)
    machine = Machine(slowness, slowness / 10, slowness * chance.choice((0.001, 0.05, 1)))
    world = World(config(chance), chance.choice((10, 25, 10_000)), machine)
    pool = [prompt(chance) for _ in range(2)]
    for _ in range(chance.randint(10, 50)):
        act(world, chance, pool)
        world.engine.check_integrity()
    world.finish()
    world.check()


def act(world: World, chance: Random, pool: list[list[Part]]) -> None:
    running = world.engine.scheduler.running
    match chance.choice("SSSSSSSS..............DDDDEACBbFP"):
        case "S":
            world.submit(request(chance, chance.choice(pool)))
        case ".":
            for _ in range(chance.randint(1, 20)):
                world.engine.step()
        case "D":
            world.deliver(chance.choice(KEYS))
        case "E":
            world.evict(chance.choice(KEYS))
        case "A" if world.opened:
            world.abort(chance.choice(sorted(world.opened)))
        case "C":
            clear_cache(world.engine.blocks)
        case "B" if chance.random() < 0.5:
            world.break_step()
        case "b" if chance.random() < 0.5:
            world.break_sequence()
        case "F" if world.opened:
            world.fail_rows(chance.choice(sorted(world.opened)), chance.choice(KEYS))
        case "P" if running:
            world.engine.scheduler.preempt(chance.choice(running))
