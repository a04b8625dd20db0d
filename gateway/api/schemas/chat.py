"""``POST /v1/chat/completions``: what a request may say."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gateway.api.schemas.base import INTEGRAL, Body, Many, Strict, Unused, fault, no_larger
from gateway.api.schemas.count import count_values
from gateway.api.schemas.messages import (
    MAX_ARGUMENT_VALUES,
    ImageSource,
    Message,
    Pixels,
    image_sources,
)
from gateway.api.schemas.sampling import SamplingFields

REASONING_EFFORT = "reasoning_effort"  # As a field, and as a template's variable.
UNLIMITED = -1  # Of max_tokens: what the context leaves.


def _some(length: int) -> int:
    if length < 1 and length != UNLIMITED:
        raise PydanticCustomError(
            "length", "should be greater than or equal to 1, or -1 for no limit"
        )
    return length


Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1), INTEGRAL]
CacheSalt = Annotated[str, Field(max_length=1024)]
OutputLength = Annotated[
    int,
    Field(le=2**31 - 1, json_schema_extra={"anyOf": [{"minimum": 1}, {"const": UNLIMITED}]}),
    AfterValidator(_some),
    INTEGRAL,
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

MAX_TEMPLATE_KWARGS = 2**14  # Values, and characters of strings.


class StreamOptions(Strict):
    """Read where ``stream`` is true, and nowhere else."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        False,
        description="With include_usage: every chunk tells the usage so far, of all choices "
        "together, as the last chunk does.",
    )
    include_obfuscation: bool = Field(
        False, description="Padding against traffic analysis; none is added."
    )


class ProcessorSettings(Strict):
    """Bounds for every picture of the request that brings none of its own."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class TemplateFields(Body):
    """What the chat template sees."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], no_larger(MAX_TEMPLATE_KWARGS)] | None = None
    mm_processor_kwargs: ProcessorSettings | None = None
    reasoning_effort: Effort | None = Field(
        None, description="A variable of the chat template, where that has it."
    )

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

    @property
    def unheeded(self) -> Iterator[str]:
        if self.reasoning_effort not in (None, "none"):
            yield REASONING_EFFORT

    @cached_property
    def images(self) -> tuple[ImageSource, ...]:
        """Every picture, in order. Raises InvalidRequest."""
        settings = self.mm_processor_kwargs or ProcessorSettings()
        return tuple(image_sources(self.messages, settings.min_pixels, settings.max_pixels))


# Unsupported fields have been checked for their neutral values and removed before this model sees
# the body; see gateway.api.schemas.unsupported.
class ChatRequest(TemplateFields, SamplingFields):
    """A chat to go on with, and how."""

    model: str = Field(min_length=1)
    max_tokens: OutputLength | None = None
    max_completion_tokens: OutputLength | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=2**31 - 1), INTEGRAL] | None = None
    priority: Priority | None = Field(
        None,
        description="Lower runs first. From 0 on, or from where the caller's key allows it; a "
        "request that says nothing has 0, or the lowest that its key allows where that is higher.",
    )
    cache_salt: CacheSalt | None = Field(
        None,
        description="Requests share cached prefixes and pictures only with those of the same salt "
        "and, unless the server shares its caches, of the same tenant.",
    )
    timings: bool = Field(
        False, description="Adds to the answer where its time went; a field of this server."
    )
    user: str | None = None
    metadata: Unused = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = Field(None, description="A hint; caches have one rule.")
    store: bool | None = Field(None, description="Nothing is stored.")
    service_tier: str | None = Field(None, description="There is one; see priority.")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Of no effect but medium's; ask for it in a message."
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
    def unheeded(self) -> Iterator[str]:
        if self.store:
            yield "store"
        if self.service_tier not in (None, "auto", "default"):
            yield "service_tier"
        if self.verbosity not in (None, "medium"):
            yield "verbosity"
        options = self.stream_options
        if self.stream and options and options.continuous_usage_stats and not self.stream_usage:
            yield "stream_options.continuous_usage_stats"
        yield from super().unheeded

    @property
    def stream_usage(self) -> bool:
        """Whether a stream tells its usage at its end."""
        options = self.stream_options
        return bool(self.stream) and options is not None and options.include_usage

    @property
    def running_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        options = self.stream_options
        return self.stream_usage and options is not None and options.continuous_usage_stats

    @property
    def output_limit(self) -> int | None:
        """``UNLIMITED`` for no limit, None for the model's default."""
        return self.max_completion_tokens or self.max_tokens
