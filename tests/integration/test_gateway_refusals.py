"""What the gateway refuses, and how: status, shape, limits, keys."""

import asyncio
import contextlib
import json

import httpx2
import pytest

from tests.fakes import until
from tests.gateways import DEADLINES_S, body, data_url, events, keys_of, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-17"}, 404, "model_not_found"),
        ({"colour": 1}, 400, "unknown_field"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded"),
        ({"messages": [user("x " * 9000)]}, 400, "context_length_exceeded"),
        ({"messages": [user("?", "data:image/png;base64,@")]}, 400, "invalid_base64"),
        ({"modalities": ["audio"]}, 400, "unsupported"),
        ({"guided_regex": "(unclosed"}, 400, "invalid_grammar"),
        ({"top_logprobs": 21, "logprobs": True}, 400, None),
    ],
)
async def test_refusals(change, status, code):
    async with stack() as s:
        answer = await s.client.post("/v1/chat/completions", json={**body(), **change})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert not s.llm.starts and s.idle()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"model": "\xff"}', "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b"model=model", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 400),
        (b" " * 3000, "application/json", 413),
    ],
)
async def test_bodies_that_are_no_request(content, kind, status):
    async with stack(max_request_bytes=2000 if status == 413 else 2**20) as s:
        answer = await s.client.post(
            "/v1/chat/completions", content=content, headers={"content-type": kind}
        )
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


async def test_a_body_of_unknown_length_is_cut_off_at_the_limit():
    async def endless():
        for _ in range(100):
            yield b" " * 1000

    async with stack(max_request_bytes=5000) as s:
        with contextlib.suppress(httpx2.WriteError, httpx2.ReadError):
            answer = await s.client.post(
                "/v1/chat/completions",
                content=endless(),
                headers={"content-type": "application/json"},
            )
            assert answer.status_code == 413
        await until(s.idle)


async def test_unknown_routes_methods_and_trailing_slashes():
    async with stack() as s:
        assert (await s.client.get("/v1/nothing")).json()["error"]["type"] == "not_found_error"
        assert (await s.client.get("/v1/chat/completions")).status_code == 405
        assert (await s.client.post("/v1/chat/completions/", json=body())).status_code == 200
        for path in ("/v1/models/", "/health/", "/live/", "/ready/", "/version/", "/metrics/", "/"):
            assert (await s.client.get(path)).status_code == 200, path
        assert (await s.client.head("/live")).status_code == 200


