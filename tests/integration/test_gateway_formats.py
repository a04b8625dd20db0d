"""Formats on their way through the gateway: checked first, sent to the worker with the sampling."""

import json
import threading

import pytest

from opticnerve.generation.grammars import grammar_error
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


async def test_what_a_worker_finds_is_about_the_field_that_the_client_sent():
    async def fail(llm, index):
        raise grammar_error("Parser Error: too many items")

    async with stack() as s:
        s.llm.step = fail
        asked = body(response_format=named({"type": "object"}))
        answer = await s.client.post("/v1/chat/completions", json=asked)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_grammar")
        assert error["param"] == "response_format.json_schema.schema"
        assert error["message"] == f"{error['param']}: Parser Error: too many items"


async def test_a_format_waits_no_longer_than_its_request(monkeypatch):
    go = threading.Event()
    monkeypatch.setattr("gateway.grammar.grammar_of", lambda format: go.wait() and "start: /a/")
    async with stack(request_timeout_s=0.3) as s:
        asked = body(response_format=named({"type": "object"}))
        try:
            answer = await s.client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 504 and not s.llm.starts
        finally:
            go.set()


async def test_a_format_that_calls_make_void_is_named():
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with stack() as s:
        asked = body(response_format=named({}), tools=tools, tool_choice="required")
        answer = await s.client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200, answer.text
        warning = answer.headers["x-opticnerve-warnings"]
        assert "response_format.json_schema.schema (tool_choice" in warning
