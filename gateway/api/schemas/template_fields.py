"""The fields of a chat that its template reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, model_validator

from gateway.api.schemas.base import BoundedList, at_most, fault, no_larger
from gateway.api.schemas.messages import (
    DOCUMENTS,
    REASONING_EFFORT,
    SHOWN_TOOLS,
    Effort,
    ItemSource,
    Message,
    ProcessorSettings,
    check_arguments,
    item_sources,
    rendering_size,
)
from gateway.api.schemas.tools import ToolFields
from gateway.edge.limits import (
    MAX_FIELDS,
    MAX_TEMPLATE_CHARACTERS,
    MAX_TEMPLATE_KWARGS,
)
from gateway.job import ChatPrompt


class TemplateFields(ToolFields):
    """The fields that decide what the chat template renders."""

    messages: Annotated[BoundedList[Message], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], no_larger(MAX_TEMPLATE_KWARGS)] | None = None
    mm_processor_kwargs: ProcessorSettings | None = None
    reasoning_effort: Effort | None = Field(
        None, description="Sets the chat template's variable of that name, if it has one."
    )
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARACTERS)] | None = Field(
        None,
        description="A template instead of the model's own, on servers that allow it "
        "(--allow-request-template).",
    )
    documents: BoundedList[Annotated[dict[str, str], at_most(MAX_FIELDS)]] | None = Field(
        None, description="Sets the chat template's variable of that name, if it has one."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer adds its own special tokens, such as BOS, to those of "
        "the chat template. By default it does where the template writes no BOS.",
    )

    @model_validator(mode="after")
    def _one_ending(self) -> TemplateFields:
        given = "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and self.add_generation_prompt and given:
            raise fault("continue_final_message", "excludes add_generation_prompt")
        return self

    @model_validator(mode="after")
    def _bounded_arguments(self) -> TemplateFields:
        calls = (call for message in self.messages for call in message.tool_calls or ())
        check_arguments("messages", (call.function.arguments for call in calls))
        return self

    @property
    def without_effect(self) -> Iterator[str]:
        if self.chat_template is None:  # Of another template, the variables are not known.
            if self.reasoning_effort not in (None, "none"):
                yield REASONING_EFFORT
            if self.tool_use is not None:
                yield SHOWN_TOOLS
            if self.documents:
                yield DOCUMENTS
        yield from super().without_effect

    @cached_property
    def sources(self) -> tuple[ItemSource, ...]:
        """Every picture, in order. Raises InvalidRequest."""
        settings = self.mm_processor_kwargs or ProcessorSettings()
        return tuple(item_sources(self.messages, settings.min_pixels, settings.max_pixels))

    @property
    def chat(self) -> ChatPrompt:
        """Raises InvalidRequest for pictures that have no usable source."""
        tools = self.tool_use.tools if self.tool_use else ()
        return ChatPrompt(
            messages=self.messages,
            size=rendering_size(
                self.messages, self.chat_template_kwargs, tools, self.documents or ()
            ),
            sources=self.sources,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
            reasoning_effort=self.reasoning_effort,
            tools=tools,
            chat_template=self.chat_template,
            documents=self.documents,
            add_special_tokens=self.add_special_tokens,
        )
