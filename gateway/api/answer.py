"""Answers of the generating APIs: log-probabilities, and the base of the writers that turn events
into one body or a stream of chunks.

The typed dictionaries describe the JSON that is sent, also for the OpenAPI document.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.http import content
from gateway.api.sse import dumps, failure, ids_json
from gateway.job import Job
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    OutputEvent,
    PromptEvent,
    PromptText,
    PromptToken,
    Reasoning,
    Text,
    TextLogprobs,
    TokenIds,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.errors import AnswerTooLarge, EngineFailure, OpticNerveError

ID_BYTES = 7  # Bytes of a token id in JSON, with its comma.
LEAST_LOGPROB = -9999.0  # JSON has no infinity.

StopReason = Annotated[
    str | int | None,
    Field(description="The stop string or token that ended it; null for end-of-sequence."),
]


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


_TIMINGS_HEADER = {
    "name": "x-opticnerve-timings",
    "in": "header",
    "description": "`1` or `true`: as `timings` in the body. Any other value asks for nothing.",
    "schema": {"type": "string"},
}
TIMINGS_HEADER = {"parameters": [_TIMINGS_HEADER]}


def streamed(
    chunk: Any, stream: str = "its chunks as server-sent events, then `[DONE]`"
) -> dict[int | str, dict[str, Any]]:
    """The responses of a route whose answer may be a stream of ``chunk``s."""
    text = f"The answer; with `stream`, {stream}."
    return {200: {"description": text, **content("text/event-stream", chunk)}}


class PromptLogprob(TypedDict):
    logprob: float
    rank: Annotated[int, Field(description="1 for the most likely.")]
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptLogprob] | None],
    Field(
        description="With `prompt_logprobs`: for each token of the prompt its own log-probability "
        "and those of the most likely ones, by token id; null for the first, and for a picture's."
    ),
]


def prompt_entry(token: PromptToken, most: int) -> dict[str, PromptLogprob] | None:
    """The entry of ``prompt_logprobs`` for one token, with ``most`` of the most likely ones."""
    if token.own is None:
        return None
    return {
        str(each.token_id): {
            "logprob": max(each.logprob, LEAST_LOGPROB),
            "rank": each.rank,
            "decoded_token": each.spelled.decode("utf-8", "replace"),
        }
        for each in (token.own, *token.top[:most])
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


@dataclass(slots=True, kw_only=True)
class WholePart:
    """Consecutive output of one kind in a whole answer. ``logprobs``: entries as encoded JSON,
    about a kilobyte per token. As objects they would take ten times the memory, and encoding them
    all at the end would block the event loop."""

    pieces: list[str] = field(default_factory=list)  # Pieces of its text.
    logprobs: list[bytes] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class WholeText(WholePart):
    pass


class WholeReasoning(WholePart):
    pass


@dataclass(slots=True, kw_only=True)
class WholeCall(WholePart):
    """A tool call; its text is a JSON object, the arguments."""

    call_id: str
    name: str


P = TypeVar("P", bound=WholePart)


@dataclass(slots=True)
class WholeChoice:
    """A choice of a whole answer, as parts in the order in which the model wrote them.
    ``with_logprobs``: whether the request asks for log-probabilities. The first of the choices that
    continue a prompt also has ``prompt_text``, ``prompt_logprobs`` (entries as encoded JSON, each
    with the ``prompt_most`` most likely tokens) and ``prompt_ids`` (a list as encoded JSON)."""

    with_logprobs: bool = False
    prompt_most: int | None = None  # None if the request asks for no log-probabilities of a prompt.
    prompt_text: str = ""
    prompt_logprobs: list[bytes] = field(default_factory=list)
    prompt_ids: bytes = b"[]"
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    parts: list[WholePart] = field(default_factory=list)
    end: ChoiceEnd | None = None

    @property
    def texts(self) -> list[str]:
        return [piece for part in self._of(WholeText) for piece in part.pieces]

    @property
    def reasoning(self) -> list[str]:
        return [piece for part in self._of(WholeReasoning) for piece in part.pieces]

    @property
    def calls(self) -> list[WholeCall]:
        return list(self._of(WholeCall))

    @property
    def logprobs(self) -> list[bytes] | None:
        """An entry per token, in order; None if the request asks for none."""
        entries = [entry for part in self.parts for entry in part.logprobs]
        return entries if self.with_logprobs else None

    def add_ids(self, more: TokenIds) -> int:
        """Adds token ids; returns their size in bytes of JSON."""
        if more.of_prompt:
            self.prompt_ids = ids_json(more.token_ids)
            return len(self.prompt_ids)
        self.token_ids.extend(more.token_ids)
        return len(more.token_ids) * ID_BYTES

    def add_prompt(self, more: PromptEvent) -> int:
        """Adds an event of the prompt; returns its size, as ``add``."""
        if isinstance(more, PromptText):
            self.prompt_text = more.text
            return len(more.text)
        if self.prompt_most is None:
            return 0
        pieces = [dumps(prompt_entry(token, self.prompt_most)) for token in more.tokens]
        self.prompt_logprobs += pieces
        return sum(map(len, pieces))

    def add(self, more: OutputEvent | ChoiceEnd) -> int:
        """Adds an event; returns its size: characters of text, bytes of log-probabilities."""
        size = 0
        match more:
            case ChoiceEnd():
                self.end = more
                return 0
            case Text():
                part = self._last(WholeText) or self._begin(WholeText())
            case Reasoning():
                part = self._last(WholeReasoning) or self._begin(WholeReasoning())
            case ToolCallStart():
                part = self._begin(WholeCall(call_id=more.call_id, name=more.name))
                size = len(more.call_id) + len(more.name)
            case ToolCallArguments():
                part = self.parts[-1]
        if not isinstance(more, ToolCallStart):
            part.pieces.append(more.text)
            size = len(more.text)
        return size + self.add_logprobs(part, more.logprobs or ())

    def add_logprobs(self, part: WholePart, found: Sequence[TextLogprobs]) -> int:
        """Adds the log-probabilities of the part's next tokens; returns their size in bytes."""
        entries = [dumps(_content(at)) for at in found]
        part.logprobs += entries
        return sum(map(len, entries))

    def _of(self, kind: type[P]) -> Iterator[P]:
        return (part for part in self.parts if isinstance(part, kind))

    def _last(self, kind: type[WholePart]) -> WholePart | None:
        """The last part, if it is of this kind."""
        return self.parts[-1] if self.parts and isinstance(self.parts[-1], kind) else None

    def _begin(self, part: WholePart) -> WholePart:
        self.parts.append(part)
        return part


