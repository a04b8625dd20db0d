"""The settings of a request for a response: functions, the form of its text, reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from gateway.api.responses.items import RUNS_NO_TOOLS
from gateway.api.schemas.base import Strict, Unused, no_larger, unsupported_kind
from gateway.api.schemas.messages import Effort, by_type, type_tag
from gateway.api.schemas.tools import CallChoice, Function, FunctionName
from gateway.edge.limits import MAX_SCHEMA_CHARACTERS, MAX_TOOLS, MAX_TOOLS_SIZE
from gateway.job import CallMode, FormatKind, OutputFormat
from opticnerve.telemetry.logs import printable

FORMAT_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class ResponsesTool(Function):
    type: Literal["function"]
    defer_loading: Unused = None
    allowed_callers: Unused = None
    output_schema: Unused = None


ResponsesTools = Annotated[
    list[ResponsesTool], Field(max_length=MAX_TOOLS, fail_fast=True), no_larger(MAX_TOOLS_SIZE)
]


class ChosenTool(FunctionName):
    """A call of one function, and nothing else."""

    type: Literal["function"]


class AllowedToolList(Strict):
    """The same as a request without the other functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


ResponsesToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[
        Annotated[ChosenTool, Tag("<function>")]
        | Annotated[AllowedToolList, Tag("<allowed_tools>")],
        Discriminator(
            type_tag,
            custom_error_type="tool_choice",
            custom_error_message="should be none, auto, required, or an object with the type "
            "function or allowed_tools",
        ),
    ]
)


def call_choice(choice: ResponsesToolChoice | None) -> CallChoice:
    match choice:
        case ChosenTool(name=name):
            return CallChoice(CallMode.NAMED, frozenset({name}))
        case AllowedToolList(mode=mode, tools=allowed):
            return CallChoice(CallMode(mode), frozenset(each.name for each in allowed))
        case mode:
            return CallChoice(CallMode(mode or CallMode.AUTO))


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    aliases: ClassVar[frozenset[str]] = frozenset({"schema"})

    type: Literal["json_schema"]
    name: str = Field(pattern=FORMAT_NAME)
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(
        None,
        description="Whether a schema that cannot be enforced as a whole is refused. Otherwise a "
        "warning's header names what is not enforced.",
    )


AnyFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_type("format", "text, json_object or json_schema"),
]


class TextSettings(Strict):
    """The form of the answer's text."""

    format: Annotated[AnyFormat, no_larger(MAX_SCHEMA_CHARACTERS)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Has no effect; ask for it in a message."
    )

    @property
    def output_format(self) -> OutputFormat | None:
        form = self.format
        if isinstance(form, JsonObjectFormat):
            return OutputFormat(FormatKind.JSON_OBJECT, None, "text.format")
        if isinstance(form, JsonSchemaFormat):
            kind, strict = FormatKind.JSON_SCHEMA, bool(form.strict)
            return OutputFormat(kind, form.json_schema, "text.format.schema", strict)
        return None


Summary = Literal["auto", "concise", "detailed"]


class ReasoningSettings(Strict):
    effort: Effort | None = Field(
        None, description="Sets the chat template's variable reasoning_effort, if it has one."
    )
    summary: Summary | None = Field(
        None,
        description="With any value, the reasoning itself, unabridged, is the items' summary; "
        "else it is their content.",
    )
    generate_summary: Summary | None = Field(None, description="The older name of summary.")


def check_tools(tools: Any, choice: Any) -> None:
    """Raises UnsupportedFeature for tools that are not functions. Both arguments are fields of the
    body before validation; malformed ones are left to it."""
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        _check_tool(tool, f"tools[{i}]")
    if isinstance(choice, dict) and choice.get("type") != "allowed_tools":
        _check_tool(choice, "tool_choice")


def _check_tool(tool: Any, path: str) -> None:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if isinstance(kind, str) and kind != "function":
        raise unsupported_kind(path, "tools", printable(kind, 40), RUNS_NO_TOOLS)
