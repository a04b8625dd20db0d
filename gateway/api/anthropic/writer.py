"""Writes answers as Anthropic's messages, whole or as a stream of events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from pydantic_core import from_json
from typing_extensions import TypedDict

from gateway.api.answer import (
    AnswerWriter,
    WholeCall,
    WholeChoice,
    WholePart,
    WholeReasoning,
    WholeText,
)
from gateway.api.anthropic.errors import AnthropicError, to_anthropic
from gateway.api.sse import dumps, named_event
from gateway.job import Job
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    OutputEvent,
    PromptEvent,
    Reasoning,
    Text,
    TokenIds,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.errors import EngineFailure, OpticNerveError
from opticnerve.generation.values import Usage

SIGNATURE = "unsigned"
"""A placeholder: clients send thinking back only with a signature. This server verifies none."""
INVALID_JSON = "INVALID_JSON"  # Anthropic's convention for an input that is no JSON object.

EndCause = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class TextContent(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingContent(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Annotated[
        dict[str, Any],
        Field(description="What is no JSON object stands as text under INVALID_JSON."),
    ]


AnswerContent = TextContent | ThinkingContent | ToolUseContent


class OutputTokensDetails(TypedDict):
    thinking_tokens: int


class MessageUsage(TypedDict):
    """The prompt's tokens are the sum of those from and not from the cache."""

    input_tokens: Annotated[int, Field(description="Tokens of the prompt that were not cached.")]
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: Annotated[
        int, Field(description="0: every prefix is cached, and none costs more.")
    ]
    output_tokens_details: NotRequired[
        Annotated[OutputTokensDetails, Field(description="At the end of an answer.")]
    ]


class AnthropicMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerContent]
    stop_reason: EndCause | None
    stop_sequence: str | None
    usage: MessageUsage
    timings: NotRequired[
        Annotated[
            dict[str, Any],
            Field(description="Milliseconds by stage, if the request asks for timings."),
        ]
    ]


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicMessage


class ContentBlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: AnswerContent


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    type: Literal["signature_delta"]
    signature: str


class InputJsonDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class StopCause(TypedDict):
    stop_reason: EndCause
    stop_sequence: str | None


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: StopCause
    usage: MessageUsage
    timings: NotRequired[dict[str, Any]]


class MessageStop(TypedDict):
    type: Literal["message_stop"]


MessageEvent = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | AnthropicError
)


