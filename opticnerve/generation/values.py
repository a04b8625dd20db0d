"""The vocabulary of generation, shared by gateway, clients and engine: plain values.

Knows no transport and no tensors; ``opticnerve.rpc.convert`` turns these values into the messages
of ``llm.proto`` and back. Everything here is frozen and can be pickled. Numbers and token ids that
no message can carry are refused here, with the field's name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

from opticnerve.errors import InvalidRequest

UINT32 = 2**32 - 1
UINT64 = 2**64 - 1
MAX_BIAS = 1e30  # Dividing it by any temperature stays within fp32.
MAX_CHOICES = 128
MAX_GRAMMAR_BYTES = 2**20
MIN_WEIGHT, MAX_WEIGHT = 0.01, 1000.0  # Of an API key's share of the workers.


# ---- checks


def check_integer(name: str, value: Any, most: int = UINT32) -> None:
    """Raises InvalidRequest unless ``value`` is an integer from 0 to ``most``."""
    try:
        number = operator.index(value)
    except TypeError as error:
        kind = type(value).__name__
        raise InvalidRequest(f"{name} is an integer, not {kind}", param=name) from error
    if not 0 <= number <= most:
        raise InvalidRequest(f"{name} is from 0 to {most}, not {value}", param=name)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    or_zero: bool = False,
) -> None:
    """Raises InvalidRequest unless ``value`` is a real number from ``low`` to ``high``; NaN is in
    no range."""
    if not isinstance(value, (int, float, Real)):
        raise InvalidRequest(f"{name} is a number, not {type(value).__name__}", param=name)
    number: Any = value
    if not (low <= number <= high or (or_zero and number == 0)):
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}", param=name)


def read_token_ids(name: str, ids: object) -> tuple[int, ...]:
    """The token ids in any sequence or one-dimensional array.

    Raises InvalidRequest unless all are integers that a message can carry, and for a single
    integer, text, bytes and mappings, which are not sequences of token ids.
    """
    if isinstance(ids, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(
        ids, Iterable
    ):
        kind = type(ids).__name__
        raise InvalidRequest(f"{name} is a sequence of token ids, not {kind}", param=name)
    try:
        found = tuple(map(operator.index, ids))
    except TypeError as error:
        raise InvalidRequest(f"{name} holds token ids, which are integers", param=name) from error
    for extreme in (min(found, default=0), max(found, default=0)):
        if not 0 <= extreme <= UINT32:
            raise InvalidRequest(f"{extreme} in {name} is no token id", param=name)
    return found


def _check_biases(name: str, biases: object) -> None:
    """Raises InvalidRequest unless ``biases`` are numbers within MAX_BIAS of 0, by token id."""
    if not isinstance(biases, Mapping):
        raise InvalidRequest(f"{name} is {{id: bias}}, not {type(biases).__name__}", param=name)
    read_token_ids(name, tuple(biases))
    for bias in biases.values():
        check_number(name, bias, -MAX_BIAS, MAX_BIAS)


def _check_words(name: str, words: Iterable[object]) -> None:
    """Raises InvalidRequest unless each of ``words`` is a sequence of one token id or more."""
    for word in words:
        if not read_token_ids(name, word):
            raise InvalidRequest(f"a word of {name} has at least one token", param=name)


def _check_grammar(name: str, grammar: object) -> None:
    """Raises InvalidRequest unless ``grammar`` is a text of at most MAX_GRAMMAR_BYTES."""
    if not isinstance(grammar, str):
        raise InvalidRequest(f"{name} is a text, not {type(grammar).__name__}", param=name)
    if len(grammar.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{name} is longer than {MAX_GRAMMAR_BYTES} bytes", param=name)


# ---- values

# How a field of Sampling is declared: its default, and in its metadata
#   "check": raises InvalidRequest for a value that is not allowed, given the field's name
#   "zero_is_off": 0 in a message stands for the neutral default
#   "model_default": a checkpoint's generation_config.json may give another default


def _checked(default: Any, check: Callable[[str, Any], object], **metadata: bool) -> Any:
    return field(default=default, metadata={"check": check, **metadata})


def _integer(default: int, most: int = UINT32, **metadata: bool) -> Any:
    return _checked(default, partial(check_integer, most=most), **metadata)


def _number(default: float, low: float, high: float, **metadata: bool) -> Any:
    check = partial(check_number, low=low, high=high, or_zero="zero_is_off" in metadata)
    return _checked(default, check, **metadata)


def _optional(check: Callable[[str, Any], object]) -> Any:
    return _checked(None, lambda name, value: value is None or check(name, value))


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything that decides which token is sampled; the defaults are neutral. ``SamplingParams``
    in ``llm.proto`` says what each field means.

    ``eos_token_ids``: the ids that end an answer; None: those of the worker's checkpoint, which
    ``LLMClient`` asks the worker for; (): none. Raises InvalidRequest for a value out of its range,
    with the field's name.
    """

    max_tokens: int = _integer(16)
    min_tokens: int = _integer(0)
    temperature: float = _number(0.0, 0.0, 100.0, model_default=True)
    top_p: float = _number(1.0, 0.0, 1.0, model_default=True, zero_is_off=True)
    top_k: int = _integer(0, model_default=True)
    min_p: float = _number(0.0, 0.0, 1.0, model_default=True)
    frequency_penalty: float = _number(0.0, -100.0, 100.0)
    presence_penalty: float = _number(0.0, -100.0, 100.0)
    repetition_penalty: float = _number(1.0, 1e-3, 100.0, model_default=True, zero_is_off=True)
    seed: int = _integer(0, UINT64)
    n: int = _integer(1, zero_is_off=True)
    stop_token_ids: tuple[int, ...] = _checked((), read_token_ids)
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] | None = _optional(read_token_ids)
    logprobs: int | None = _optional(check_integer)
    prompt_logprobs: int | None = _optional(check_integer)
    logit_bias: Mapping[int, float] = field(default_factory=dict, metadata={"check": _check_biases})
    bad_words: tuple[tuple[int, ...], ...] = _checked((), _check_words)
    allowed_token_ids: tuple[int, ...] = _checked((), read_token_ids)
    grammar: str = _checked("", _check_grammar)

    def __post_init__(self) -> None:
        for name, check in _CHECKS:
            check(name, getattr(self, name))

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """The token ids that end a choice once it has ``min_tokens``."""
        eos = () if self.ignore_eos else self.eos_token_ids or ()
        return (*self.stop_token_ids, *eos)


