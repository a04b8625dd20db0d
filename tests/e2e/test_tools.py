"""Calls that a grammar constrains, on the demo checkpoint, which has never seen a tool."""

import enum
import json

import jsonschema
import openai
import pydantic
import pytest

from tests.e2e.conftest import bundled, user

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 9},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["shape", "sides"],
}
TOOLS = [
    {"type": "function", "function": {"name": "draw", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "wait"}},
]
SCHEMAS = {"draw": {**SCHEMA, "additionalProperties": False}, "wait": {"maxProperties": 0}}
NAMED = {"type": "function", "function": {"name": "draw"}}


def ask(client, stream, **fields):
    """The choices of an answer, whole or put together from its pieces."""
    fields = {
        "model": "model",
        "messages": [user("What is this?", bundled("star.png"))],
        "tools": TOOLS,
        "max_tokens": 400,
        "temperature": 1.5,
        **fields,
    }
    if not stream:
        return client.chat.completions.create(**fields).choices
    with client.chat.completions.stream(**fields) as pieces:
        return pieces.get_final_completion().choices


def check(choice):
    assert not choice.message.content
    for call in choice.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, SCHEMAS[call.function.name])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_arguments_follow_the_schema(client, choice, stream):
    answers = ask(client, stream, tool_choice=choice, n=3, seed=3, parallel_tool_calls=False)
    assert len(answers) == 3
    for answer in answers:
        assert answer.finish_reason == "tool_calls"
        check(answer)
        (call,) = answer.message.tool_calls
        assert choice == "required" or call.function.name == "draw"


def test_several_calls(client):
    answers = ask(client, False, tool_choice="required", n=3, seed=1)
    for answer in answers:
        if answer.finish_reason == "tool_calls":
            check(answer)
    assert any(len(answer.message.tool_calls) > 1 for answer in answers)


def test_a_client_parses_the_arguments(client):
    class Colour(enum.Enum):
        RED = "red"
        BLUE = "blue"

    class Paint(pydantic.BaseModel):
        colours: list[Colour] = pydantic.Field(max_length=3)

    parsed = client.chat.completions.parse(
        model="model",
        messages=[user("Paint it.")],
        tools=[openai.pydantic_function_tool(Paint)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.5,
    )
    (call,) = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Paint)


def test_the_model_may_not_choose_what_it_does_not_see(client):
    with pytest.raises(openai.BadRequestError, match="chat template does not show"):
        ask(client, False)
    raw = client.chat.completions.with_raw_response.create(
        model="model",
        messages=[user("x")],
        tools=TOOLS,
        tool_choice="required",
        max_tokens=1,
    )
    assert "tools (the chat template" in raw.headers["x-opticnerve-warnings"]


def test_a_schema_that_cannot_be_enforced(client):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    function = {"name": "f", "parameters": schema, "strict": True}
    with pytest.raises(openai.BadRequestError, match="not") as caught:
        ask(
            client,
            False,
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
        )
    assert caught.value.param == "tools"
    function["strict"] = False
    answers = ask(
        client,
        False,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        max_tokens=20,
    )
    assert answers[0].message.tool_calls or answers[0].finish_reason == "length"
