"""Tools that a model may call, and which of them it may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

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
    """The same as a request without the other tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice
Tools = Annotated[
    list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True), no_larger(MAX_TOOLS_SIZE)
]


def check_names(tools: Sequence[Tool]) -> None:
    """Raises PydanticCustomError for two tools of one name."""
    if len({tool.name for tool in tools}) < len(tools):
        raise fault("tools", "should not have two functions of one name")


class CallChoice(NamedTuple):
    """How an answer may call the tools of a request. ``names``: the only functions that it may
    call; empty: all."""

    mode: CallMode
    names: frozenset[str] = frozenset()

    def check(self, tools: Sequence[Tool]) -> None:
        """Raises PydanticCustomError for two tools of one name, and for a choice of none."""
        check_names(tools)
        if self.mode in (CallMode.REQUIRED, CallMode.NAMED) and not tools:
            raise fault("tool_choice", "needs tools")
        if not self.names <= {tool.name for tool in tools}:
            raise fault("tool_choice", "should name functions among tools")

    def use(self, tools: Sequence[Tool], *, parallel: bool) -> ToolUse | None:
        """None if the model may call nothing."""
        if not tools or self.mode is CallMode.NONE:
            return None
        if self.mode is CallMode.NAMED:
            (name,) = self.names
            return ToolUse(tuple(tools), self.mode, name, parallel)
        allowed = tuple(tool for tool in tools if not self.names or tool.name in self.names)
        return ToolUse(allowed, self.mode, parallel=parallel)


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
        self._choice.check(self._offered)
        return self

    @property
    def _offered(self) -> list[Tool]:
        return [each.function.tool for each in self.tools or ()]

    @property
    def _choice(self) -> CallChoice:
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return CallChoice(CallMode.NAMED, frozenset({choice.function.name}))
        if isinstance(choice, AllowedToolChoice):
            allowed = choice.allowed_tools
            names = frozenset(each.function.name for each in allowed.tools)
            return CallChoice(CallMode(allowed.mode), names)
        return CallChoice(CallMode(choice or CallMode.AUTO))

    @property
    def tool_use(self) -> ToolUse | None:
        """None if the model may call nothing."""
        return self._choice.use(self._offered, parallel=self.parallel_tool_calls)
