"""``POST /v1/chat/completions``: what a request may say."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, model_validator

from gateway.schemas.base import Many, Strict, at_most, fault, no_larger
from gateway.schemas.count import count_values
from gateway.schemas.messages import ImageSource, Message, Pixels, image_sources
from gateway.schemas.sampling import SamplingFields

Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
OutputLength = Annotated[int, Field(ge=1, le=2**31 - 1)]


MAX_TEMPLATE_KWARGS = 2**14  # Values, and characters of strings.
MAX_ARGUMENT_VALUES = 2**16  # Of all earlier tool calls of a request, as templates see them.


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, json_schema_extra={"const": False})  # Refused.
    include_obfuscation: bool = Field(
        False, description="Padding against traffic analysis; none is added."
    )


class ProcessorSettings(Strict):
    """Bounds for every picture of the request that brings none of its own."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class TemplateFields(Strict):
    """What the chat template sees."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], no_larger(MAX_TEMPLATE_KWARGS)] | None = None
    mm_processor_kwargs: ProcessorSettings | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> TemplateFields:
        said = "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and self.add_generation_prompt and said:
            raise fault("continue_final_message", "excludes add_generation_prompt")
        return self

    @model_validator(mode="after")
    def _bounded_arguments(self) -> TemplateFields:
        """Arguments may be JSON in a string, which is text to who counts the body's values."""
        left = MAX_ARGUMENT_VALUES
        for message in self.messages:
            for call in message.tool_calls or ():
                if isinstance(call.function.arguments, str):
                    left -= count_values(call.function.arguments.encode("utf-8", "replace"), left)
                if left < 0:
                    most = f"should have at most {MAX_ARGUMENT_VALUES} values"
                    raise fault("messages", f"the arguments of all tool_calls {most}")
        return self

    @cached_property
    def images(self) -> tuple[ImageSource, ...]:
        """Every picture, in order. Raises InvalidRequest."""
        settings = self.mm_processor_kwargs or ProcessorSettings()
        return tuple(image_sources(self.messages, settings.min_pixels, settings.max_pixels))


# Unsupported fields have been checked for their neutral values and removed before this model sees
# the body; see gateway.schemas.unsupported.
class ChatRequest(TemplateFields, SamplingFields):
    """A chat to go on with, and how."""

    model: str = Field(min_length=1)
    max_tokens: OutputLength | None = None
    max_completion_tokens: OutputLength | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    priority: Priority = Field(0, description="Lower runs first.")
    cache_salt: str | None = Field(
        None, description="Requests share cached prefixes only with those of the same salt."
    )
    timings: bool = Field(
        False, description="Adds to the answer where its time went; a field of this server."
    )
    user: str | None = None
    metadata: Annotated[dict[str, str], at_most(64)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise fault("max_tokens", "differs from max_completion_tokens; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "needs stream: true")
        return self

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
