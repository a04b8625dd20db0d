"""The fields of a request that offer tools, and what they ask for."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.edge.limits import MAX_TOOL_NAME, MAX_TOOLS, MAX_TOOLS_SIZE
from gateway.job import CallMode, Tool, ToolUse
from tests.bodies import body, chat, refused

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def use(*tools: dict[str, Any], **fields: Any) -> ToolUse | None:
    return chat(tools=list(tools), **fields).tool_use


def test_a_tool_is_what_the_request_says() -> None:
    described = tool("get.weather-2", description="d", parameters=PARAMETERS, strict=True)
    asked = use(described, tool())
    nothing = {"type": "object", "properties": {}}
    expected = (Tool("get.weather-2", "d", PARAMETERS, strict=True), Tool("f", "", nothing))
    assert asked == ToolUse(expected)
    assert chat(tools=[described, tool()]).chat.tools == expected


@pytest.mark.parametrize(
    ("choice", "mode", "name", "names"),
    [
        (None, CallMode.AUTO, "", "fg"),
        ("auto", CallMode.AUTO, "", "fg"),
        ("required", CallMode.REQUIRED, "", "fg"),
        (named("g"), CallMode.NAMED, "g", "fg"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("g")]}},
            CallMode.AUTO,
            "",
            "g",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("f")]}},
            CallMode.REQUIRED,
            "",
            "f",
        ),
    ],
)
def test_choices_of_tools(choice: Any, mode: CallMode, name: str, names: str) -> None:
    for parallel in (True, False):
        asked = use(tool("f"), tool("g"), tool_choice=choice, parallel_tool_calls=parallel)
        assert asked is not None
        assert (asked.mode, asked.name, asked.parallel) == (mode, name, parallel)
        assert "".join(each.name for each in asked.tools) == names


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": named("f"), "tools": []}, "tool_choice", "needs tools"),
        ({"tool_choice": named("h"), "tools": [tool()]}, "tool_choice", "among tools"),
        ({"tool_choice": "any", "tools": [tool()]}, "tool_choice", "should be"),
        ({"tools": [tool(), tool()]}, "tools", "one name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool("")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool("f" * (MAX_TOOL_NAME + 1))]}, "tools[0].function.name", "at most"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "'function'"),
        (
            {"tools": [tool(parameters={"type": "string"})]},
            "tools[0].function.parameters",
            "object",
        ),
        ({"tools": [tool(f"f{i}") for i in range(MAX_TOOLS + 1)]}, "tools", "at most"),
        ({"tools": [tool(description="d" * MAX_TOOLS_SIZE)]}, "tools", "at most"),
    ],
)
def test_tools_that_are_refused(fields: dict[str, Any], param: str, message: str) -> None:
    error = refused(body(**fields))
    assert error.param is not None and error.param.startswith(param)
    assert message in error.message