_CHECKS = tuple(
    (each.name, each.metadata["check"]) for each in fields(Sampling) if "check" in each.metadata
)


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """What a client already has of one choice, when a generation is resumed on another worker.

    It counts as output and is not sent again. ``finished``: the choice has ended, or nobody wants
    more of it; no more is generated.
    """

    choice: int
    output_ids: tuple[int, ...] = ()
    finished: bool = False


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Logprob(NamedTuple):
    """A NamedTuple for its size: an answer may hold twenty for each token."""

    token_id: int
    logprob: float  # Natural log of the probability under the raw logits.
    rank: int  # 1 for the most likely.


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities at one position.

    ``sampled``: that of the token at this position; None where there is no prediction (the first
    prompt token, or a placeholder). ``top``: the k most likely, best first.
    """

    sampled: Logprob | None = None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """Log-probabilities of the next prompt tokens. Every token has one, in order, and all come
    before the first token of an answer."""

    logprobs: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice, in order and never twice, including the one that ended it.

    ``first_index``: output position of ``token_ids[0]``. ``finish_reason`` is set on the choice's
    last delta, which may have no tokens; ``stop_token_id`` with STOP, unless a grammar ended it.
    """

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()  # One for each token, or none at all.
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0  # Of all choices.
    cached_tokens: int = 0  # Prompt tokens taken from the prefix cache.
    embedding_tokens: int = 0  # Placeholder tokens of the prompt.


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds by stage, measured by the worker. ``preemptions``: how often a choice gave up
    its KV blocks and was computed again."""

    queue_ms: float = 0.0
    embedding_wait_ms: float = 0.0
    get_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    preemptions: int = 0

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds by the name of the stage."""
        return {
            each.name.removesuffix("_ms"): getattr(self, each.name)
            for each in fields(self)
            if each.name.endswith("_ms")
        }


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a generation that succeeded."""

    usage: Usage
    timings: Timings = Timings()


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
        """The first choice's."""
        return self.choices[0].token_ids


def whole_answer(
    deltas: list[Delta], usage: Usage, prompt: tuple[PositionLogprobs, ...]
) -> Generation:
    """Puts the deltas of a stream together to a whole answer."""
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
