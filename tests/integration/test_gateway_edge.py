"""Where HTTP comes in: what is no HTTP/1, and what a web page could send."""

import json
import logging

import pytest

from tests.gateways import body, connected, keys_of, rest, stack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]

BARE = {"encoders": 0, "llms": 0, "ready": False}
GET = b"GET /live HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/apply_template HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n"


FAULTS = [
    (CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n", "Transfer-Encoding beside Content"),
    (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "beside"),
    (CHUNKED.replace(b"1.1", b"1.0") + b"\r\n0\r\n\r\n", "in HTTP/1.0"),
    (POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n12", "conflicting"),
    ((GET + b"\r\n").replace(b"\r\n", b"\n"), "LF without CR"),
    (GET.replace(b"\r\n", b"\n", 1) + b"\r\n", "LF without CR"),
    (GET + b"\n", "LF without CR"),
    (GET + b"a: 1\nb: 2\r\n\r\n", "LF without CR"),
    (CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\n", "LF without CR"),
    (CHUNKED + b"\r\n2\r\n{}\r\n0\r\na: 1\n\r\n", "LF without CR"),
    (CHUNKED + b"\r\n2\n{}\r\n0\r\n\r\n", "chunk header"),
    (GET.replace(b"1.1", b"2.0") + b"\r\n", "neither HTTP/1.0 nor HTTP/1.1"),
    (GET.replace(b"1.1", b"1.2") + b"\r\n", "neither"),
    (GET.replace(b"1.1", b"0.9") + b"\r\n", "neither"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "neither"),
    (b"HEAD /live HTTP/3.0\r\nhost: localhost\r\n\r\n", "neither"),
    (b"GET /live HTTP/1.1\r\n\r\n", "Missing mandatory Host: header"),
    (GET + b"authorization: Bearer sk-\0secret\r\n\r\n", "illegal header line"),
    (b"\x16\x03\x01 secret\r\n\r\n", "illegal request line"),
    (GET + b"long: " + b"secret" * 3000, "too long"),
]


async def test_what_is_no_http_is_a_400_that_says_why_and_the_end(caplog):
    caplog.set_level(logging.INFO)
    async with stack(**BARE) as s:
        for sent, fault in FAULTS:
            caplog.clear()
            async with connected(s) as (reader, writer):
                writer.write(sent)
                head, _, told = (await rest(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ") and b"connection: close" in head, sent
            error = json.loads(told)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "not_http" and fault in error["message"], sent
            assert "secret" not in error["message"] and "secret" not in caplog.text
            (told,) = [r.fields for r in caplog.records if r.name == "gateway.edge.http1"]
            assert told["status"] == 400 and told["code"] == "not_http", sent
            assert fault in told["reason"] and "Traceback" not in caplog.text


@pytest.mark.parametrize("stage", ["answered", "body"])
async def test_a_body_that_is_no_http_ends_its_connection(stage, caplog):
    """Also where the answer has been sent, or the route still waits for the body."""
    path = b"/nothing" if stage == "answered" else b"/v1/apply_template"
    sent = CHUNKED.replace(b"/v1/apply_template", path) + b"\r\n2\r\n{}\r\n"
    async with stack(**BARE) as s, connected(s) as (reader, writer):
        writer.write(sent)
        if stage == "answered":
            assert b" 404 " in await reader.readuntil(b"}}")
        writer.write(b"no size\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 400 ")
        assert (await s.client.get("/live")).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


async def test_http_as_programs_send_it_is_read():
    """Pipelined, in HTTP/1.0, in chunks with a trailer, and with empty lines in a body."""
    text = b'{"messages":\n\n[{"role":"user",\n"content":"x"}]}'
    chunk = b"%x;extension\r\n%b\r\n0\r\ntrailer: 1\r\n\r\n" % (len(text), text)
    sized = b"content-length: %d\r\n\r\n" % len(text)
    whole = GET + b"\r\n" + CHUNKED + b"\r\n" + chunk + POST + sized + text
    last = GET.replace(b"1.1", b"1.0") + b"\r\n"
    async with stack(**BARE) as s, connected(s) as (reader, writer):
        for piece in (whole + last)[:60], (whole + last)[60:]:
            writer.write(piece)
            await writer.drain()
        told = await rest(reader)
    answers = told.split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 4
    assert all(b"token_ids" in answer for answer in answers[1:3])


HOSTS = ["127.0.0.1", "localhost:8000", "LocalHost.", "[::1]:80", "127.9.9.9:1", ""]
FOREIGN_HOSTS = ["evil.example", "127.0.0.1.evil.example:80", "localhost@evil", "0.0.0.0", "a b"]


async def test_a_gateway_for_this_machine_is_called_by_its_names():
    async with stack() as s:
        for host in HOSTS:
            assert (await s.chat(headers={"host": host})).status_code == 200, host


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_a_gateway_for_this_machine_is_for_no_other_host(host):
    """As of a name that was this machine's address when the browser asked for it again."""
    async with stack() as s:
        for path in ("/v1/models", "/health", "/metrics", "/live"):
            answer = await s.client.get(path, headers={"host": host})
            assert answer.status_code == 403
        refused = await s.chat(headers={"host": host})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (403, "host_not_allowed")
        assert "--allowed-hosts" in error["message"] and not s.llm.starts


FOREIGN_ORIGINS = ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_a_page_of_another_origin_is_refused(origin):
    async with stack() as s:
        for kind in ("application/json", "text/plain", ""):
            answer = await s.client.post(
                "/v1/chat/completions",
                content=json.dumps(body()),
                headers={"origin": origin, "content-type": kind},
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "origin_not_allowed")
            assert "--cors-origins" in error["message"] and not s.llm.starts


async def test_pages_of_the_server_itself_and_of_allowed_origins_may_call():
    own, friend = {"host": "localhost:80"}, "https://a.example"
    async with stack(cors_origins=(friend,)) as s:
        for origin in (friend, "http://localhost:80", "HTTP://LOCALHOST:80"):
            assert (await s.chat(headers={**own, "origin": origin})).status_code == 200
        assert (await s.chat(headers={**own, "origin": "null"})).status_code == 403
    async with stack(cors_origins=("*",), allowed_hosts=("*",)) as s:
        for origin in ("null", "https://b.example"):
            headers = {"host": "c.example", "origin": origin}
            assert (await s.chat(headers=headers)).status_code == 200
    async with stack(allowed_hosts=("host.docker.internal",)) as s:
        assert (await s.chat(headers={"host": "host.docker.internal:80"})).status_code == 200
        assert (await s.chat(headers={"host": "docker.internal"})).status_code == 403


@pytest.mark.parametrize("header", ["origin", "sec-fetch-site"])
async def test_what_a_page_can_send_unasked_is_no_request(header):
    async with stack() as s:
        url = f"http://{s.client.base_url.host}:{s.client.base_url.port}"
        headers = {header: url if header == "origin" else "same-origin"}
        raw = json.dumps(body())
        for kind, status in (("", 415), ("text/plain", 415), ("application/json", 200)):
            sent = {**headers, "content-type": kind}
            answer = await s.client.post("/v1/chat/completions", content=raw, headers=sent)
            assert answer.status_code == status
        answer = await s.client.post("/v1/chat/completions", content=raw)  # By no page.
        assert answer.status_code == 200


@pytest.mark.parametrize("settings", [{"keys": keys_of(a="sk-1")}, {"host": "0.0.0.0"}])
async def test_others_are_called_by_any_name(settings):
    async with stack(**settings) as s:
        headers = {"host": "a.example", "origin": "null", "authorization": "Bearer sk-1"}
        assert (await s.chat(headers=headers)).status_code == 200


async def test_without_its_key_only_the_status_is_told():
    good = {"authorization": "Bearer sk-1"}
    async with stack(keys=keys_of(ada="sk-1")) as s:
        for path, told in (("/health", {"status": "ok"}),
                           ("/ready", {"status": "ready", "pictures": True})):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer sk-2"}):
                assert (await s.client.get(path, headers=headers)).json() == told
            assert "missing" in (await s.client.get(path, headers=good)).json()
        assert (await s.client.get("/health", headers=good)).json()["config"]
        await s.llm.set_serving(False)
        s.gateway.running.draining = True
        for path in ("/health", "/ready"):
            answer = await s.client.get(path)
            assert answer.status_code == 503 and s.llm.address not in answer.text
