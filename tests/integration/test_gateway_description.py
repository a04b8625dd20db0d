"""/openapi.json says what the gateway does: its routes, what they take and what they answer."""

import json
import re

import jsonschema
import pytest
from starlette.routing import WebSocketRoute

from gateway.api.schemas.parsing import UNSUPPORTED
from gateway.app import Api
from opticnerve.config import TelemetryConfig
from tests.gateways import body, data_url, events, keys_of, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]

ON_THE_GATEWAYS_PORT = TelemetryConfig(metrics_port=-1)
OWN_PORT = TelemetryConfig(metrics_port=0)
REALTIME = "/v1/realtime"  # A WebSocket: a request that is no handshake is refused.
PATHS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/apply_template",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/v1/tokenize",
    "/v1/detokenize",
    "/v1/tokenizer_info",
    REALTIME,
    "/v1/models",
    "/v1/models/{name}",
    "/health",
    "/live",
    "/ready",
    "/version",
    "/metrics",
    "/",
    "/openapi.json",
    "/docs",
}
FULL_RESPONSE = {
    "model": "model",
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "What?"}]}],
    "instructions": "Be brief.",
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
    "timings": True,
    "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
    "tool_choice": "none",
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
}
OPEN = {"/health", "/live", "/ready", "/", "/openapi.json", "/docs"}


async def describe(s):
    answer = await s.client.get("/openapi.json")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    return answer.json()


def operations(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for held in value.values():
            yield from references(held)
    elif isinstance(value, list):
        for held in value:
            yield from references(held)


def conforms(document, instance, schema):
    """Whether JSON is what a schema of the document says, and no more than that."""
    closed = json.loads(json.dumps(document))
    for model in closed["components"]["schemas"].values():
        if model["type"] == "object":
            model.setdefault("additionalProperties", False)
    check = jsonschema.Draft202012Validator({**schema, "components": closed["components"]})
    check.validate(instance)
    return True


def answered(document, answer, path, media_type="application/json"):
    """The schema that the document has for an answer's status."""
    (operation,) = document["paths"][path].values()
    status = str(answer.status_code)
    responses = operation["responses"]
    found = responses.get(status) or responses[f"{status[0]}XX"]
    return found["content"][media_type]["schema"]


async def test_every_route_is_described_and_nothing_else():
    async with stack(telemetry=ON_THE_GATEWAYS_PORT) as s:
        document = await describe(s)
        assert set(document["paths"]) == PATHS
        app = s.server.config.app
        while not isinstance(app, Api):
            app = app.app
        routes = [
            route
            for route in app.routes
            if not isinstance(route, WebSocketRoute) and route.include_in_schema
        ]
        served = {(method, route.path_format) for route in routes for method in route.methods}
        assert {(method, path) for method, path, _ in operations(document)} == served
        for method, path, _ in operations(document):
            url = path.replace("{name}", "model")
            answer = await s.client.request(method, url)
            success = 426 if path == REALTIME else 200
            assert answer.status_code == (400 if method == "POST" else success), path
            other = "GET" if method == "POST" else "POST"
            assert (await s.client.request(other, url)).status_code == 405
            told = await s.client.head(url)
            assert told.status_code == (405 if method == "POST" else success) and not told.content


async def test_metrics_on_a_port_of_their_own_are_not_described():
    async with stack(encoders=0, llms=0, ready=False, telemetry=OWN_PORT) as s:
        assert set((await describe(s))["paths"]) == PATHS - {"/metrics"}
        assert (await s.client.get("/metrics")).status_code == 404


async def test_the_document_is_well_formed():
    async with stack(encoders=0, llms=0, ready=False, keys=keys_of(ada="sk-ada")) as s:
        document = await describe(s)
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert document["info"]["title"] and document["info"]["version"]
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    told = {f"#/components/schemas/{name}" for name in schemas}
    assert set(references(document)) == told  # None dangles, and none is unused.
    tags = {tag["name"] for tag in document["tags"]}
    found = [operation for _, _, operation in operations(document)]
    assert len({operation["operationId"] for operation in found}) == len(found)
    for _, path, operation in operations(document):
        assert operation["summary"] and ("description" in operation) == (path == REALTIME)
        assert set(operation["tags"]) <= tags
        named = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))
        success = "101" if path == REALTIME else "200"
        assert {success, "4XX", "5XX"} <= set(operation["responses"])
        assert all(response["description"] for response in operation["responses"].values())


