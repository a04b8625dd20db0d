"""What the answers of all generating APIs share: usage, log-probabilities, and a writer that turns
events into one body or a stream of chunks.

The typed dictionaries are what is sent and what the API's description shows.
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
    Field(description="The stop string or token that ended it; null for the model's own end."),
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
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    content: list[ContentLogprob]
    refusal: str | None


class AnswerHead(TypedDict):
    """What a whole answer and the chunks of a streamed one share."""

    id: str
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    system_fingerprint: Annotated[str | None, Field(description="Of the checkpoint that answered.")]
    timings: NotRequired[
        Annotated[
            dict[str, Any],
            Field(description="Milliseconds by stage; where the request asked for timings."),
        ]
    ]


StreamUsage = Annotated[
    CompletionUsage | None,
    Field(
        description="In the last chunk, where stream_options.include_usage asks; with "
        "continuous_usage_stats in every one, of all choices so far."
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
    """Parts of a character are shown as U+FFFD, and as their bytes."""
    text = token.spelled.decode("utf-8", "replace")
    logprob = max(token.logprob, LEAST_LOGPROB)
    return {"token": text, "logprob": logprob, "bytes": list(token.spelled)}


@dataclass(slots=True)
class WrittenChoice:
    """A choice of a whole answer. ``logprobs``: JSON, as pieces of a list: at a kilobyte a token,
    objects would take ten times as much, and encoding them at the end would hold others up. None
    where none were asked for."""

    logprobs: list[bytes] | None
    texts: list[str] = field(default_factory=list)
    end: ChoiceEnd | None = None

    def add(self, more: Text | ChoiceEnd) -> int:
        """Adds an event; returns the bytes that it takes."""
        if isinstance(more, ChoiceEnd):
            self.end = more
            return 0
        self.texts.append(more.text)
        pieces = [dumps(_content(at)) for at in more.logprobs or ()]
        if self.logprobs is not None:
            self.logprobs += pieces
        return len(more.text) + sum(map(len, pieces))


class AnswerWriter(ABC):
    """The events of one job as one API's JSON; ``body`` for a whole answer, or ``chunks``."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, *, usage: bool = False, timings: bool = False) -> None:
        """``usage``: a stream has it at its end. ``timings``: the answer has them."""
        self.system_fingerprint: str | None = None
        # Whether the choices of a whole answer have log-probabilities, even if the list is empty.
        self.logprobs = False
        self._id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._usage = usage
        self._timings = timings

    # ---- what APIs differ in: a choice as JSON

    def opening(self, choice: int) -> Mapping[str, Any] | None:
        """In the first chunk of a choice, before its text; None for no such chunk."""
        return None

    @abstractmethod
    def text(self, more: Text) -> Mapping[str, Any]:
        """In a chunk with text."""

    @abstractmethod
    def ending(self, end: ChoiceEnd) -> Mapping[str, Any]:
        """In the last chunk of a choice."""

    @abstractmethod
    def whole(self, text: str, end: ChoiceEnd) -> Mapping[str, Any]:
        """In a whole answer; ``logprobs`` is added."""

    # ---- bodies

    async def body(
        self,
        first: AnswerEvent,
        events: AsyncGenerator[AnswerEvent, None],
        hold: Callable[[int], None],
        max_bytes: int,
    ) -> bytes:
        """A whole answer. ``hold`` counts the bytes that are kept until it is complete.

        Raises AnswerTooLarge, Overloaded, and what ``events`` raises.
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
        """A stream's events, and its end. Raises what ``events`` raises."""
        begun: set[int] = set()
        shown = 0  # Output tokens of the chunks so far.
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
            raise EngineFailure("the LLM worker ended the answer before its end")
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
