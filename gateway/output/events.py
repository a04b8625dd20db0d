"""What an answer is made of while it is written, whatever API shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from opticnerve.generation.values import Usage


class TokenLogprob(NamedTuple):
    """One token by the bytes that it spells, and the natural log of its probability."""

    spelled: bytes
    logprob: float


class TextLogprobs(NamedTuple):
    """At one position of a text: the sampled token, and the most likely ones, best first."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """More text of a choice. ``logprobs``: one entry a token, which may come before its text; None
    where none were asked for. ``usage``: that of all choices so far, where the job asks for it."""

    choice: int
    text: str
    logprobs: tuple[TextLogprobs, ...] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """A choice is complete. ``stop_reason``: the stop string, or the stop token id of the request,
    that ended it; None for the model's own end."""

    choice: int
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete. ``timings``: milliseconds by stage, as clients are shown them."""

    usage: Usage
    timings: Mapping[str, Any]


AnswerEvent = Text | ChoiceEnd | End
