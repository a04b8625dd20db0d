"""One choice of one request, as the engine keeps it: state, and nothing that decides or computes.

Also the messages between the servicer and the engine. All are frozen, picklable and free of
tensors, so that the engine can live in a thread or in a process of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    FinishReason,
    PositionLogprobs,
    Sampling,
    Timings,
    Usage,
)
from opticnerve.media.plan import Span


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A generation as the engine gets it. ``items`` are content keys; spans index them.

    ``spans`` are in the order of their tokens and do not overlap. ``outputs`` continue a
    generation that began elsewhere; a choice that is not among them has sent nothing yet.
    """

    request_id: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    items: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    cache_salt: str = ""
    outputs: tuple[ChoiceOutput, ...] = ()  # At most one a choice.
    skip_prefix_cache: bool = False  # Neither read the prefix cache nor share with it.
    share: str = ""  # Whose part of the decoder it uses; empty: its own, see ``shares``.
    weight: float = 1.0  # Of that part, beside those of others.


# ---- servicer -> engine: GenerateRequest, and


@dataclass(frozen=True, slots=True)
class Abort:
    """The client went away. Unknown and ended requests are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RowsReady:
    """The rows of ``key`` are loaded; chunks may use them."""

    key: str


@dataclass(frozen=True, slots=True)
class RowsFound:
    """The rows of ``keys`` need no encoder any more: a request that waits to be admitted for want
    of pictures' rows need not wait behind pictures that are being encoded."""

    request_id: str
    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class RowsFailed:
    """The rows that a request waits for will not come: it fails with ``error``."""

    request_id: str
    key: str
    error: Exception


@dataclass(frozen=True, slots=True)
class CheckIntegrity:
    """Asks the engine to check its invariants; an IntegrityReport with ``ticket`` answers."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The engine aborts what is open and leaves its loop."""


Command = GenerateRequest | Abort | RowsReady | RowsFound | RowsFailed | CheckIntegrity | Stop