class WholeAnswer:
    """The choices of an answer as they arrive, within a bound on their size."""

    def __init__(
        self,
        logprobs: bool,
        hold: Callable[[int], None],
        max_bytes: int,
        new: Callable[[], WholeChoice] | None = None,
    ) -> None:
        """``logprobs``: whether choices have log-probabilities, even if the list is empty. ``hold``
        counts the bytes that are held until the answer is complete. ``new`` makes a choice of
        another class than WholeChoice."""
        self._new = new or partial(WholeChoice, logprobs)
        self._hold = hold
        self._left = self._max_bytes = max_bytes
        self._choices: dict[int, WholeChoice] = {}

    def add(self, more: PromptEvent | TokenIds | OutputEvent | ChoiceEnd) -> WholeChoice:
        """Adds an event; returns its choice. Raises AnswerTooLarge, Overloaded."""
        choice = self._choices.get(more.choice)
        if choice is None:
            choice = self._choices[more.choice] = self._new()
        if isinstance(more, TokenIds):
            size = choice.add_ids(more)
        else:
            size = choice.add_prompt(more) if isinstance(more, PromptEvent) else choice.add(more)
        self._left -= size
        if self._left < 0:
            raise AnswerTooLarge(
                f"the answer is larger than {self._max_bytes} bytes; ask for fewer choices, tokens "
                "or top_logprobs, stream a chat, or raise --max-answer-bytes"
            )
        self._hold(size)
        return choice

    def ended(self) -> list[WholeChoice]:
        """The choices in order. Raises EngineFailure if one of them has not ended."""
        if any(choice.end is None for choice in self._choices.values()):
            raise EngineFailure("the LLM worker ended the generation before a choice had ended")
        return [self._choices[index] for index in sorted(self._choices)]


class AnswerWriter(ABC):
    """Writes a job's events in one API's format: ``body`` a whole answer, ``chunks`` a stream."""

    def __init__(self, model: str, *, usage: bool = False, timings: bool = False) -> None:
        """``usage``: whether a stream ends with the usage. ``timings``: whether the answer has
        timings."""
        self.system_fingerprint: str | None = None
        # Whether the choices of a whole answer have log-probabilities, even if the list is empty.
        self.logprobs = False
        self.prompt_most: int | None = None  # See WholeChoice.
        self._created = int(time.time())
        self._model = model
        self._usage = usage
        self._timings = timings

    def begin(self, job: Job) -> None:
        """Called before the first event."""
        self.system_fingerprint = job.system_fingerprint
        self.logprobs = job.options.top_logprobs is not None
        self.prompt_most = job.options.prompt_logprobs

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
        answer = WholeAnswer(self.logprobs, hold, max_bytes, self.new_choice)
        last = first
        while not isinstance(last, End):
            answer.add(last)
            last = await anext(events)
        return self.whole_answer(answer.ended(), last)

    def new_choice(self) -> WholeChoice:
        """A choice of a whole answer, to be collected."""
        return WholeChoice(self.logprobs, self.prompt_most)

    @abstractmethod
    def whole_answer(self, choices: Sequence[WholeChoice], end: End) -> bytes:
        """The body of a whole answer. Every choice has its ``end``."""

    @abstractmethod
    def chunks(
        self, first: AnswerEvent, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream, with its end. Raises the errors of ``events``."""

    def failure(self, error: OpticNerveError) -> bytes:
        """The bytes that end a stream that fails."""
        return failure(error)

    def timings_of(self, end: End) -> dict[str, Any]:
        """The answer's ``timings``, if the request asks for them."""
        return {"timings": end.timings} if self._timings else {}