async def test_answers_are_what_the_document_says():
    async with stack(telemetry=ON_THE_GATEWAYS_PORT) as s:
        document = await describe(s)
        chat = "/v1/chat/completions"
        for fields in ({}, {"logprobs": True, "top_logprobs": 2, "timings": True, "n": 2}):
            answer = await s.chat(user("What?", data_url()), **fields)
            assert answer.status_code == 200
            assert conforms(document, answer.json(), answered(document, answer, chat))
        answer = await s.client.post("/v1/completions", json={"model": "model", "prompt": "Once"})
        schema = answered(document, answer, "/v1/completions")
        assert conforms(document, answer.json(), schema)
        asked = {"model": "model", "messages": [{"role": "user", "content": "What?"}]}
        for path, fields in (
            ("/v1/messages", {"max_tokens": 9}),
            ("/v1/messages/count_tokens", {}),
        ):
            answer = await s.client.post(path, json={**asked, **fields})
            assert conforms(document, answer.json(), answered(document, answer, path))
        answer = await s.client.post("/v1/responses", json=FULL_RESPONSE)
        assert conforms(document, answer.json(), answered(document, answer, "/v1/responses"))
        for path in PATHS - {
            chat,
            "/v1/completions",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/responses",
            "/v1/apply_template",
            "/tokenize",
            "/detokenize",
            "/v1/tokenize",
            "/v1/detokenize",
            REALTIME,
            "/metrics",
            "/docs",
            "/openapi.json",
        }:
            answer = await s.client.get(path.replace("{name}", "model"))
            assert conforms(document, answer.json(), answered(document, answer, path))
        rendered = await s.client.post(
            "/v1/apply_template", json={"messages": [user("What?", data_url())]}
        )
        assert rendered.json()["spans"]
        schema = answered(document, rendered, "/v1/apply_template")
        assert conforms(document, rendered.json(), schema)
        with pytest.raises(jsonschema.ValidationError):  # The check looks.
            conforms(document, {**rendered.json(), "more": 1}, schema)


async def test_chunks_are_what_the_document_says():
    async with stack() as s:
        document = await describe(s)
        for fields in (
            {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1},
            {"timings": True, "stop": "there"},
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ):
            answer = await s.chat(stream=True, **fields)
            assert answer.headers["content-type"].startswith("text/event-stream")
            schema = answered(document, answer, "/v1/chat/completions", "text/event-stream")
            *chunks, done = events(answer.text)
            assert len(chunks) > 2 and done == "[DONE]"
            for chunk in chunks:
                assert conforms(document, chunk, schema)
        asked = {"model": "model", "prompt": "Once", "stream": True, "timings": True}
        answer = await s.client.post("/v1/completions", json=asked)
        schema = answered(document, answer, "/v1/completions", "text/event-stream")
        for chunk in events(answer.text)[:-1]:
            assert conforms(document, chunk, schema)
        messages = [{"role": "user", "content": "What?"}]
        asked = {"model": "model", "messages": messages, "max_tokens": 9, "stream": True}
        answer = await s.client.post("/v1/messages", json=asked)
        schema = answered(document, answer, "/v1/messages", "text/event-stream")
        for block in answer.text.removesuffix("\n\n").split("\n\n"):
            assert conforms(document, json.loads(block.partition("data: ")[2]), schema)
        answer = await s.client.post("/v1/responses", json={**FULL_RESPONSE, "stream": True})
        schema = answered(document, answer, "/v1/responses", "text/event-stream")
        for block in answer.text.strip().split("\n\n"):
            data = json.loads(block.partition("\ndata: ")[2])
            assert conforms(document, data, schema)


async def test_errors_are_what_the_document_says():
    async with stack(llms=0, ready=False, worker_wait_s=0.1) as s:
        document = await describe(s)
        chat, ready = "/v1/chat/completions", "/ready"
        refused = [
            (chat, await s.chat(temperature="hot"), 400),
            (chat, await s.chat(model="other"), 404),
            (chat, await s.client.get(chat), 405),
            (chat, await s.client.post(chat, content=b"x", headers={"content-type": "a/b"}), 415),
            (chat, await s.chat(), 503),
            ("/v1/messages", await s.client.post("/v1/messages", json={}), 400),
            ("/v1/messages", await s.client.get("/v1/messages"), 405),
            ("/v1/models/{name}", await s.client.get("/v1/models/other"), 404),
            (ready, await s.client.get(ready), 503),
            ("/health", await s.client.get("/health"), 503),
        ]
        for path, answer, status in refused:
            assert answer.status_code == status
            assert conforms(document, answer.json(), answered(document, answer, path))


