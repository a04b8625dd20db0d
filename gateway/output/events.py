"""The events of an answer, from which each API writes its own format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from opticnerve.generation.values import Usage

EndReason = Literal["stop", "length", "tool_calls"]
"""The finish reasons of a successful answer, as OpenAI names them."""


class TokenLogprob(NamedTuple):
    """One token, as the bytes that it spells, and the natural log of its probability. ``rank``: 1
    for the most likely."""

    spelled: bytes
    logprob: float
    token_id: int = 0
    rank: int = 1


class TextLogprobs(NamedTuple):
    """The sampled token at one position, and the most likely ones, best first. ``start``: the
    token's position in the choice's text, in characters."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
    start: int = 0


class PromptToken(NamedTuple):
    """A token of a prompt, as the bytes that it spells. ``start``: its position in the prompt's
    text, in characters; 0 if the job does not ask for the text. ``own``: its log-probability; None
    for the first token and those of pictures, which the model does not predict. ``top``: the most
    likely tokens at its position, best first."""

    spelled: bytes
    start: int = 0
    own: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptText:
    """The prompt as text, for jobs that echo it; comes before all other events. ``choice``: the
    first of the choices that continue it."""

    choice: int
    text: str
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The next tokens of the prompt. All of them come before any output of the choices that
    continue the prompt. ``choice``: the first of these."""

    choice: int
    tokens: tuple[PromptToken, ...]
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """More text of a choice. ``logprobs``: one entry per token, which may precede the token's text;
    None if the job asks for none. ``usage``: all choices so far, if the job asks for it."""

    choice: int
    text: str
    logprobs: tuple[TextLogprobs, ...] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers; the fields are those of ``Text``."""

    choice: int
    text: str
    logprobs: tuple[TextLogprobs, ...] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The choice calls a tool. ``index``: from 0, within the choice. The call's arguments follow,
    and no other event of the choice comes between them."""

    choice: int
    index: int
    call_id: str
    name: str
    logprobs: tuple[TextLogprobs, ...] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of the call ``index``: a piece of a JSON object's text."""

    choice: int
    index: int
    text: str
    logprobs: tuple[TextLogprobs, ...] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """A choice is complete. ``stop_reason``: the request's stop string or stop token id that ended
    it; None if the model's end-of-sequence token or the length did."""

    choice: int
    finish_reason: EndReason
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete. ``timings``: milliseconds by stage, as clients see them.
    ``reasoning_tokens``: how many of the output tokens are reasoning."""

    usage: Usage
    timings: Mapping[str, Any]
    reasoning_tokens: int = 0


OutputEvent = Text | Reasoning | ToolCallStart | ToolCallArguments
"""More output of a choice."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids, for jobs that ask for them: the next ids of a choice, before the events of their
    text. With ``of_prompt``: all ids of the prompt, before all other events; ``choice`` is the
    first of the choices that continue it."""

    choice: int
    token_ids: tuple[int, ...]
    of_prompt: bool = False
    usage: Usage | None = None


PromptEvent = PromptText | PromptTokens

AnswerEvent = PromptEvent | TokenIds | OutputEvent | ChoiceEnd | End
