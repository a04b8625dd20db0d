"""What a generation tells the pipeline: plain values, no wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Finish(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float  # Natural log, fp32.
    rank: int  # 1 for the most likely.


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """At one position; ``sampled`` is None where there is no prediction."""

    sampled: TokenLogprob | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice, in order and never twice. ``finish``: set on its last one."""

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. ``timings``: milliseconds by stage, as the worker measured them."""

    usage: Usage
    timings: dict[str, float] = field(default_factory=dict)


Event = Delta | Finished
