"""The body of a request for a response, and the job that it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gateway.api.responses.items import InputItem, check_calls, check_supported
from gateway.api.responses.settings import (
    ReasoningSettings,
    ResponsesToolChoice,
    ResponsesTools,
    TextSettings,
    call_choice,
    check_tools,
)
from gateway.api.responses.transcript import Transcript
from gateway.api.schemas.base import (
    INTEGRAL,
    BoundedList,
    UnsupportedField,
    at_most,
    fault,
    no_larger,
)
from gateway.api.schemas.generate import GenerateFields, OutputLength
from gateway.api.schemas.messages import (
    SHOWN_TOOLS,
    ProcessorSettings,
    rendering_size,
)
from gateway.edge.limits import (
    MAX_LABEL,
    MAX_METADATA,
    MAX_METADATA_KEY,
    MAX_METADATA_VALUE,
    MAX_TEMPLATE_KWARGS,
)
from gateway.job import ChatPrompt, GenerationOptions, Tool, ToolUse

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Number = Annotated[int, Field(ge=0, le=2**31 - 1), INTEGRAL]
Label = Annotated[str, Field(max_length=MAX_LABEL)]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=MAX_METADATA_KEY)],
        Annotated[str, Field(max_length=MAX_METADATA_VALUE)],
    ],
    at_most(MAX_METADATA),
]

_EARLIER = "this server keeps no responses: send the earlier items in input, before the new ones"
_UNSUPPORTED = {
    "previous_response_id": UnsupportedField((), _EARLIER),
    "conversation": UnsupportedField((), _EARLIER),
    "store": UnsupportedField(
        (False,),
        "this server keeps no responses: send store: false, keep the items of input and output, "
        "and send them again in the next request's input",
    ),
    "background": UnsupportedField((False,), "leave it out, and stream the answer"),
    "prompt": UnsupportedField((), "send the prompt's text in instructions and input"),
    "truncation": UnsupportedField(("disabled",), "leave out the first items of a long input"),
    "context_management": UnsupportedField(([],), "leave out the first items of a long input"),
    "image": UnsupportedField(
        ({"context_compression": "auto"}, {"context_compression": "disabled"}),
        "set detail, or max_pixels, of each picture",
    ),
    "access_programs": UnsupportedField((), "leave it out"),
    "messages": UnsupportedField((), "use input, or send them to /v1/chat/completions"),
    "max_tokens": UnsupportedField((), "use max_output_tokens"),
    "max_completion_tokens": UnsupportedField((), "use max_output_tokens"),
    "response_format": UnsupportedField(({"type": "text"},), "use text.format"),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        UnsupportedField((), "use text.format for a JSON schema, or /v1/chat/completions"),
    ),
    "reasoning_effort": UnsupportedField((), "use reasoning.effort"),
    "verbosity": UnsupportedField(("medium",), "use text.verbosity"),
    "logprobs": UnsupportedField((False,), f'use include: ["{LOGPROBS}"]'),
    "prompt_logprobs": UnsupportedField((), "use /v1/chat/completions"),
    "return_token_ids": UnsupportedField((False,), "use /v1/chat/completions"),
}


class ResponsesRequest(GenerateFields):
    """Items, and how to answer them. Nothing is kept: every request has the whole conversation."""

    unsupported: ClassVar[Mapping[str, UnsupportedField]] = _UNSUPPORTED

    input: str | Annotated[BoundedList[InputItem], Field(min_length=1)] = Field(
        description="A user's text, or the items of the conversation in order."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: OutputLength | None = None
    n: Annotated[int, Field(ge=1, le=1), INTEGRAL] | None = Field(
        None, description="A response is one answer."
    )
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    tools: ResponsesTools | None = None
    tool_choice: ResponsesToolChoice | None = None
    parallel_tool_calls: bool = True
    max_tool_calls: Number | None = Field(
        None, description="Bounds tools that a server runs: has no effect."
    )
    include: BoundedList[Includable] | None = Field(
        None, description=f"{LOGPROBS}: log-probabilities. The others have no effect."
    )
    top_logprobs: Number | None = Field(None, description=f"Needs {LOGPROBS} in include.")
    metadata: Metadata | None = Field(None, description="Repeated in the answer.")
    chat_template_kwargs: Annotated[dict[str, Any], no_larger(MAX_TEMPLATE_KWARGS)] | None = None
    mm_processor_kwargs: ProcessorSettings | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: str | None = Field(
        None, description="Has no effect: every prefix is cached."
    )
    service_tier: str | None = Field(None, description="Has no effect; see priority.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_supported(value.get("input"))
            check_tools(value.get("tools"), value.get("tool_choice"))
        return value

    @model_validator(mode="after")
    def _known_tools(self) -> ResponsesRequest:
        call_choice(self.tool_choice).check(self._offered)
        return self

    @model_validator(mode="after")
    def _readable(self) -> ResponsesRequest:
        """Checks that the input can be translated. Done in validation, where a long input does not
        block the event loop."""
        if not isinstance(self.input, str):
            check_calls("input", {f"input[{i}]": item for i, item in enumerate(self.input)})
        if not self.transcript.messages:
            raise fault("input", "holds nothing to answer; send a message")
        return self

    @property
    def without_effect(self) -> Iterator[str]:
        for i, name in enumerate(self.include or ()):
            if name != LOGPROBS:
                yield f"include[{i}]"
        if self.top_logprobs and not self.wants_logprobs:
            yield "top_logprobs"
        if self.service_tier not in (None, "auto", "default"):
            yield "service_tier"
        if self.text and self.text.verbosity not in (None, "medium"):
            yield "text.verbosity"
        if self.reasoning and self.reasoning.effort not in (None, "none"):
            yield "reasoning.effort"
        if self.tool_use is not None:
            yield SHOWN_TOOLS
        yield from super().without_effect

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether reasoning is shown as a summary."""
        asked = self.reasoning
        return asked is not None and bool(asked.summary or asked.generate_summary)

    @cached_property
    def transcript(self) -> Transcript:
        """Raises InvalidRequest."""
        transcript = Transcript(self.instructions, self.mm_processor_kwargs or ProcessorSettings())
        transcript.read(self.input)
        return transcript

    @property
    def _offered(self) -> tuple[Tool, ...]:
        return tuple(tool.tool for tool in self.tools or ())

    @property
    def tool_use(self) -> ToolUse | None:
        """None if the model may call nothing; it then sees no tools either."""
        return call_choice(self.tool_choice).use(self._offered, parallel=self.parallel_tool_calls)

    @property
    def prompt(self) -> ChatPrompt:
        messages = self.transcript.messages
        tools = () if self.tool_use is None else self._offered
        return ChatPrompt(
            messages=messages,
            size=rendering_size(messages, self.chat_template_kwargs, tools),
            sources=tuple(self.transcript.sources),
            chat_template_kwargs=self.chat_template_kwargs,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            tools=tools,
        )

    @property
    def options(self) -> GenerationOptions:
        top_logprobs = (self.top_logprobs or 0) if self.wants_logprobs else None
        options = self.generation_options(self.max_output_tokens, "max_output_tokens", top_logprobs)
        form = self.text.output_format if self.text else None
        return replace(options, format=form, tools=self.tool_use)
