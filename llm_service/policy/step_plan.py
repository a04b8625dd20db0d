"""The interface between the scheduler and the model runner. No tensors, no torch.

The scheduler writes a StepPlan; the model runner executes it and returns a WorkResult for each
Work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llm_service.policy.sequence import Sequence
from opticnerve.generation.values import PositionLogprobs


@dataclass(frozen=True, slots=True)
class Segment:
    """A slice of one item's rows that overwrites input embeddings in this chunk."""

    item_key: str
    chunk_offset: int  # Index in the chunk of the first token that is overwritten.
    row_start: int  # First row of the item's embedding.
    num_rows: int


def _segments(seq: Sequence, start: int, end: int) -> tuple[Segment, ...]:
    """The parts of the sequence's spans that lie in the chunk [start, end)."""
    found = []
    spans = seq.request.spans
    for index in range(seq.generation.span_at(start), len(spans)):
        span = spans[index]
        if span.token_offset >= end:
            break
        first = max(start, span.token_offset)
        last = min(end, span.token_offset + span.num_tokens)
        row = span.row_start + first - span.token_offset
        found.append(Segment(seq.request.items[span.item], first - start, row, last - first))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens that one sequence computes in this step."""

    seq: Sequence  # Identity, token ids, sampling; the runner never writes to it.
    slot: int  # Row of the device's per-sequence state, stable while the sequence runs.
    start: int  # First token to compute: tokens before it are in the KV cache.
    num_tokens: int
    block_table: tuple[int, ...]  # KV blocks of tokens [0, start + num_tokens).
    segments: tuple[Segment, ...]
    samples: bool  # Samples the token after the chunk; otherwise prefill continues.
    prompt_logprobs: bool = False  # Log-probabilities of every prompt token of this chunk.
    last_token_on_device: bool = False  # The chunk's last token is the slot's last sample.

    @property
    def decodes(self) -> bool:
        """Whether it computes the next token of an output, and nothing before it."""
        return self.samples and self.num_tokens == 1 and self.start >= self.seq.num_prompt


def work_on(seq: Sequence, num_tokens: int, block_size: int) -> Work:
    """The work of computing the sequence's next ``num_tokens``, for which it has blocks."""
    start = seq.num_computed
    end = start + num_tokens
    table = seq.block_table
    in_prompt = start < seq.num_prompt
    return Work(
        seq,
        seq.slot,
        start,
        num_tokens,
        table if end == len(seq.token_ids) else table[: -(-end // block_size)],
        _segments(seq, start, end) if in_prompt else (),
        end == len(seq.token_ids),
        in_prompt and seq.generation.wants_prompt_logprobs,
        seq.last_token_on_device,
    )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. ``works`` are in the order in which their tokens are packed.

    The runner first forgets ``freed_slots``, those of preempted sequences included: this plan may
    give them to other sequences. Then it makes ``copies`` of whole blocks, reading all of them
    before it writes any. Then it computes. A sequence that returns after preemption has its output
    in ``seq.token_ids``, and ``last_token_on_device`` is false.
    """

    step: int
    works: tuple[Work, ...]
    freed_slots: tuple[int, ...] = ()  # Slots released since the last plan.
    copies: tuple[tuple[int, int], ...] = ()  # KV blocks (source, destination) of forked choices.

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.works)

    @property
    def num_decodes(self) -> int:
        return sum(1 for work in self.works if work.decodes)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """The outcome of one Work.

    ``prompt_logprobs``: if the work asks for them, those of tokens start + 1 .. start + num_tokens;
    entries past the prompt are ignored. ``error``: this sequence alone failed, and the other fields
    are ignored. After EmbeddingUnavailable with an item's key as ``param``, the engine asks for the
    item's rows and repeats the work once they are loaded. ``ends_grammar``: the grammar allows
    nothing after ``token_id``; without a token, it allowed nothing after the output so far.
    """

    token_id: int | None = None  # None: the work did not sample.
    logprobs: PositionLogprobs | None = None  # Of ``token_id``, if its request asks for them.
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    error: Exception | None = None
    ends_grammar: bool = False


class Runner(Protocol):
    """The owner of the device."""

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        """Runs one forward pass on the engine's thread. Returns a result for each work, in the
        plan's order. Any exception fails every sequence of the plan; DeviceLost ends the engine."""
        ...
