"""What one generation asks for and answers: plain values, no transport. The gateway's too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from opticnerve.errors import InvalidRequest
from opticnerve.generation.checks import UINT64, check_integer, check_number, read_token_ids

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything that decides a token; neutral defaults. See ``SamplingParams`` in ``llm.proto``.

    ``eos_token_ids``: the ids that end an answer; None: those of the worker's checkpoint, which
    ``LLMClient`` asks it for; (): none. Raises InvalidRequest for values that no message carries.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", "top_k", "n"):
            check_integer(name, getattr(self, name))
        check_integer("seed", self.seed, UINT64)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                check_integer(name, count)
        for name in _NUMBERS:
            check_number(name, getattr(self, name))
        for name in ("stop_token_ids", "allowed_token_ids"):
            read_token_ids(name, getattr(self, name))
        if self.eos_token_ids is not None:
            read_token_ids("eos_token_ids", self.eos_token_ids)
        if not isinstance(self.logit_bias, Mapping):
            kind = type(self.logit_bias).__name__
            raise InvalidRequest(f"logit_bias is {{id: bias}}, not {kind}", param="logit_bias")
        read_token_ids("logit_bias", list(self.logit_bias))
        for bias in self.logit_bias.values():
            check_number("logit_bias", bias)
        for word in self.bad_words:
            read_token_ids("bad_words", word)


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """What was already sent of one choice of a generation that goes on elsewhere."""

    choice: int
    token_ids: tuple[int, ...]
    finished: bool  # It has ended, or nobody wants more of it.


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float  # Natural log, of the raw logits.
    rank: int  # 1 for the most likely.


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """At one position; ``sampled`` is None where there is no prediction."""

    sampled: Logprob | None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice, in order and never twice. ``finish_reason`` is on its last one."""

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    embedding_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end. ``timings``: milliseconds by stage, as the worker measured them; ``preemptions``:
    how often one of its choices gave its KV pages up and was computed again."""

    usage: Usage
    timings: Mapping[str, float] = field(default_factory=dict)
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].token_ids


def join(deltas: list[Delta], usage: Usage, prompt: tuple[PositionLogprobs, ...]) -> Generation:
    """The whole answer that a stream's deltas make."""
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice, []).append(delta)
    choices = tuple(_choice(by_choice[index]) for index in sorted(by_choice))
    return Generation(choices, usage, prompt)


def _choice(deltas: list[Delta]) -> Choice:
    last = deltas[-1]
    return Choice(
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=last.finish_reason or FinishReason.ABORT,
        stop_token_id=last.stop_token_id,
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
    )