async def test_requests_that_are_served_and_no_others_are_described():
    async with stack() as s:
        document = await describe(s)
        schema = {"$ref": "#/components/schemas/ChatRequest"}
        full = body(
            {"role": "system", "content": "Be brief."},
            user("What?", data_url()),
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": [{"type": "image", "image": data_url(), "detail": "low"}]},
            temperature=0.5, top_p=0.9, max_completion_tokens=9, stop=["x"], seed=7, n=1,
            logit_bias={"5": 1.5}, priority=1, cache_salt="a", timings=True,
            mm_processor_kwargs={"max_pixels": 200_000}, stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )  # fmt: skip
        told = {"1": "x", "top_p": -1, "messages": [], "n": 1.5, "max_tokens": 0}
        bad = [{**full, name: value} for name, value in told.items()]
        bad.append({**full, "stream_options": {"continuous_usage_stats": "yes"}})
        bad.append({**full, "messages": [{"role": "user", "content": [{"type": "video"}]}]})
        for sent in (full, *bad):
            answer = await s.client.post("/v1/chat/completions", json=sent)
            if sent is full:
                assert answer.status_code == 200 and conforms(document, sent, schema)
                continue
            assert answer.status_code == 400
            with pytest.raises(jsonschema.ValidationError):
                conforms(document, sent, schema)
        fields = document["components"]["schemas"]["ChatRequest"]["properties"]
        assert not fields.keys() & UNSUPPORTED.keys()


LOOSE = {
    "stream": True, "stream_options": {"include_usage": None, "more": 1}, "max_tokens": -1,
    "top_p": 0, "stop": ["", "x"], "n": 1.0, "seed": 7.0, "metadata": [1], "store": True,
    "skip_special_tokens": None, "ignore_eos": None, "timings": None, "priority": None,
    "include_stop_str_in_output": None, "add_generation_prompt": None, "user": None,
    "continue_final_message": None, "reasoning_effort": "low", "service_tier": "flex",
    "mm_processor_kwargs": {"max_pixels": "200000"}, "bad_words": [""],
}  # fmt: skip


async def test_what_clients_send_loosely_is_described():
    """Objects in a body may have more fields than are told; the body itself may not."""
    async with stack() as s:
        document = await describe(s)
        schema = {"$ref": "#/components/schemas/ChatRequest"}
        check = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
        picture = {"url": data_url(), "format": "image/png", "detail": "original"}
        part = {"type": "image_url", "image_url": picture, "cache_control": {"type": "x"}, "a": 1}
        inline = {"type": "image", "base64": data_url(), "min_pixels": "3136"}
        silent = {"role": "assistant", "content": None, "tool_calls": None, "more": 1}
        sent = body({"role": "user", "content": [part, inline]}, silent, user("?"), **LOOSE)
        check.validate(sent)
        assert (await s.chat(*sent["messages"], **LOOSE)).status_code == 200
        assert not check.is_valid({**sent, "unheard": 1})
        assert (await s.chat(unheard=1)).status_code == 400


@pytest.mark.parametrize("public_models", [False, True])
async def test_keys_are_asked_for_where_the_document_says_so(public_models):
    keys = keys_of(ada="sk-ada")
    settings = {"telemetry": ON_THE_GATEWAYS_PORT, "public_models": public_models}
    async with stack(encoders=0, llms=0, ready=False, keys=keys, **settings) as s:
        document = await describe(s)
        bearer, header = document["components"]["securitySchemes"].values()
        assert (bearer["type"], bearer["scheme"]) == ("http", "bearer")
        assert (header["type"], header["in"], header["name"]) == ("apiKey", "header", "x-api-key")
        opened = OPEN | ({"/v1/models", "/v1/models/{name}"} if public_models else set())
        for method, path, operation in operations(document):
            assert ("security" in operation) == (path not in opened)
            url = path.replace("{name}", "model")
            answer = await s.client.request(method, url)
            assert (answer.status_code == 401) == (path not in opened)
            if answer.status_code == 401:
                assert conforms(document, answer.json(), answered(document, answer, path))


async def test_without_keys_none_is_described():
    async with stack(encoders=0, llms=0, ready=False) as s:
        document = await describe(s)
        assert "securitySchemes" not in document["components"]
        assert not any("security" in operation for _, _, operation in operations(document))
