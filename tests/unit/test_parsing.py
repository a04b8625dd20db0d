"""Unknown fields, and text that is none: what a body's reader says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.chat import ChatRequest
from gateway.api.schemas.base import Body, Strict
from gateway.api.schemas.messages import call_arguments
from gateway.api.schemas.parsing import parse
from opticnerve.errors import InvalidRequest
from tests.bodies import BASES, MODELS, TEXT, URL, body, chat, read, refused, user

# ---- unknown fields


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_unknown_fields_are_errors_of_bodies_alone(model: type[Strict]) -> None:
    base = BASES.get(model.__name__, {})
    if issubclass(model, Body):
        with pytest.raises(ValueError, match="unheard"):
            model.model_validate({**base, "unheard": 1})
    else:
        assert model.model_validate({**base, "unheard": 1}) == model.model_validate(base)


def test_unknown_fields_of_nested_objects_are_named() -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "a": 1}, "b": None}
    call = {"function": {"name": "f", "c": 1}, "d": 1}
    _, ignored = read(
        user([part], e=1),
        {"role": "assistant", "tool_calls": [call]},
        stream=True,
        stream_options={"f": {"g": 1}},
        mm_processor_kwargs={"h": 1},
    )
    assert set(ignored.unknown) == {
        "messages[0].content[0].image_url.a",
        "messages[0].content[0].b",
        "messages[1].tool_calls[0].function.c",
        "messages[1].tool_calls[0].d",
        "messages[0].e",
        "stream_options.f",
        "mm_processor_kwargs.h",
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_tokns", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("temprature", "temperature"),
        ("respones_format", "response_format"),
        ("message", "messages"),
    ],
)
def test_an_unknown_field_of_a_body_names_the_nearest(name: str, nearest: str) -> None:
    error = refused(json.dumps({**body(), name: None}))
    assert (error.param, error.code) == (name, "unknown_field")
    assert error.message == f"{name}: unknown field (did you mean {nearest}?)"


def test_an_unknown_field_that_is_near_to_none() -> None:
    assert refused(body(zzzzzz=1)).message == "zzzzzz: unknown field"
    assert refused(body(colour=1, max_tokns=1)).code == "unknown_field"


# ---- text that is none


def test_a_byte_order_mark_is_no_text() -> None:
    raw = json.dumps(body()).encode()
    assert parse(ChatRequest, b"\xef\xbb\xbf" + raw) == parse(ChatRequest, raw)
    assert refused(b"\xef\xbb\xbf").code == "invalid_json"


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": HALF}, "model"),
        ({"user": f"a{HALF}"}, "user"),
        ({"stop": ["a", HALF]}, "stop[1]"),
        ({"bad_words": [HALF]}, "bad_words[0]"),
        ({"messages": [user(HALF)]}, "messages[0].content"),
        ({"messages": [user([TEXT, {"type": "text", "text": f"\udc00{HALF}"}])]},
         "messages[0].content[1].text"),
        ({"chat_template_kwargs": {"a": {"b": HALF}}}, "chat_template_kwargs.a.b"),
        ({"chat_template_kwargs": {HALF: 1}}, "chat_template_kwargs"),
        ({"metadata": {"x": [HALF]}}, "metadata.x[0]"),
        ({"response_format": {"type": HALF}}, "response_format.type"),
        ({HALF: 1}, None),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_told_where_it_is(
    fields: dict[str, Any], param: str | None
) -> None:
    for halves in ("\\ud83d", "\\udc00\\ud83d", "\\uDBFF"):
        raw = json.dumps({**body(), **fields}).replace("\\ud83d", halves)
        error = refused(raw.encode())
        assert (error.param, error.code) == (param, "invalid_json")
        assert "half of a surrogate pair" in error.message
        assert error.message.startswith(f"{param}: " if param else "the name of a field ")
        error.message.encode()


@pytest.mark.parametrize("depth", [150, 500, 900, 100_000])
def test_half_a_surrogate_pair_deep_within(depth: int) -> None:
    raw = '{"metadata": ' + "[" * depth + '"\\ud83d"' + "]" * depth + "}"
    assert refused(raw.encode()).code == "invalid_json"


def test_pairs_are_characters() -> None:
    assert chat(user("\U0001f600")).messages[0].content == "\U0001f600"  # As json.dumps writes it.
    assert refused(b'{"model": "\\ud83d\\ude00", ').code == "invalid_json"


def test_half_a_surrogate_pair_in_arguments() -> None:
    """They are JSON in a string, in which the half is an escape that the body's parser passes."""
    call = {"function": {"name": "f", "arguments": '{"a": ["\\ud83d"]}'}}
    request = chat(user(), {"role": "assistant", "tool_calls": [call]})
    with pytest.raises(InvalidRequest, match="half of a surrogate pair") as caught:
        call_arguments(request.messages[1].tool_calls[0], "messages[1].tool_calls[0]")  # type: ignore[index]
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments.a[0]"