async def test_models():
    async with stack(served_model_name=("eyes", "org/eyes")) as s:
        listed = (await s.client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["eyes", "org/eyes"]
        assert (await s.client.get("/v1/models/org/eyes")).json()["id"] == "org/eyes"
        assert (await s.client.get("/v1/models/model")).status_code == 404
        assert (await s.chat(model="model")).status_code == 404
        assert (await s.chat(model="eyes")).json()["model"] == "eyes"
    async with stack(served_model_name=("*",)) as s:
        assert (await s.chat(model="anything")).status_code == 200


async def test_unknown_fields_may_be_ignored_with_a_warning():
    async with stack(ignore_unknown_fields=True) as s:
        answer = await s.chat(colour="é", stream=True)
        assert answer.status_code == 200
        assert answer.headers["x-opticnerve-warnings"] == "ignored unknown fields: colour"


async def test_warnings_are_one_short_printable_header():
    async with stack() as s:
        odd = "a\r\nset-cookie: x=1\r\n\r\n\u00e9\u2028"
        message = {"role": "user", "content": "hi", odd: 1, **{f"more{i}": 1 for i in range(200)}}
        for route in ("/v1/chat/completions", "/v1/apply_template"):
            sent = body(message) if "chat" in route else {"messages": [message]}
            answer = await s.client.post(route, json=sent)
            assert answer.status_code == 200 and "set-cookie" not in answer.headers
            told = answer.headers["x-opticnerve-warnings"]
            assert told.startswith("ignored unknown fields: messages[0].")
            assert told.isascii() and told.isprintable() and len(told) == 500
        answer = await s.chat(user("hi"), reasoning_effort="high", store=True)
        told = answer.headers["x-opticnerve-warnings"]
        assert told == "without effect: store, reasoning_effort"
        both = await s.chat({"role": "user", "content": "hi", "to": 1}, store=True)
        told = both.headers["x-opticnerve-warnings"]
        assert told == "ignored unknown fields: messages[0].to; without effect: store"


@pytest.mark.parametrize("name", ["to ", " ", "\t"])
async def test_a_warning_that_would_end_in_white_space_is_still_a_header(name):
    async with stack() as s:
        answer = await s.chat({"role": "user", "content": "hi", name: 1})
        assert answer.status_code == 200
        told = answer.headers["x-opticnerve-warnings"]
        assert told.startswith("ignored unknown fields: messages[0].")
        answer = await s.chat(**{name: 1})
        assert answer.status_code == 400


async def test_a_template_that_reasons_heeds_reasoning_effort():
    template = "{{ reasoning_effort }}{{ tools }}{{ messages[0].content }}"
    async with stack(encoders=0, llms=0, ready=False, chat_template=template) as s:
        asked = {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "high"}
        answer = await s.client.post("/v1/apply_template", json=asked)
        assert answer.json()["prompt"] == "highNonehi"
        assert "x-opticnerve-warnings" not in answer.headers
        offered = {"tools": [{"type": "function", "function": {"name": "f"}}]}
        for choice, shown in {"none": "None", "auto": "[{'type': 'function', "}.items():
            fields = {**asked, **offered, "tool_choice": choice}
            answer = await s.client.post("/v1/apply_template", json=fields)
            assert answer.json()["prompt"].startswith("high" + shown)
            assert "x-opticnerve-warnings" not in answer.headers


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
async def test_bodies_in_no_encoding(encoding):
    async with stack() as s:
        raw = b"\xef\xbb\xbf" + json.dumps(body()).encode()
        headers = {"content-type": "application/json", "content-encoding": encoding}
        answer = await s.client.post("/v1/chat/completions", content=raw, headers=headers)
        assert answer.status_code == 200, answer.text
        headers["content-encoding"] = "gzip"
        answer = await s.client.post("/v1/chat/completions", content=raw, headers=headers)
        assert answer.status_code == 415


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://example.com/v1/chat/completions", 200),
        ("HTTPS://example.com:8443/v1/chat/completions/?a=http://x/y", 200),
        ("http://example.com", 405),
        ("http://example.com/v1/chat%2Fcompletions", 200),
        ("http://example.com/nothing", 404),
        ("http://", 404),
        ("ftp://example.com/v1/chat/completions", 404),
        ("/http://example.com/v1/chat/completions", 404),
    ],
)
async def test_requests_for_a_whole_url(target, status):
    """As clients send them that know of a proxy."""
    raw = json.dumps(body()).encode()
    head = (
        f"POST {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    async with stack() as s:
        url = s.client.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        try:
            writer.write(head.encode() + raw)
            answer = await reader.read()
        finally:
            writer.close()
        assert int(answer.split()[1]) == status, answer


async def test_a_whole_url_needs_its_key():
    async with stack(keys=keys_of(ada="sk-1"), encoders=0, llms=0, ready=False) as s:
        url = s.client.base_url
        for path, status in (("v1/models", b"401"), ("live", b"200"), ("/live", b"401")):
            reader, writer = await asyncio.open_connection(url.host, url.port)
            head = f"GET http://a/{path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
            try:
                writer.write(head.encode())
                assert (await reader.read()).split()[1] == status, path
            finally:
                writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/apply_template"])
@pytest.mark.parametrize("characters", [40_000, 2**20, 17 * 2**20])
async def test_text_that_is_too_long_is_told_alike_whatever_its_length(route, characters):
    async with stack(encoders=0, llms=0, ready=False) as s:
        text = ("a word or two, " * (characters // 15 + 1))[:characters]
        asked = {"model": "model", "messages": [{"role": "user", "content": text}]}
        answer = await s.client.post(route, json=asked)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "messages"
        # What LiteLLM looks for before it tries a model that takes more, and LangChain before it
        # raises ContextOverflowError.
        assert "is longer than the model's context length" in error["message"]
        assert "prompt is too long" in error["message"]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/apply_template"])
async def test_half_a_surrogate_pair_in_arguments_is_a_400(route):
    call = {"function": {"name": "f", "arguments": '{"\\ud83d": 1}'}}
    messages = [user("hi"), {"role": "assistant", "tool_calls": [call]}, user("hi")]
    async with stack(encoders=0, llms=0, ready=False) as s:
        answer = await s.client.post(route, json={"model": "model", "messages": messages})
        assert answer.status_code == 400
        param = "messages[1].tool_calls[0].function.arguments"
        assert answer.json()["error"]["param"] == param


async def test_request_ids():
    async with stack() as s:
        answer = await s.chat(headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert s.llm.starts[0].request_id == "mine-1"
        odd = await s.client.get("/live", headers={"x-request-id": "a b\tc<script>" + "x" * 500})
        assert odd.headers["x-request-id"].startswith("abcscriptx")
        assert len(odd.headers["x-request-id"]) == 128
        assert (await s.client.get("/nothing")).headers["x-request-id"].startswith("req-")


async def test_keys():
    keys = keys_of(ada="sk-1")
    good = {"authorization": "Bearer sk-1"}
    async with stack(keys=keys, public_models=True, host="127.0.0.1") as s:
        answer = await s.chat()
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert (await s.chat(headers=good)).status_code == 200
        for path, status in (
            ("/live", 200), ("/ready", 200), ("/health", 200), ("/", 200), ("/v1/models", 200),
            ("/metrics", 401), ("/version", 401), ("/nothing", 401),
        ):  # fmt: skip
            assert (await s.client.get(path)).status_code == status, path
        assert (await s.client.get("/metrics", headers=good)).status_code == 200
        assert "sk-1" not in (await s.client.get("/health")).text


async def test_browsers_of_allowed_origins_may_call():
    async with stack(cors_origins=("https://a.example",), keys=keys_of(ada="sk-1"),
                     host="127.0.0.1") as s:  # fmt: skip
        asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
        answer = await s.client.options("/v1/chat/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        refused = await s.chat(headers={"origin": "https://a.example"})
        assert refused.status_code == 401  # The page reads why.
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = await s.chat(headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_requests_beyond_the_limit_are_refused():
    async with stack(max_concurrent_requests=1) as s:
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        first = asyncio.create_task(s.chat())
        await s.llm.started.wait()
        refused = await s.chat()
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert (await s.client.get("/live")).status_code == 200
        go.set()
        assert (await first).status_code == 200
        assert (await s.chat()).status_code == 200


async def test_bytes_beyond_the_limit_are_refused():
    async with stack(max_bytes_in_flight=10_000) as s:
        assert (await s.chat(user("x" * 20_000))).status_code == 429
        assert s.idle()
        assert (await s.chat()).status_code == 200


async def test_the_deadline_is_a_504():
    async with stack(request_timeout_s=0.3) as s:
        s.llm.step = lambda fake, index: asyncio.Event().wait()
        answer = await s.chat()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        await until(s.idle)


async def test_a_failure_after_the_stream_began_is_an_event_and_the_end():
    for seconds in DEADLINES_S:
        async with stack(request_timeout_s=seconds) as s:
            s.llm.step = lambda fake, index: asyncio.Event().wait() if index else asyncio.sleep(0)
            answer = await s.chat(stream=True)
        if answer.status_code != 504:  # Before the stream began.
            break
    *_, last, done = events(answer.text)
    assert answer.status_code == 200 and last["error"]["code"] == "deadline_exceeded"
    assert done == "[DONE]"


async def test_the_unexpected_is_a_500_that_tells_nothing(monkeypatch):
    async with stack() as s:
        monkeypatch.setattr(s.gateway.pipeline.renderer, "render", lambda _: 1 / 0)
        answer = await s.chat(headers={"x-request-id": "odd"})
        assert answer.status_code == 500
        assert "division" not in answer.text and answer.headers["x-request-id"] == "odd"
        monkeypatch.undo()
        assert (await s.chat()).status_code == 200


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/apply_template"])
async def test_pictures_blown_up_beyond_the_model_are_refused_before_they_are_expanded(
    route, monkeypatch
):
    picture = {"type": "image_url", "image_url": {"url": data_url()}, "min_pixels": 2**31 - 1}
    asked = {"model": "model", "messages": [{"role": "user", "content": [picture] * 10}]}
    async with stack(encoders=0, llms=0, ready=False) as s:
        layout = s.gateway.pipeline.renderer.layout
        monkeypatch.setattr(layout, "expand", lambda plan: pytest.fail("it was expanded"))
        answer = await s.client.post(route, json=asked)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded" and "min_pixels" in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/apply_template"])
@pytest.mark.parametrize("bomb", ["{{}}", "[]", "0", '{{"type": "text", "text": "[,{{"}}'])
async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(route, bomb, monkeypatch):
    payload = '{"messages": [' + ",".join([bomb.format()] * 120_000) + "]}"
    monkeypatch.setattr("gateway.api.http.parse", lambda *_, **__: pytest.fail("it was parsed"))
    async with stack(encoders=0, llms=0, ready=False) as s:
        answer = await s.client.post(route, content=payload)
        assert answer.status_code == 413
        error = answer.json()["error"]
        assert error["code"] == "too_many_values" and "--max-request-values" in error["message"]


async def test_what_stands_in_text_is_no_value():
    text = '[{,\\"' * 200
    async with stack(max_request_values=100) as s:
        answer = await s.chat(user(text), max_tokens=2)
        assert answer.status_code == 200


async def test_what_the_values_of_a_body_take_counts_as_bytes_in_flight():
    many = json.dumps(body(metadata={}, allowed_token_ids=[1] * 1000))
    async with stack(max_bytes_in_flight=100_000, encoders=0, llms=0, ready=False) as s:
        assert len(many) < 50_000
        assert (await s.client.post("/v1/chat/completions", content=many)).status_code == 429
        assert s.idle()


@contextlib.asynccontextmanager
async def stalled(s, sent=b"{"):
    """A client that sends the beginning of a chat, and nothing more."""
    url = s.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
    writer.write(head.encode() + sent)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


async def test_clients_that_send_half_a_body_keep_nobody_out():
    async with contextlib.AsyncExitStack() as exits:
        s = await exits.enter_async_context(stack(max_concurrent_requests=2))
        for _ in range(3):
            await exits.enter_async_context(stalled(s))
        await until(lambda: s.gateway.admission.bytes.held == 3)
        assert (await s.chat()).status_code == 200


async def test_a_body_that_does_not_come_is_a_408():
    async with stack(body_timeout_s=0.2) as s, stalled(s) as reader:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"--body-timeout-s" in await reader.readuntil(b"}")
        await until(s.idle)
