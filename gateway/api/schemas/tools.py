"""Tools that a model may call, and which of them it may or must call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gateway.api.schemas.base import Body, Strict, Unused, fault, no_larger
from gateway.edge.limits import MAX_TOOL_NAME, MAX_TOOLS, MAX_TOOLS_SIZE
from gateway.job import CallMode, Tool, ToolUse

ToolName = Annotated[
    str, Field(max_length=MAX_TOOL_NAME, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]*$")
]


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises PydanticCustomError for a schema that is not an object's."""
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("parameters", "should be the schema of an object")
    return schema


Parameters = Annotated[
    dict[str, Any],
    AfterValidator(check_parameters),
    Field(description="The JSON schema of the arguments; without it, there are none."),
]


class FunctionName(Strict):
    name: ToolName


class Function(FunctionName):
    """A function. ``strict``: its arguments follow ``parameters`` even if the model may choose
    whether to call it; those of ``required`` and named calls always do."""

    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    @property
    def tool(self) -> Tool:
        parameters = {"type": "object", "properties": {}}
        if self.parameters is not None:
            parameters = self.parameters
        return Tool(self.name, self.description or "", parameters, bool(self.strict))


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: Unused = Field(None, description="Has no effect: every prefix is cached.")


class NamedTool(Strict):
    """A call of one function, and nothing else."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(Strict):
    """As without the other tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice
Tools = Annotated[
    list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True), no_larger(MAX_TOOLS_SIZE)
]


def check_names(tools: list[Tool], field: str = "tools") -> None:
    """Raises PydanticCustomError for two tools of one name."""
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise fault(field, "should not have two functions of one name")


class ToolFields(Body):
    """The fields that offer tools. With ``tool_choice: none`` the model does not see them."""

    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(
        None,
        description="none: tools are not shown to the model. required, or a function: the answer "
        "is calls, and a grammar makes their arguments follow the schema. Default: auto.",
    )
    parallel_tool_calls: bool = Field(
        True, description="Whether an answer may have more than one call."
    )

    @model_validator(mode="after")
    def _known_tools(self) -> ToolFields:
        offered = [each.function.tool for each in self.tools or ()]
        check_names(offered)
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return self
        if not offered:
            raise fault("tool_choice", "needs tools")
        names = {tool.name for tool in offered}
        if not {each.function.name for each in _chosen(choice)} <= names:
            raise fault("tool_choice", "should name functions among tools")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """None if the model may call nothing."""
        tools = tuple(each.function.tool for each in self.tools or ())
        choice, mode, name = self.tool_choice, CallMode.AUTO, ""
        if isinstance(choice, str):
            mode = CallMode(choice)
        elif isinstance(choice, NamedTool):
            mode, name = CallMode.NAMED, choice.function.name
        elif isinstance(choice, AllowedToolChoice):
            mode = CallMode(choice.allowed_tools.mode)
            allowed = {each.function.name for each in _chosen(choice)}
            tools = tuple(tool for tool in tools if tool.name in allowed)
        if not tools or mode is CallMode.NONE:
            return None
        return ToolUse(tools, mode, name, self.parallel_tool_calls)


def _chosen(choice: ToolChoice | None) -> list[NamedTool]:
    if isinstance(choice, AllowedToolChoice):
        return choice.allowed_tools.tools
    return [choice] if isinstance(choice, NamedTool) else []
