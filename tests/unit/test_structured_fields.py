"""The fields that ask for a form of the answer, of chats and completions alike."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.chat import ChatRequest
from gateway.api.completions import CompletionRequest
from gateway.api.schemas.parsing import parse
from gateway.job import FormatKind, OutputFormat
from opticnerve.errors import InvalidRequest, UnsupportedFeature
from tests.bodies import body

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"name": "pair", "schema": SCHEMA}


def formats(**fields: Any) -> OutputFormat | None:
    """What both routes make of ``fields``."""
    chat, _ = parse(ChatRequest, body(**fields))
    completion, _ = parse(CompletionRequest, {"model": "m", "prompt": "a", **fields})
    assert chat.options.format == completion.options.format
    return chat.options.format


def as_schema(param: str, **changes: Any) -> OutputFormat:
    return OutputFormat(FormatKind.JSON_SCHEMA, SCHEMA, param, **changes)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": {}, "guided_json": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, OutputFormat(FormatKind.JSON_OBJECT, None)),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            as_schema("response_format.json_schema.schema", strict=False),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": True}}},
            as_schema("response_format.json_schema.schema"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
            OutputFormat(FormatKind.JSON_OBJECT, None),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            as_schema("response_format.schema", strict=False),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, as_schema("structured_outputs.json")),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
            as_schema("structured_outputs.json", whitespace=""),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
            as_schema("structured_outputs.json", whitespace=" ?"),
        ),
        (
            {"structured_outputs": {"regex": "a+"}},
            OutputFormat(FormatKind.REGEX, "a+", "structured_outputs.regex"),
        ),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            OutputFormat(FormatKind.CHOICE, ("a", "b"), "structured_outputs.choice"),
        ),
        (
            {"structured_outputs": {"grammar": "start: /a/"}},
            OutputFormat(FormatKind.GRAMMAR, "start: /a/", "structured_outputs.grammar"),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            OutputFormat(FormatKind.JSON_OBJECT, None, "structured_outputs.json_object"),
        ),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"guided_json": json.dumps(SCHEMA)}, as_schema("guided_json")),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            as_schema("guided_json", whitespace=" ?"),
        ),
        ({"guided_json": True}, OutputFormat(FormatKind.JSON_SCHEMA, True, "guided_json")),
        ({"guided_regex": "a+"}, OutputFormat(FormatKind.REGEX, "a+", "guided_regex")),
        ({"guided_choice": ["a"]}, OutputFormat(FormatKind.CHOICE, ("a",), "guided_choice")),
        (
            {"guided_grammar": 'root ::= "a"'},
            OutputFormat(FormatKind.GRAMMAR, 'root ::= "a"', "guided_grammar"),
        ),
    ],
)
def test_every_form_is_one_format(fields: dict[str, Any], expected: OutputFormat | None) -> None:
    assert formats(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "not JSON"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        (
            {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
            "guided_choice",
        ),
    ],
)
def test_faults_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        formats(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "field", [{"structural_tag": "{}"}, {"disable_additional_properties": True}]
)
def test_what_is_not_served_says_what_to_use(field: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        formats(structured_outputs={"json": SCHEMA, **field})
    assert caught.value.param == f"structured_outputs.{next(iter(field))}"
