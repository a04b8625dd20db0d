"""Answers of the generating APIs: usage, log-probabilities, and the base of the writers that turn
events into one body or a stream of chunks.

The typed dictionaries describe the JSON that is sent, also for the OpenAPI document.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.http import content
from gateway.api.sse import dumps, failure
from gateway.job import Job
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    OutputEvent,
    Reasoning,
    Text,
    TextLogprobs,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.errors import AnswerTooLarge, EngineFailure, OpticNerveError
from opticnerve.generation.values import Usage

LEAST_LOGPROB = -9999.0  # JSON has no infinity.

StopReason = Annotated[
    str | int | None,
    Field(description="The stop string or token that ended it; null for end-of-sequence."),
]


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    image_tokens: int


class CompletionUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """A token of the answer, and the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    content: list[ContentLogprob]
    refusal: str | None


class AnswerHead(TypedDict):
    """The fields that a whole answer and each chunk of a streamed one share."""

    id: str
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    system_fingerprint: Annotated[str | None, Field(description="Identifies the checkpoint.")]
    timings: NotRequired[
        Annotated[
            dict[str, Any],
            Field(description="Milliseconds by stage, if the request asks for timings."),
        ]
    ]


StreamUsage = Annotated[
    CompletionUsage | None,
    Field(
        description="In the last chunk, with stream_options.include_usage; in every chunk, for all "
        "choices so far, with continuous_usage_stats too."
    ),
]
_TIMINGS_HEADER = {
    "name": "x-opticnerve-timings",
    "in": "header",
    "description": "As `timings` in the body.",
    "schema": {"enum": ["1", "true"]},
}
TIMINGS_HEADER = {"parameters": [_TIMINGS_HEADER]}


def streamed(chunk: Any) -> dict[int | str, dict[str, Any]]:
    """The responses of a route whose answer may be a stream of ``chunk``s."""
    text = "The answer; with `stream`, its chunks as server-sent events, then `[DONE]`."
    return {200: {"description": text, **content("text/event-stream", chunk)}}


def usage_json(usage: Usage) -> CompletionUsage:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.embedding_tokens,
        },
    }


def logprobs_json(logprobs: Iterable[TextLogprobs] | None) -> ChoiceLogprobs | None:
    if logprobs is None:
        return None
    return {"content": [_content(at) for at in logprobs], "refusal": None}


def _content(at: TextLogprobs) -> ContentLogprob:
    return {**_token(at.sampled), "top_logprobs": [_token(token) for token in at.top]}


def _token(token: TokenLogprob) -> TopLogprob:
    """``token`` shows an incomplete character as U+FFFD; ``bytes`` has its bytes."""
    text = token.spelled.decode("utf-8", "replace")
    logprob = max(token.logprob, LEAST_LOGPROB)
    return {"token": text, "logprob": logprob, "bytes": list(token.spelled)}


@dataclass(slots=True)
class WholeCall:
    """A tool call of a whole answer."""

    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)  # Pieces of a JSON object's text.


@dataclass(slots=True)
class WholeChoice:
    """A choice of a whole answer. ``logprobs``: the list's entries as encoded JSON, a kilobyte per
    token: as objects they would take ten times the memory, and encoding all of them at the end
    would block the event loop. None if the request asks for none."""

    logprobs: list[bytes] | None
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[WholeCall] = field(default_factory=list)
    end: ChoiceEnd | None = None

    def add(self, more: OutputEvent | ChoiceEnd) -> int:
        """Adds an event; returns its size: characters of text, bytes of log-probabilities."""
        size = 0
        match more:
            case ChoiceEnd():
                self.end = more
                return 0
            case Text():
                self.texts.append(more.text)
                size = len(more.text)
            case Reasoning():
                self.reasoning.append(more.text)
                size = len(more.text)
            case ToolCallStart():
                self.calls.append(WholeCall(more.call_id, more.name))
                size = len(more.call_id) + len(more.name)
            case ToolCallArguments():
                self.calls[more.index].arguments.append(more.text)
                size = len(more.text)
        pieces = [dumps(_content(at)) for at in more.logprobs or ()]
        if self.logprobs is not None:
            self.logprobs += pieces
        return size + sum(map(len, pieces))


class AnswerWriter(ABC):
    """Writes a job's events in one API's format: ``body`` a whole answer, ``chunks`` a stream."""

    def __init__(self, model: str, *, usage: bool = False, timings: bool = False) -> None:
        """``usage``: whether a stream ends with it. ``timings``: whether the answer has them."""
        self.system_fingerprint: str | None = None
        # Whether the choices of a whole answer have log-probabilities, even if the list is empty.
        self.logprobs = False
        self._created = int(time.time())
        self._model = model
        self._usage = usage
        self._timings = timings

    def begin(self, job: Job) -> None:
        """Called before the first event."""
        self.system_fingerprint = job.system_fingerprint
        self.logprobs = job.options.top_logprobs is not None

    async def body(
        self,
        first: AnswerEvent,
        events: AsyncGenerator[AnswerEvent, None],
        hold: Callable[[int], None],
        max_bytes: int,
    ) -> bytes:
        """A whole answer. ``hold`` counts the bytes that are held until it is complete.

        Raises AnswerTooLarge, Overloaded, and the errors of ``events``.
        """
        choices: dict[int, WholeChoice] = {}
        total = 0
        last = first
        while not isinstance(last, End):
            if last.choice not in choices:
                choices[last.choice] = WholeChoice([] if self.logprobs else None)
            size = choices[last.choice].add(last)
            total += size
            if total > max_bytes:
                raise AnswerTooLarge(
                    f"the answer is larger than {max_bytes} bytes; stream it, ask for fewer "
                    "choices, tokens or top_logprobs, or raise --max-answer-bytes"
                )
            hold(size)
            last = await anext(events)
        if any(choice.end is None for choice in choices.values()):
            raise EngineFailure("the LLM worker ended the generation before a choice had ended")
        return self.whole_answer([choices[index] for index in sorted(choices)], last)

    @abstractmethod
    def whole_answer(self, choices: Sequence[WholeChoice], end: End) -> bytes:
        """The body of a whole answer. Every choice has its ``end``."""

    @abstractmethod
    def chunks(
        self, first: AnswerEvent, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream, with its end. Raises the errors of ``events``."""

    def failure(self, error: OpticNerveError) -> bytes:
        """The end of a stream that fails."""
        return failure(error)

    def timings_of(self, end: End) -> dict[str, Any]:
        """The answer's ``timings``, if the request asks for them."""
        return {"timings": end.timings} if self._timings else {}