class AnthropicWriter(AnswerWriter):
    """A message of thinking, text and tool calls. Its stream has one block open at a time."""

    def __init__(self, model: str, max_tokens: int, *, timings: bool = False) -> None:
        """``max_tokens``: the request's."""
        super().__init__(model, timings=timings)
        self._id = f"msg_{uuid.uuid4().hex}"
        self._request_id = ""
        self._max_tokens = max_tokens

    def begin(self, job: Job) -> None:
        super().begin(job)
        self._request_id = job.request_id

    def whole_answer(self, choices: Sequence[WholeChoice], end: End) -> bytes:
        (choice,) = choices
        assert choice.end is not None
        content = list(_content(choice.parts))
        cause = self._cause(choice.end, end)
        message = self._message(content, _final_usage(end), cause)
        return dumps({**message, **self.timings_of(end)})

    async def chunks(
        self, first: AnswerEvent, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        usage = Usage() if isinstance(first, End) else first.usage or Usage()
        start = self._message([], _usage(usage))
        yield named_event({"type": "message_start", "message": start})
        blocks = _Blocks()
        ended: ChoiceEnd | None = None
        last = first
        while not isinstance(last, End):
            assert not isinstance(last, PromptEvent | TokenIds)  # Never asked for here.
            if isinstance(last, ChoiceEnd):
                made, ended = blocks.close(), last
            else:
                made = blocks.add(last)
            data = b"".join(map(named_event, made))
            if data:
                yield data
            last = await anext(events)
        if ended is None:
            raise EngineFailure("the LLM worker ended the generation before the answer had ended")
        cause = self._cause(ended, last)
        delta = {"type": "message_delta", "delta": cause, "usage": _final_usage(last)}
        yield named_event({**delta, **self.timings_of(last)})
        yield named_event({"type": "message_stop"})

    def failure(self, error: OpticNerveError) -> bytes:
        return named_event(to_anthropic(error, self._request_id))

    def _message(
        self, content: list[AnswerContent], usage: MessageUsage, cause: StopCause | None = None
    ) -> AnthropicMessage:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": cause["stop_reason"] if cause else None,
            "stop_sequence": cause["stop_sequence"] if cause else None,
            "usage": usage,
        }

    def _cause(self, choice: ChoiceEnd, end: End) -> StopCause:
        """Why the answer ended. With an unreadable call, it does not count as tool_use."""
        if isinstance(choice.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        cause: EndCause = "tool_use" if choice.finish_reason == "tool_calls" else "end_turn"
        if choice.finish_reason == "length":
            whole = end.usage.completion_tokens >= self._max_tokens
            cause = "max_tokens" if whole else "model_context_window_exceeded"
        return {"stop_reason": cause, "stop_sequence": None}


class _Blocks:
    """The blocks of a stream, in order. A text block begins only at the first character that is not
    white space, because clients may not send blank blocks back."""

    def __init__(self) -> None:
        self._kind: type[OutputEvent] | None = None  # Of the last event.
        self._index = -1
        self._is_open = False
        self._blank = ""  # White space that may begin a block of text.

    def add(self, more: OutputEvent) -> Iterator[Mapping[str, Any]]:
        if isinstance(more, ToolCallArguments):
            yield self._delta({"type": "input_json_delta", "partial_json": more.text})
            return
        if isinstance(more, ToolCallStart) or type(more) is not self._kind:
            yield from self.close()
            self._kind = type(more)
        match more:
            case Text():
                yield from self._text(more.text)
            case Reasoning() if more.text:
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": more.text})
            case ToolCallStart():
                yield from self._begin(_tool_use(more.call_id, more.name, {}))

    def close(self) -> Iterator[Mapping[str, Any]]:
        """The end of the open block, if there is one."""
        if self._is_open and self._kind is Reasoning:
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._is_open:
            yield {"type": "content_block_stop", "index": self._index}
        self._is_open, self._blank = False, ""

    def _text(self, text: str) -> Iterator[Mapping[str, Any]]:
        if not self._is_open:
            text = self._blank + text
            self._blank = text if text.isspace() else ""
        if text and not self._blank:
            yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})

    def _begin(self, start: AnswerContent) -> Iterator[Mapping[str, Any]]:
        """Begins a block, unless one is open."""
        if not self._is_open:
            self._is_open, self._index = True, self._index + 1
            yield {"type": "content_block_start", "index": self._index, "content_block": start}

    def _delta(self, delta: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _content(parts: Iterable[WholePart]) -> Iterator[AnswerContent]:
    """The blocks of a whole answer; those of its stream are the same."""
    for part in parts:
        match part:
            case WholeReasoning() if part.text:
                yield {"type": "thinking", "thinking": part.text, "signature": SIGNATURE}
            case WholeText() if part.text.strip():
                yield {"type": "text", "text": part.text}
            case WholeCall(call_id=call_id, name=name):
                yield _tool_use(call_id, name, _input(part.text))


def _tool_use(call_id: str, name: str, called: dict[str, Any]) -> ToolUseContent:
    """A call, with Anthropic's prefix in its id instead of OpenAI's. An id without a prefix is left
    as it is, since the model's template needs that form."""
    if call_id.startswith("call_"):
        call_id = "toolu_" + call_id.removeprefix("call_")
    return {"type": "tool_use", "id": call_id, "name": name, "input": called}


def _input(text: str) -> dict[str, Any]:
    """A call's input. If max_tokens cut it off, the part that was complete."""
    try:
        found = from_json(text, allow_partial=True) if text.strip() else {}
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {INVALID_JSON: text}


def _usage(usage: Usage) -> MessageUsage:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _final_usage(end: End) -> MessageUsage:
    return {
        **_usage(end.usage),
        "output_tokens_details": {"thinking_tokens": end.reasoning_tokens},
    }
