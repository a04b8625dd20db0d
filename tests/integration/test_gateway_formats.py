"""Formats on their way through the gateway: checked first, sent to the worker with the sampling."""

import json

import pytest

from tests.gateways import body, data_url, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]
LOOSE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}


def named(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_grammar_goes_to_the_worker(stream):
    async with stack() as s:
        asked = body(response_format=named({"type": "object"}, strict=True), stream=stream)
        answer = await s.client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200, answer.text
        assert "x-opticnerve-warnings" not in answer.headers
        assert s.llm.starts[0].sampling.grammar.startswith("start: %json {")


async def test_completions_take_formats_too():
    async with stack() as s:
        asked = {"model": "model", "prompt": "It is", "guided_choice": ["red", "blue"]}
        answer = await s.client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        assert s.llm.starts[0].sampling.grammar == 'start: CHOICE\nCHOICE: "red" | "blue"'


async def test_a_bad_schema_is_refused_before_anything_is_encoded():
    async with stack() as s:
        asked = body(user("?", data_url()), response_format=named(LOOSE, strict=True))
        answer = await s.client.post("/v1/chat/completions", json=asked)
        error = answer.json()["error"]
        assert answer.status_code == 400 and "uniqueItems" in error["message"]
        assert error["param"] == "response_format.json_schema.schema"
        assert error["code"] == "invalid_grammar"
        assert not s.llm.starts and not s.encoder.calls and s.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_header_names_what_of_a_schema_is_not_enforced(stream):
    async with stack() as s:
        asked = body(response_format=named(LOOSE), stream=stream)
        answer = await s.client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200, answer.text
        warning = answer.headers["x-opticnerve-warnings"]
        assert warning.startswith("not enforced: ") and "uniqueItems" in warning
        grammar = s.llm.starts[0].sampling.grammar.removeprefix("start: %json ")
        assert json.loads(grammar)["x-guidance"]["lenient"] is True
