"""A runner without a model, over pages without tensors, that notices every wrong page.

Each cell of its paged memory is a digest of the cell before it, the token, and the identity of
the picture's row that stands there, as real keys and values depend on all that came before. The
next token is a hash over *all* cells that the block table reaches. A page shared wrongly, freed
too early, not copied or computed from the wrong rows gives another token than ``oracle``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_service.engine.engine import Emit, Engine
from llm_service.policy.block_manager import BlockManager
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import GenerateRequest
from llm_service.policy.step_plan import StepPlan, Work, WorkResult
from opticnerve.errors import EmbeddingEvicted, EmbeddingUnavailable
from opticnerve.generation.values import ChoiceOutput, Logprob, PositionLogprobs
from opticnerve.media.plan import Span, SpanAttention

VOCABULARY = 50


def digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()


def span_identity(request: GenerateRequest, span: Span, position: int) -> tuple[object, ...]:
    """What the model would see at a placeholder: one row of one item, at one place of a grid."""
    index = position - span.token_offset
    atomic = span.attention is SpanAttention.BIDIRECTIONAL
    return (
        request.items[span.item],
        span.row_start + index,
        index,
        span.grid_thw,
        span.seconds_per_grid,
        span.modality,
        span.num_tokens if atomic else 0,
    )


def span_over(request: GenerateRequest, position: int) -> Span | None:
    for span in request.spans:
        if span.token_offset <= position < span.token_offset + span.num_tokens:
            return span
    return None


def cell(request: GenerateRequest, before: bytes, token: int, position: int) -> bytes:
    span = span_over(request, position)
    if span is None:
        return digest(before, token)
    return digest(before, span_identity(request, span, position))  # Rows overwrite the token.


def next_token(request: GenerateRequest, cells: list[bytes], choice: int, position: int) -> int:
    name = digest(cells, request.sampling.seed, choice, position)
    return int.from_bytes(name, "little") % VOCABULARY


def oracle(request: GenerateRequest, choice: int = 0) -> list[int]:
    """The tokens that a choice must have, those in ``outputs`` included."""
    sampling = request.sampling
    given = next((each for each in request.outputs if each.choice == choice), ChoiceOutput(choice))
    if given.finished:
        return list(given.output_ids)
    tokens = [*request.token_ids, *given.output_ids]
    prompt = len(request.token_ids)
    eos = () if sampling.ignore_eos else sampling.eos_token_ids or ()
    stops = {*sampling.stop_token_ids, *eos}
    cells: list[bytes] = []
    before = digest()
    while len(tokens) - prompt < sampling.max_tokens:
        position = len(tokens) - prompt
        if position > sampling.min_tokens and tokens[-1] in stops:
            break
        while len(cells) < len(tokens):
            before = cell(request, before, tokens[len(cells)], len(cells))
            cells.append(before)
        tokens.append(next_token(request, cells, choice, position))
    return tokens[prompt:]


def clear_cache(blocks: BlockManager) -> None:
    """Forgets every cached page; those that sequences hold stay theirs."""
    blocks._free.extend(blocks._idle)
    blocks._idle.clear()
    blocks._cached.clear()
    blocks._hash_of.clear()


class FakeRows:
    """A RowSource of names. ``budget`` in bytes, where a row is one byte."""

    def __init__(self, present: set[str] | None = None, budget: int = 1 << 30) -> None:
        self.present = present if present is not None else set()
        self.leases: dict[str, int] = {}
        self.budget = budget
        self.acquired: list[str] = []

    def ready(self, key: str) -> bool:
        return key in self.present

    def can_acquire(self, num_bytes: int) -> bool:
        return sum(self.leases.values()) + num_bytes <= self.budget

    def acquire(self, key: str, num_bytes: int) -> None:
        assert key not in self.leases, f"{key} is leased twice"
        self.leases[key] = num_bytes
        self.acquired.append(key)

    def release(self, key: str) -> None:
        del self.leases[key]

    def get(self, key: str) -> Mapping[str, Any]:
        assert key in self.leases, f"{key} is read without a lease"
        if key not in self.present:
            raise EmbeddingEvicted(f"{key} is gone", param=key)
        return {}

    def discard(self, key: str) -> None:
        self.present.discard(key)

    def load(self, key: str) -> bool:
        return key in self.present


@dataclass
class Machine:
    """A clock that moves as steps are computed, in seconds."""

    per_step: float
    per_decode: float
    per_token: float  # Of prefill.
    now: float = 0.0

    def clock(self) -> float:
        return self.now

    def seconds(self, decodes: int, prefill_tokens: int) -> float:
        return self.per_step + self.per_decode * decodes + self.per_token * prefill_tokens

    def run(self, plan: StepPlan) -> float:
        """Computes a step; returns the seconds that it took."""
        seconds = self.seconds(plan.num_decodes, plan.num_tokens - plan.num_decodes)
        self.now += seconds
        return seconds


class FakeRunner:
    """``machine`` says how long steps take. ``failures``: exceptions to raise at the next steps;
    ``slot_errors``: (at most one a step) exceptions to answer for a work of the next steps."""

    def __init__(
        self, config: EngineConfig, rows: FakeRows, machine: Machine | None = None
    ) -> None:
        self.config = config
        self.rows = rows
        self.machine = machine
        self.memory = [[b"garbage"] * config.block_size for _ in range(config.num_blocks)]
        self.last: dict[int, int] = {}  # By slot, as the device would keep it.
        self.plans: list[StepPlan] = []
        self.failures: list[Exception] = []
        self.slot_errors: list[Exception] = []

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        self.plans.append(plan)
        if self.machine is not None:
            self.machine.run(plan)
        for slot in plan.freed_slots:
            self.last.pop(slot, None)
        sources = [list(self.memory[source]) for source, _ in plan.copies]
        if self.failures:
            self._scribble(plan)
            raise self.failures.pop()
        for (_, destination), page in zip(plan.copies, sources, strict=True):
            self.memory[destination] = page
        assert sum(work.num_tokens for work in plan.works) <= self.config.max_num_batched_tokens
        assert len({work.slot for work in plan.works}) == len(plan.works)
        return [self._work(work) for work in plan.works]

    def _scribble(self, plan: StepPlan) -> None:
        """A step that breaks leaves anything at all where it was to write."""
        for work in plan.works:
            for position in range(work.start, work.start + work.num_tokens):
                self._write(work, position, b"scribble")
        for _, destination in plan.copies:
            self.memory[destination] = [b"scribble"] * self.config.block_size

    def _work(self, work: Work) -> WorkResult:
        try:
            if self.slot_errors:
                raise self.slot_errors.pop()
            rows = self._rows(work)
        except Exception as error:
            self._scribble(StepPlan(0, (work,)))
            return WorkResult(error=error)
        cells = self._compute(work, rows)
        prompt_logprobs = self._prompt_logprobs(work, cells) if work.prompt_logprobs else ()
        if not work.samples:
            return WorkResult(prompt_logprobs=prompt_logprobs)
        seq = work.seq
        position = work.start + work.num_tokens - seq.num_prompt
        token = next_token(seq.request, cells, seq.choice, position)
        self.last[work.slot] = token
        wanted = seq.request.sampling.logprobs is not None
        logprobs = PositionLogprobs(Logprob(token, -0.5, 1)) if wanted else None
        return WorkResult(token, logprobs, prompt_logprobs)

    def _rows(self, work: Work) -> dict[int, tuple[str, int]]:
        """(key, row) of each token of the sequence that a segment overwrites."""
        rows: dict[int, tuple[str, int]] = {}
        for segment in work.segments:
            self.rows.get(segment.item_key)
            for index in range(segment.num_rows):
                position = work.start + segment.chunk_offset + index
                rows[position] = (segment.item_key, segment.row_start + index)
        return rows

    def _compute(self, work: Work, rows: dict[int, tuple[str, int]]) -> list[bytes]:
        seq = work.seq
        cells = [self._read(work, position) for position in range(work.start)]
        for position in range(work.start, work.start + work.num_tokens):
            span = span_over(seq.request, position)
            self._check_rows(work, span, position, rows.get(position))
            token = seq.token_ids[position]
            if work.last_token_on_device and position == work.start + work.num_tokens - 1:
                assert token == self.last[work.slot]
                token = self.last[work.slot]
            before = cells[-1] if cells else digest()
            cells.append(cell(seq.request, before, token, position))
            self._write(work, position, cells[-1])
        return cells

    def _check_rows(
        self, work: Work, span: Span | None, position: int, row: tuple[str, int] | None
    ) -> None:
        if span is None:
            assert row is None
            return
        request = work.seq.request
        assert row == span_identity(request, span, position)[:2]
        if span.attention is SpanAttention.BIDIRECTIONAL:
            assert work.start <= span.token_offset
            assert span.token_offset + span.num_tokens <= work.start + work.num_tokens

    def _prompt_logprobs(self, work: Work, cells: list[bytes]) -> tuple[PositionLogprobs, ...]:
        tokens = work.seq.token_ids
        return tuple(
            PositionLogprobs(
                Logprob(tokens[position] if position < len(tokens) else -1, float(position), 1)
            )
            for position in range(work.start + 1, work.start + work.num_tokens + 1)
        )

    def _read(self, work: Work, position: int) -> bytes:
        size = self.config.block_size
        return self.memory[work.block_table[position // size]][position % size]

    def _write(self, work: Work, position: int, value: bytes) -> None:
        size = self.config.block_size
        self.memory[work.block_table[position // size]][position % size] = value


def make_engine(config: EngineConfig, emit: Emit) -> Engine:
    """An engine factory; every picture's rows are there."""
    rows = EveryRow()
    return Engine(config, FakeRunner(config, rows), rows, emit)


class EveryRow(FakeRows):
    def ready(self, key: str) -> bool:
        self.present.add(key)
        return True


__all__ = ["EmbeddingUnavailable", "FakeRows", "FakeRunner", "Machine", "make_engine", "oracle"]
