"""The engine's state of one request and of each of its choices. Data only, no decisions."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from llm_service.policy.messages import GenerateRequest
from opticnerve.generation.values import FinishReason, PositionLogprobs, Timings, Usage

if TYPE_CHECKING:
    from opticnerve.generation.grammars import Grammar


class Status(Enum):
    WAITING = "waiting"  # Holds nothing: no blocks, no slot, no leases.
    RUNNING = "running"
    FINISHED = "finished"


class GenerationState:
    """One accepted request: its choices, and what is counted over all of them."""

    def __init__(self, request: GenerateRequest, arrival: int, now: float) -> None:
        self.request = request
        self.arrival = arrival  # Number of the request in the order of submission.
        self.sequences: list[Sequence] = []  # Started choices; the first prefills, the others fork.
        given = {output.choice: output for output in request.outputs}
        ended = {choice for choice, output in given.items() if output.finished}
        self.ended_tokens = sum(len(given[choice].output_ids) for choice in ended)
        self.open_choices = request.sampling.n - len(ended)
        self._given = {choice: given[choice].output_ids for choice in given.keys() - ended}
        self._unbegun = deque(choice for choice in range(request.sampling.n) if choice not in ended)
        self.span_ends = [span.token_offset + span.num_tokens for span in request.spans]
        self.ending_ids = frozenset(request.sampling.ending_ids)
        self.num_prompt_logprobs = 0  # Prompt tokens whose log-probabilities were taken.
        self.grammar: Grammar | None = None  # Set when it is compiled.
        self.cached_tokens = 0
        self.available_keys: set[str] = set()  # Items whose rows are available without encoding.
        self.submitted_at = request.received_at or now
        self.first_chunk_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = now
        self.embedding_wait_s = 0.0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some tokens of the prompt still need their log-probabilities."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and self.num_prompt_logprobs < len(self.request.token_ids)

    def begin(self) -> Sequence | None:
        """Starts the next choice, in the order of their numbers; None after the last."""
        if not self._unbegun:
            return None
        choice = self._unbegun.popleft()
        seq = Sequence(self, choice, self._given.get(choice, ()))
        self.sequences.append(seq)
        return seq

    def span_at(self, token: int) -> int:
        """Index of the first span that ends after ``token``; len(spans) if none does."""
        return bisect_right(self.span_ends, token)

    def take_prompt_logprobs(
        self, start: int, end: int, found: tuple[PositionLogprobs, ...]
    ) -> tuple[PositionLogprobs, ...]:
        """The entries of the next prompt positions up to ``end``, without those taken before a
        preemption. ``found``: entries of positions start + 1 .. end. The first token and
        placeholders, which are not predicted, get empty entries."""
        first, spans = self.num_prompt_logprobs, self.request.spans
        taken = []
        for position in range(first, min(end + 1, len(self.request.token_ids))):
            index = self.span_at(position)
            covered = index < len(spans) and spans[index].token_offset <= position
            absent = covered or position == 0
            taken.append(PositionLogprobs() if absent else found[position - start - 1])
        self.num_prompt_logprobs += len(taken)
        return tuple(taken)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=self.ended_tokens + sum(seq.num_output for seq in self.sequences),
            cached_tokens=self.cached_tokens,
            embedding_tokens=sum(span.num_tokens for span in self.request.spans),
        )

    def timings(self) -> Timings:
        first_chunk = self.first_chunk_at or self.last_token_at
        first_token = self.first_token_at or self.last_token_at
        return Timings(
            queue_ms=1e3 * (first_chunk - self.submitted_at),
            embedding_wait_ms=1e3 * self.embedding_wait_s,
            prefill_ms=1e3 * (first_token - first_chunk),
            decode_ms=1e3 * (self.last_token_at - first_token),
            preemptions=sum(seq.preemptions for seq in self.sequences),
        )


class Sequence:
    """State of one choice: its tokens, how many are computed, and the resources it holds.

    ``request``, ``choice`` and ``num_prompt`` never change, and ``token_ids`` only grows; only the
    scheduler and the engine write the rest. A sequence holds blocks, a slot and leases exactly
    while its ``status`` is RUNNING.
    """

    __slots__ = (
        "block_table",
        "blocked_since",
        "choice",
        "generation",
        "grammar_ended",
        "hashes",
        "last_token_on_device",
        "leases",
        "missing",
        "num_cached_blocks",
        "num_computed",
        "num_prompt",
        "order",
        "preemptions",
        "request",
        "slot",
        "status",
        "token_ids",
    )

    def __init__(
        self, generation: GenerationState, choice: int, output_ids: Iterable[int] = ()
    ) -> None:
        request = generation.request
        self.generation = generation
        self.request = request
        self.choice = choice
        self.order = (request.priority, generation.arrival, choice)  # Lower runs first.
        self.token_ids = [*request.token_ids, *output_ids]  # Prompt, then output.
        self.num_prompt = len(request.token_ids)
        self.num_computed = 0  # Tokens whose keys and values are in blocks.
        self.num_cached_blocks = 0  # Leading blocks that are in the prefix cache.
        self.block_table: tuple[int, ...] = ()
        self.hashes: list[bytes] = []  # Those of leading full blocks that were needed so far.
        self.slot = -1
        self.status = Status.WAITING
        self.leases: dict[str, int] = {}  # Key -> end of its last span.
        self.missing: set[str] = set()  # Keys of NeedRowsEvents that are not answered yet.
        self.blocked_since: float | None = None  # When its chunks began to wait for rows.
        self.last_token_on_device = False  # The runner takes it from the slot's last sample.
        self.preemptions = 0
        self.grammar_ended = False  # The grammar allows nothing after the output.

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}, choice={self.choice}, {self.status.value}, "
            f"tokens={len(self.token_ids)}, computed={self.num_computed})"
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the choice ends with its last token; None if it continues."""
        if self.grammar_ended:
            return FinishReason.STOP
        sampling = self.request.sampling
        output = len(self.token_ids) - self.num_prompt
        if output > sampling.min_tokens and self.token_ids[-1] in self.generation.ending_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if output >= sampling.max_tokens else None

    def suspend(self) -> None:
        """Forgets what was computed; the caller has released blocks, slot and leases."""
        self.num_computed = 0
        self.num_cached_blocks = 0
        self.block_table = ()
        self.slot = -1
        self.missing.clear()
        self.blocked_since = None
        self.last_token_on_device = False
