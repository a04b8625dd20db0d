"""Structured output on real processes: the openai client's ``parse``, and a worker that dies in the
middle of an object."""

import json
from typing import Literal

import jsonschema
import pydantic
import pytest

import opticnerve
from tests.e2e.conftest import bundled, user
from tests.e2e.test_faults import write_and_kill

LIST = {
    "type": "object",
    "properties": {
        "names": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{8,12}$"},
            "minItems": 12,
            "maxItems": 12,
        }
    },
    "required": ["names"],
    "additionalProperties": False,
}


class Shape(pydantic.BaseModel):
    kind: Literal["circle", "square", "triangle", "star"]
    color: Literal["red", "green", "blue"]
    sides: int = pydantic.Field(ge=0, le=10)


def test_the_openai_client_parses_answers(client):
    answer = client.chat.completions.parse(
        model="model",
        messages=[user("What do you see?", bundled("star.png"))],
        response_format=Shape,
        temperature=1.5,
        max_tokens=200,
        n=2,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Shape)


def test_a_stream_of_an_object_is_valid(client):
    stream = client.chat.completions.create(
        model="model",
        messages=[user("Say something.")],
        extra_body={"structured_outputs": {"json": LIST}},
        temperature=1.5,
        max_tokens=400,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), LIST)


@pytest.mark.slow
def test_llm_killed_in_the_middle_of_an_object():
    with opticnerve.serve(dtype="float32", llms=2, threads=1) as stack:
        written, before, _ = write_and_kill(
            stack,
            response_format={"type": "json_schema", "json_schema": {"schema": LIST}},
            max_tokens=600,
        )
        assert written.finishes == {0: "stop", 1: "stop", 2: "stop"}
        for index, text in written.texts.items():
            assert text.startswith(before[index])
            jsonschema.validate(json.loads(text), LIST)
        assert any(len(before[index]) < len(text) for index, text in written.texts.items())
