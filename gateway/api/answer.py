"""Answers of the generating APIs: usage, log-probabilities, and a writer that turns events into one
body or a stream of chunks.

The typed dictionaries describe the JSON that is sent, also for the OpenAPI document.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.http import content
from gateway.api.sse import DONE, dumps, event, with_json
from gateway.output.events import AnswerEvent, ChoiceEnd, End, Text, TextLogprobs, TokenLogprob
from opticnerve.errors import AnswerTooLarge, EngineFailure
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
class WrittenChoice:
    """A choice of a whole answer. ``logprobs``: the list's entries as encoded JSON, a kilobyte per
    token: as objects they would take ten times the memory, and encoding all of them at the end
    would block the event loop. None if the request asks for none."""

    logprobs: list[bytes] | None
    texts: list[str] = field(default_factory=list)
    end: ChoiceEnd | None = None

    def add(self, more: Text | ChoiceEnd) -> int:
        """Adds an event; returns its size: characters of text, bytes of log-probabilities."""
        if isinstance(more, ChoiceEnd):
            self.end = more
            return 0
        self.texts.append(more.text)
        pieces = [dumps(_content(at)) for at in more.logprobs or ()]
        if self.logprobs is not None:
            self.logprobs += pieces
        return len(more.text) + sum(map(len, pieces))


class AnswerWriter(ABC):
    """Writes a job's events as one API's JSON: ``body`` a whole answer, ``chunks`` a stream."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, *, usage: bool = False, timings: bool = False) -> None:
        """``usage``: whether a stream ends with it. ``timings``: whether the answer has them."""
        self.system_fingerprint: str | None = None
        # Whether the choices of a whole answer have log-probabilities, even if the list is empty.
        self.logprobs = False
        self._id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._usage = usage
        self._timings = timings

    # ---- a choice as JSON, which each API defines

    def opening(self, choice: int) -> Mapping[str, Any] | None:
        """The choice in its first chunk, before its text; None for no such chunk."""
        return None

    @abstractmethod
    def text(self, more: Text) -> Mapping[str, Any]:
        """The choice in a chunk with text."""

    @abstractmethod
    def ending(self, end: ChoiceEnd) -> Mapping[str, Any]:
        """The choice in its last chunk."""

    @abstractmethod
    def whole(self, text: str, end: ChoiceEnd) -> Mapping[str, Any]:
        """The choice in a whole answer, without ``logprobs``."""

    # ---- bodies

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
        choices: dict[int, WrittenChoice] = {}
        total = 0
        last = first
        while not isinstance(last, End):
            if last.choice not in choices:
                choices[last.choice] = WrittenChoice([] if self.logprobs else None)
            size = choices[last.choice].add(last)
            total += size
            if total > max_bytes:
                raise AnswerTooLarge(
                    f"the answer is larger than {max_bytes} bytes; stream it, ask for fewer "
                    "choices, tokens or top_logprobs, or raise --max-answer-bytes"
                )
            hold(size)
            last = await anext(events)
        head = {**self._head(self.whole_object), "usage": usage_json(last.usage)}
        encoded = b",".join(self._whole(choices[index]) for index in sorted(choices))
        return with_json({**head, **self._extra(last)}, "choices", b"[" + encoded + b"]")

    async def chunks(
        self, first: AnswerEvent, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream, with its end. Raises the errors of ``events``."""
        begun: set[int] = set()
        shown = 0  # Output tokens in the chunks so far.
        last = first
        while not isinstance(last, End):
            data = b""
            if last.choice not in begun:
                begun.add(last.choice)
                usage = last.usage and replace(last.usage, completion_tokens=shown)
                opening = self.opening(last.choice)
                data = b"" if opening is None else self._chunk(opening, usage)
            choice = self.text(last) if isinstance(last, Text) else self.ending(last)
            yield data + self._chunk(choice, last.usage)
            shown = last.usage.completion_tokens if last.usage else 0
            last = await anext(events)
        if self._usage or self._timings:
            head, usage_at_end = self._head(self.chunk_object), usage_json(last.usage)
            yield event({**head, "choices": [], "usage": usage_at_end, **self._extra(last)})
        yield DONE

    def _whole(self, choice: WrittenChoice) -> bytes:
        if choice.end is None:
            raise EngineFailure("the LLM worker ended the generation before a choice had ended")
        body = self.whole("".join(choice.texts), choice.end)
        if choice.logprobs is None:
            return with_json(body, "logprobs", b"null")
        content = b",".join(choice.logprobs)
        return with_json(body, "logprobs", b'{"content":[' + content + b'],"refusal":null}')

    def _chunk(self, choice: Mapping[str, Any], usage: Usage | None) -> bytes:
        body = {**self._head(self.chunk_object), "choices": [choice]}
        if self._usage:
            body["usage"] = usage and usage_json(usage)
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self.system_fingerprint,
        }

    def _extra(self, end: End) -> dict[str, Any]:
        return {"timings": end.timings} if self._timings else {}
