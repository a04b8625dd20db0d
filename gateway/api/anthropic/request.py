"""The bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gateway.api.anthropic.blocks import AnthropicTurn, TextBlock
from gateway.api.schemas.base import (
    INTEGRAL,
    UNSUPPORTED_KIND,
    Body,
    BoundedList,
    Strict,
    UnsupportedField,
    Unused,
    fault,
    no_larger,
)
from gateway.api.schemas.messages import SHOWN_TOOLS, SWITCHED_THINKING, Effort
from gateway.api.schemas.sampling import SamplingFields, Word
from gateway.api.schemas.tools import CallChoice, ToolName, check_parameters
from gateway.edge.limits import MAX_SCHEMA_CHARACTERS, MAX_STOPS, MAX_TOOLS, MAX_TOOLS_SIZE
from gateway.job import (
    CallMode,
    FormatKind,
    GenerationOptions,
    OutputFormat,
    Tool,
    ToolUse,
)

EFFORT = "output_config.effort"
MODES = {
    "auto": CallMode.AUTO,
    "any": CallMode.REQUIRED,
    "tool": CallMode.NAMED,
    "none": CallMode.NONE,
}


def _own_tool(value: Any) -> Any:
    """Raises PydanticCustomError for a tool that Anthropic defines or runs."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise PydanticCustomError(
            UNSUPPORTED_KIND,
            "tools of type {kind} are not supported by this server; describe a tool of your own "
            "by name, description and input_schema",
            {"kind": kind[:40] if kind.isprintable() else "other than custom"},
        )
    return value


class ClientTool(Strict):
    """A tool that the client runs."""

    type: Literal["custom"] = "custom"
    name: ToolName
    description: str = ""
    input_schema: Annotated[
        dict[str, Any],
        AfterValidator(check_parameters),
        Field(description="The JSON schema of the tool's input."),
    ]
    strict: bool = Field(False, description="Whether the input always follows its schema.")
    cache_control: Unused = Field(None, description="Has no effect: every prefix is cached.")

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.input_schema, self.strict)


ClientTools = Annotated[
    list[Annotated[ClientTool, BeforeValidator(_own_tool)]],
    Field(max_length=MAX_TOOLS, fail_fast=True),
    no_larger(MAX_TOOLS_SIZE),
]


class ToolSelection(Strict):
    """How the answer may use tools; ``none``: the model does not see them. ``name``: the tool's,
    with the type ``tool``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _named(self) -> ToolSelection:
        if self.type == "tool" and self.name is None:
            raise fault("name", "required, with the type tool")
        return self

    @property
    def calls(self) -> CallChoice:
        name = self.name if self.type == "tool" else None
        return CallChoice(MODES[self.type], frozenset() if name is None else frozenset({name}))


class ThinkingSettings(Strict):
    """Whether the model thinks before it answers, if its template lets requests choose."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, INTEGRAL] | None = Field(
        None, description="Has no effect; what the model thinks counts towards max_tokens."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: the answer has no thinking blocks."
    )


class JsonFormat(Strict):
    aliases: ClassVar[frozenset[str]] = frozenset({"schema"})

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], no_larger(MAX_SCHEMA_CHARACTERS)] = Field(
        alias="schema", description="The answer's JSON schema."
    )


class OutputConfig(Strict):
    effort: Effort | None = Field(
        None, description="Sets the chat template's variable reasoning_effort, if it has one."
    )
    format: JsonFormat | None = None


_STATELESS = "this server keeps nothing between requests; send all messages"


class ConversationFields(Body):
    """The fields that make up the prompt."""

    unsupported: ClassVar[Mapping[str, UnsupportedField]] = {
        "container": UnsupportedField((), "this server runs no code"),
        "mcp_servers": UnsupportedField(([],), "describe their tools in tools and call them"),
        "thread": UnsupportedField((), _STATELESS),
        "compaction": UnsupportedField((), _STATELESS),
        "fallbacks": UnsupportedField(([],), "send the request again"),
    }

    model: str = Field(min_length=1)
    messages: Annotated[BoundedList[AnthropicTurn], Field(min_length=1)] = Field(
        description="If the last one is the assistant's, the answer continues it."
    )
    system: str | BoundedList[TextBlock] | None = None
    tools: ClientTools | None = None
    tool_choice: ToolSelection | None = None
    thinking: ThinkingSettings | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(
        None, description="An earlier name of output_config.format."
    )
    cache_control: Unused = Field(None, description="Has no effect: every prefix is cached.")
    context_management: Unused = Field(None, description="Has no effect.")
    speed: str | None = Field(None, description="Has no effect.")
    user_profile_id: Unused = None
    workspace_id: Unused = None

    @model_validator(mode="after")
    def _agrees(self) -> ConversationFields:
        self._selection.calls.check(self._offered)
        if self.output_format and self.output_config and self.output_config.format:
            raise fault("output_format", "excludes output_config.format; give one of them")
        return self

    @property
    def without_effect(self) -> Iterator[str]:
        if "context_management" in self.model_fields_set:
            yield "context_management"
        if self.speed not in (None, "standard"):
            yield "speed"
        if self.thinking is not None:
            yield SWITCHED_THINKING
        if self.thinking and self.thinking.budget_tokens is not None:
            yield "thinking.budget_tokens"
        if self.output_config and self.output_config.effort:
            yield EFFORT
        if self.tool_use is not None:
            yield SHOWN_TOOLS
        yield from super().without_effect

    @property
    def tool_use(self) -> ToolUse | None:
        """None if the model may call nothing."""
        chosen = self._selection
        parallel = not chosen.disable_parallel_tool_use
        return chosen.calls.use(self._offered, parallel=parallel)

    @property
    def _offered(self) -> list[Tool]:
        return [each.tool for each in self.tools or ()]

    @property
    def _selection(self) -> ToolSelection:
        return self.tool_choice or ToolSelection(type="auto")

    @property
    def format(self) -> OutputFormat | None:
        config = self.output_config.format if self.output_config else None
        param = "output_format" if config is None else "output_config.format"
        found = config or self.output_format
        if found is None:
            return None
        return OutputFormat(FormatKind.JSON_SCHEMA, found.json_schema, f"{param}.schema")


class CountTokensRequest(ConversationFields):
    """A conversation whose tokens are counted."""


class MessagesRequest(ConversationFields):
    """A conversation, and how to answer it."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), INTEGRAL] = Field(
        description="The most; the answer also ends where the model's context does."
    )
    stop_sequences: Annotated[list[Word], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), INTEGRAL] | None = None
    metadata: Unused = None
    service_tier: str | None = Field(None, description="Has no effect.")
    inference_geo: Unused = Field(None, description="Has no effect.")
    diagnostics: Unused = Field(None, description="Has no effect.")

    @property
    def without_effect(self) -> Iterator[str]:
        if self.service_tier not in (None, "auto", "standard_only"):
            yield "service_tier"
        for name in ("inference_geo", "diagnostics"):
            if name in self.model_fields_set:
                yield name
        yield from super().without_effect

    @property
    def options(self) -> GenerationOptions:
        sampling = SamplingFields.model_construct(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )
        return GenerationOptions(
            sampling=sampling,
            max_tokens=self.max_tokens,
            shorten_to_fit=True,
            running_usage=self.stream,
            format=self.format,
            tools=self.tool_use,
            reasoning=self.thinking is None or self.thinking.display != "omitted",
        )