# ---- engine -> servicer


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of one choice."""

    request_id: str
    delta: Delta


@dataclass(frozen=True, slots=True)
class PrefilledEvent:
    """The prompt is computed; once, before the first token of any choice."""

    request_id: str
    cached_tokens: int  # Of the prompt, taken from the prefix cache.


@dataclass(frozen=True, slots=True)
class PromptLogprobsEvent:
    """One entry for every prompt token, once, before the first token of any choice."""

    request_id: str
    positions: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class NeedRowsEvent:
    """Chunks of this request wait for rows that the engine does not hold.

    Sent when a request is admitted, for the keys that no prefix hit covers and that are not
    ready, and again when rows turn out to be gone. ``RowsReady`` or ``RowsFailed`` answers each
    key, even one for which ``RowsReady`` was sent before.
    """

    request_id: str
    keys: tuple[str, ...]
    preempted: bool = False


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """Terminal: every choice is finished."""

    request_id: str
    usage: Usage
    timings: Timings  # Without get_ms: the engine reads no rows.


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """Terminal: one request failed; ``error`` is an OpticNerveError."""

    request_id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class AbortedEvent:
    """Terminal: the client went away; everything that the request held is free."""

    request_id: str


Event = (
    TokensEvent
    | PrefilledEvent
    | PromptLogprobsEvent
    | NeedRowsEvent
    | FinishedEvent
    | FailedEvent
    | AbortedEvent
)


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """Answers CheckIntegrity; ``problem`` is empty when every invariant holds."""

    ticket: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy the engine is, for Describe and metrics; counters count from the start."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    step_seconds: float = 0.0  # Spent in steps.
    prefill_tokens_per_s: float = 0.0  # As measured lately; 0 before the first step.


# ---- state, of the engine's thread alone


class Status(Enum):
    WAITING = "waiting"  # Holds nothing: no pages, no slot, no leases.
    RUNNING = "running"
    FINISHED = "finished"


class GenerationState:
    """One accepted request: its choices, and what is counted over all of them."""

    def __init__(self, request: GenerateRequest, arrival: int, now: float) -> None:
        self.request = request
        self.arrival = arrival  # Number of the request in the order of submission.
        self.sequences: list[Sequence] = []  # Those that began; the first leads, others fork off.
        given = {output.choice: output for output in request.outputs}
        ended = {choice for choice, output in given.items() if output.finished}
        self.ended_tokens = sum(len(given[choice].output_ids) for choice in ended)
        self.open_choices = request.sampling.n - len(ended)
        self._given = {choice: given[choice].output_ids for choice in given.keys() - ended}
        self._unbegun = deque(choice for choice in range(request.sampling.n) if choice not in ended)
        self.span_ends = [span.token_offset + span.num_tokens for span in request.spans]
        self.ending_ids = frozenset(request.sampling.ending_ids)
        self.prompt_logprobs: list[PositionLogprobs] = []  # Collected so far, from token 0.
        self.cached_tokens = 0
        self.found_keys: set[str] = set()  # Items whose rows need no encoder any more.
        self.submitted_at = now
        self.first_chunk_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = now
        self.embedding_wait_s = 0.0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether positions of the prompt are still to be collected."""
        return self.request.sampling.prompt_logprobs is not None and len(
            self.prompt_logprobs
        ) < len(self.request.token_ids)

    def begin(self) -> Sequence | None:
        """The next choice that is to be written, in the order of their numbers; None after the
        last."""
        if not self._unbegun:
            return None
        choice = self._unbegun.popleft()
        seq = Sequence(self, choice, self._given.get(choice, ()))
        self.sequences.append(seq)
        return seq

    def span_at(self, token: int) -> int:
        """Index of the first span that ends after ``token``; len(spans) where none does."""
        return bisect_right(self.span_ends, token)

    def add_prompt_logprobs(
        self, start: int, end: int, found: tuple[PositionLogprobs, ...]
    ) -> None:
        """Appends positions start+1 .. end, of which ``found`` are, up to the prompt's end; without
        those that an earlier run collected. The first token and placeholders have none."""
        known = self.prompt_logprobs
        if not known:
            known.append(PositionLogprobs())
        spans = self.request.spans
        for position in range(len(known), min(end + 1, len(self.request.token_ids))):
            index = self.span_at(position)
            covered = index < len(spans) and spans[index].token_offset <= position
            known.append(PositionLogprobs() if covered else found[position - start - 1])

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
    """State of one choice: what it is, how far it is computed, and what it holds.

    ``request``, ``choice``, ``num_prompt`` and what precedes ``num_tokens`` in ``token_ids`` never
    change; the rest is written by the scheduler and the engine alone. Pages, slot and leases are
    held exactly while ``status`` is RUNNING.
    """

    __slots__ = (
        "block_table",
        "blocked_since",
        "choice",
        "generation",
        "hashes",
        "leases",
        "missing",
        "num_computed",
        "num_prompt",
        "num_shared",
        "order",
        "preemptions",
        "reads_slot",
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
        self.num_computed = 0  # Tokens whose keys and values are in pages.
        self.num_shared = 0  # Leading pages that the prefix cache knows.
        self.block_table: tuple[int, ...] = ()
        self.hashes: list[bytes] = []  # Of leading whole pages, as far as they were wanted.
        self.slot = -1
        self.status = Status.WAITING
        self.leases: dict[str, int] = {}  # Key to the end of its last span.
        self.missing: set[str] = set()  # Keys asked for by NeedRowsEvent and not answered yet.
        self.blocked_since: float | None = None  # When chunks began to wait for rows.
        self.reads_slot = False  # The last token is the one that the slot sampled last.
        self.preemptions = 0

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
        """Why the choice ends with its last token; None: it goes on."""
        sampling = self.request.sampling
        output = len(self.token_ids) - self.num_prompt
        if output > sampling.min_tokens and self.token_ids[-1] in self.generation.ending_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if output >= sampling.max_tokens else None

    def suspend(self) -> None:
        """Forgets what was computed; the caller has released pages, slot and leases."""
        self.num_computed = 0
        self.num_shared = 0
        self.block_table = ()
        self.slot = -1
        self.missing.clear()
        self.blocked_since = None
        self.reads_slot = False
