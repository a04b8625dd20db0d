"""``POST /v1/completions``: continues a text or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.answer import (
    TIMINGS_HEADER,
    AnswerHead,
    CompletionUsage,
    StopReason,
    StreamUsage,
    WholeChoice,
    streamed,
)
from gateway.api.choice_writer import ChoiceWriter
from gateway.api.routing import Call, make_router
from gateway.api.schemas.base import UnsupportedField
from gateway.api.schemas.generate import GenerateFields, OutputLength
from gateway.api.schemas.sampling import TokenId
from gateway.job import GenerationOptions, TextPrompt, TokenPrompt
from gateway.output.events import ChoiceEnd, EndReason, OutputEvent, Text

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for this route.

router = make_router("generation")


def _single(prompt: Any) -> Any:
    """The only entry of a list of prompts. Raises PydanticCustomError for several."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return prompt
    if len(prompt) > 1:
        raise PydanticCustomError("several", "should be one prompt; send a request for each")
    return prompt[0]


Words = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerateFields):
    """A prompt, and how to continue it."""

    unsupported: ClassVar[Mapping[str, UnsupportedField]] = {
        "echo": UnsupportedField((False,), "prepend the prompt yourself"),
        "logprobs": UnsupportedField((), "ask /v1/chat/completions for log-probabilities"),
        "suffix": UnsupportedField(
            ("",), "put what follows into the prompt, in the model's own form"
        ),
    }

    prompt: Annotated[
        Words | TokenIds,
        Field(
            description="Text or token ids. Special tokens in a text are special, except that "
            "placeholders of pictures are text."
        ),
        BeforeValidator(_single, json_schema_input_type=Words | TokenIds),
    ]
    max_tokens: OutputLength | None = Field(None, description="Default: 16.")
    add_special_tokens: bool = Field(
        True, description="Whether the tokenizer adds its own to a text, such as BOS."
    )

    @property
    def source(self) -> TextPrompt | TokenPrompt:
        if isinstance(self.prompt, str):
            return TextPrompt(self.prompt, self.add_special_tokens)
        return TokenPrompt(tuple(self.prompt))

    @property
    def options(self) -> GenerationOptions:
        return self.generation_options(self.max_tokens or DEFAULT_MAX_TOKENS, "max_tokens", None)


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: NotRequired[None]
    finish_reason: EndReason | None
    stop_reason: NotRequired[StopReason]


class Completion(AnswerHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CompletionChunk(AnswerHead):
    """The data of one event of a streamed answer. The last event's data is ``[DONE]``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[StreamUsage]


class CompletionWriter(ChoiceWriter):
    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def output(self, more: OutputEvent) -> CompletionChoice:
        assert isinstance(more, Text)
        return {"index": more.choice, "text": more.text, "logprobs": None, "finish_reason": None}

    def ending(self, end: ChoiceEnd) -> CompletionChoice:
        return {**_ended("", end), "logprobs": None}

    def whole(self, choice: WholeChoice, end: ChoiceEnd) -> CompletionChoice:
        return _ended("".join(choice.texts), end)


def _ended(text: str, end: ChoiceEnd) -> CompletionChoice:
    return {
        "index": end.choice,
        "text": text,
        "finish_reason": end.finish_reason,
        "stop_reason": end.stop_reason,
    }


@router.post(
    "/v1/completions",
    summary="Continue a text, or token ids",
    response_model=Completion,
    responses=streamed(CompletionChunk),
    openapi_extra=TIMINGS_HEADER,
)
async def create_completion(call: Call, body: CompletionRequest) -> Response:
    writer = call.writer(CompletionWriter, body)
    job = call.job(body.source, body.options)
    stream = bool(body.stream)
    del body  # Frees a long prompt once the job drops it.
    return await call.answer(job, writer, stream=stream)
