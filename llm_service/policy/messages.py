"""The commands that the servicer sends to the engine, and the events that it sends back.

All are frozen, picklable and without tensors, so that the engine can run in a thread or in a
separate process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    PositionLogprobs,
    Sampling,
    Timings,
    Usage,
)
from opticnerve.media.plan import Span


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation. ``items`` are content keys; spans index them.

    ``spans`` are in the order of their tokens and do not overlap. ``outputs`` continue a generation
    that began on another worker; a choice that they do not name has no output yet.
    """

    request_id: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    items: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    cache_salt: str = ""
    outputs: tuple[ChoiceOutput, ...] = ()  # At most one per choice.
    skip_prefix_cache: bool = False  # Neither use cached blocks nor add any.
    share: str = ""  # Fair-queueing key; requests with equal keys are scheduled as one client.
    weight: float = 1.0  # Weight of ``share``, relative to other shares.
    # Arrival, in seconds of the engine's clock, which all processes of a machine share. 0: the time
    # when the engine takes the request from its inbox, between two steps.
    received_at: float = field(default=0.0, compare=False)


# ---- servicer -> engine: GenerateRequest, and these


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancels a request. Unknown and ended ones are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RowsReady:
    """The rows of ``key`` are loaded; chunks may use them."""

    key: str


@dataclass(frozen=True, slots=True)
class RowsAvailable:
    """The rows of ``keys`` are available without encoding; the request may be admitted ahead of
    requests that wait for an encoder."""

    request_id: str
    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class RowsFailed:
    """The rows of ``key`` cannot be provided: the request fails with ``error`` if it needs them."""

    request_id: str
    key: str
    error: Exception


@dataclass(frozen=True, slots=True)
class GrammarCompiled:
    """The request's grammar is compiled, or cannot be: sent by the engine's own compiler."""

    request_id: str


@dataclass(frozen=True, slots=True)
class CheckIntegrity:
    """Asks the engine to check its invariants; an IntegrityReport with ``ticket`` answers."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The engine aborts open requests and leaves its loop."""


Command = (
    GenerateRequest
    | Abort
    | RowsReady
    | RowsAvailable
    | RowsFailed
    | GrammarCompiled
    | CheckIntegrity
    | Stop
)


# ---- engine -> servicer


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of one choice."""

    request_id: str
    delta: Delta


@dataclass(frozen=True, slots=True)
class PrefilledEvent:
    """The prompt is computed. Sent once, before the first token of any choice."""

    request_id: str
    cached_tokens: int  # Prompt tokens taken from the prefix cache.
    timings: Timings = field(default_factory=Timings, compare=False)  # Up to the first token.


@dataclass(frozen=True, slots=True)
class PromptLogprobsEvent:
    """Log-probabilities of the next prompt tokens, one entry per token. All are sent before the
    first token of any choice."""

    request_id: str
    positions: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class NeedRowsEvent:
    """Chunks of this request wait for rows that are not loaded.

    Sent when a sequence is admitted, for the keys that its prefix hit does not cover and whose rows
    are not ready, and again if rows are lost later. Each key has to be answered with ``RowsReady``
    or ``RowsFailed``, even if ``RowsReady`` was sent for it before.
    """

    request_id: str
    keys: tuple[str, ...]
    preempted: bool = False  # The sequence that waits was preempted before.


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """Terminal: every choice is finished."""

    request_id: str
    usage: Usage
    timings: Timings  # Without get_ms, which the servicer measures.


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """Terminal: one request failed; ``error`` is an OpticNerveError."""

    request_id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class AbortedEvent:
    """Terminal: the request was cancelled, and its resources are released."""

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
    """How busy the engine is, for Describe and metrics. Counters start with the engine."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0  # In the prefix cache, held by sequences or not.
    evicted_blocks: int = 0  # From the prefix cache, to make room.
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    step_seconds: float = 0.0  # Spent in steps.
    prefill_tokens_per_s: float = 0.0  # Estimated from recent steps; 0 before them.
