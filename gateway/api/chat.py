"""``POST /v1/chat/completions``: continues a chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.answer import (
    TIMINGS_HEADER,
    AnswerHead,
    ChoiceLogprobs,
    PromptLogprobs,
    StopReason,
    WholeChoice,
    logprobs_json,
    streamed,
)
from gateway.api.choice_writer import ChoiceWriter, CompletionUsage, ShownIds, StreamUsage
from gateway.api.routing import Call, make_router
from gateway.api.schemas.base import Unused, fault
from gateway.api.schemas.generate import NumLogprobs, OutputLength
from gateway.api.schemas.structured import StructuredFields
from gateway.api.schemas.template_fields import TemplateFields
from gateway.api.sse import add_json
from gateway.job import GenerationOptions
from gateway.output.events import (
    ChoiceEnd,
    End,
    EndReason,
    OutputEvent,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)

router = make_router("generation")


# Unsupported fields are dropped or refused before this model validates the body: see
# gateway.api.schemas.parsing.
class ChatRequest(TemplateFields, StructuredFields):
    """A chat, and how to continue it."""

    max_tokens: OutputLength | None = None
    max_completion_tokens: OutputLength | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    metadata: Unused = None
    include_reasoning: bool = Field(
        True, description="Whether the answer shows the model's thinking (`reasoning_content`)."
    )
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = Field(
        None, description="Has no effect: every prefix is cached."
    )
    store: bool | None = Field(None, description="Nothing is stored.")
    service_tier: str | None = Field(None, description="Has no effect; see priority.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Has no effect; ask for it in a message."
    )

    echo: bool = Field(
        False,
        description="The answer begins with the text of the last message, if that is the "
        "assistant's.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise fault("max_tokens", "differs from max_completion_tokens; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "needs logprobs: true")
        return self

    @property
    def without_effect(self) -> Iterator[str]:
        if self.store:
            yield "store"
        if self.service_tier not in (None, "auto", "default"):
            yield "service_tier"
        if self.verbosity not in (None, "medium"):
            yield "verbosity"
        yield from super().without_effect

    @property
    def echoed(self) -> str:
        """The text with which the answer begins."""
        last = self.messages[-1]
        return last.text if self.echo and last.role == "assistant" else ""

    @property
    def options(self) -> GenerationOptions:
        options = self.generation_options(
            self.max_completion_tokens or self.max_tokens,
            "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            (self.top_logprobs or 0) if self.logprobs else None,
        )
        return replace(options, tools=self.tool_use, reasoning=self.include_reasoning)


class CalledFunction(TypedDict):
    name: str
    arguments: Annotated[
        str, Field(description="A JSON object's text; its beginning if the answer was cut short.")
    ]


class MessageToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


ReasoningContent = Annotated[str, Field(description="The model's thinking before its answer.")]


class ChatCompletionMessage(TypedDict):
    role: Literal["assistant"]
    content: Annotated[str | None, Field(description="null if there are calls and no text.")]
    refusal: str | None
    reasoning_content: NotRequired[ReasoningContent]
    tool_calls: NotRequired[list[MessageToolCall]]


class ChatCompletionChoice(TypedDict):
    index: int
    message: ChatCompletionMessage
    finish_reason: EndReason
    stop_reason: StopReason
    logprobs: NotRequired[ChoiceLogprobs | None]
    token_ids: NotRequired[ShownIds]


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage
    prompt_logprobs: NotRequired[PromptLogprobs]
    prompt_token_ids: NotRequired[ShownIds]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The arguments of all deltas with one ``index``, together, are the call's."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChoiceDelta(TypedDict):
    role: NotRequired[
        Annotated[Literal["assistant"], Field(description="In a choice's first chunk.")]
    ]
    content: NotRequired[str]
    reasoning_content: NotRequired[ReasoningContent]
    tool_calls: NotRequired[
        Annotated[
            list[ToolCallDelta],
            Field(description="One call: its beginning, or more of its arguments."),
        ]
    ]


class ChunkChoice(TypedDict):
    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: EndReason | None
    stop_reason: NotRequired[StopReason]
    token_ids: NotRequired[ShownIds]


class ChatCompletionChunk(AnswerHead):
    """The data of one event of a streamed answer. The last event's data is ``[DONE]``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: NotRequired[StreamUsage]
    prompt_token_ids: NotRequired[ShownIds]


class ChatWriter(ChoiceWriter):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prompt_ids_by_choice = False
    echoed = ""  # The text with which each choice begins.

    def opening(self, choice: int) -> Mapping[str, Any]:
        return _chunk_choice(choice, {"role": "assistant", "content": self.echoed})

    def output(self, more: OutputEvent) -> ChunkChoice:
        return _chunk_choice(more.choice, _delta(more), logprobs_json(more.logprobs))

    def ending(self, end: ChoiceEnd) -> ChunkChoice:
        """Its ``content`` is an empty string, so that every chunk has a string there."""
        choice = _chunk_choice(end.choice, {"content": ""})
        return {**choice, "finish_reason": end.finish_reason, "stop_reason": end.stop_reason}

    def whole(self, choice: WholeChoice, end: ChoiceEnd) -> ChatCompletionChoice:
        return {
            "index": end.choice,
            "message": _message(choice, self.echoed),
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }

    def whole_answer(self, choices: Sequence[WholeChoice], end: End) -> bytes:
        body = super().whole_answer(choices, end)
        if self.prompt_most is None:
            return body
        entries = b",".join(choices[0].prompt_logprobs)
        return add_json(body, "prompt_logprobs", b"[" + entries + b"]")


def _delta(more: OutputEvent) -> ChoiceDelta:
    match more:
        case Text():
            return {"content": more.text}
        case Reasoning():
            return {"reasoning_content": more.text}
        case ToolCallStart():
            begun: ToolCallDelta = {
                "index": more.index,
                "id": more.call_id,
                "type": "function",
                "function": {"name": more.name, "arguments": ""},
            }
            return {"tool_calls": [begun]}
        case ToolCallArguments():
            return {"tool_calls": [{"index": more.index, "function": {"arguments": more.text}}]}


def _message(choice: WholeChoice, echoed: str) -> ChatCompletionMessage:
    content = "".join([echoed, *choice.texts])
    message: ChatCompletionMessage = {
        "role": "assistant",
        "content": None if choice.calls and not content else content,
        "refusal": None,
    }
    if choice.reasoning:
        message["reasoning_content"] = "".join(choice.reasoning)
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.text},
            }
            for call in choice.calls
        ]
    return message


def _chunk_choice(
    choice: int, delta: ChoiceDelta, logprobs: ChoiceLogprobs | None = None
) -> ChunkChoice:
    return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}


@router.post(
    "/v1/chat/completions",
    summary="Answer a chat about text and pictures",
    response_model=ChatCompletion,
    responses=streamed(ChatCompletionChunk),
    openapi_extra=TIMINGS_HEADER,
)
async def create_chat_completion(call: Call, body: ChatRequest) -> Response:
    writer = call.writer(ChatWriter, body)
    writer.echoed = body.echoed
    job = call.job(body.chat, body.options)
    stream = bool(body.stream)
    del body  # Frees the pictures in its messages once the job drops its prompt.
    return await call.answer(job, writer, stream=stream)
