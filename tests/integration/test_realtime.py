"""Realtime sessions over real sockets, with the ``websockets`` client: who may open one, what ends
one, and what a client cannot do to the gateway."""

import asyncio
import contextlib
import json
import logging
import struct

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.api.realtime import route
from gateway.edge import websocket
from tests.fakes import until
from tests.gateways import connected, data_url, keys_of, rest, stack

pytestmark = pytest.mark.anyio

TEXT, BINARY, CLOSE, PING, CONTINUATION = 1, 2, 8, 9, 0
HANDSHAKE = {
    "Host": "127.0.0.1",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


def head(path="/v1/realtime", method="GET", **changes):
    """The head of a handshake."""
    fields = HANDSHAKE | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


def frame(opcode, payload=b"", *, final=True, length=None):
    """A frame of a client, whose mask is 0."""
    length = len(payload) if length is None else length
    if length < 126:
        size = bytes([0x80 | length])
    else:
        size = (
            struct.pack(">BH", 254, length) if length < 2**16 else struct.pack(">BQ", 255, length)
        )
    return bytes([(0x80 if final else 0) | opcode]) + size + bytes(4) + payload


def address(s, query="?model=model"):
    return f"ws://127.0.0.1:{s.client.base_url.port}/v1/realtime{query}"


class Client:
    """A realtime client."""

    def __init__(self, ws):
        self.ws = ws

    async def send(self, kind, **fields):
        await self.ws.send(json.dumps({"type": kind, **fields}))

    async def user(self, *parts):
        content = [
            {"type": "input_text", "text": part}
            if isinstance(part, str)
            else {"type": "input_image", **part}
            for part in parts
        ]
        item = {"type": "message", "role": "user", "content": content}
        await self.send("conversation.item.create", item=item)

    async def event(self, *kinds):
        """The next event of one of these kinds; an error, if it comes first."""
        while True:
            event = json.loads(await self.ws.recv())
            if event["type"] in (*kinds, "error"):
                return event


@contextlib.asynccontextmanager
async def session(s, query="?model=model", **given):
    async with connect(address(s, query), **given) as ws:
        client = Client(ws)
        assert (await client.event("session.created"))["type"] == "session.created"
        yield client


async def settle(s):
    """Waits until nothing of any session is held."""
    await until(lambda: s.idle() and not s.gateway.admission.sessions.held)
    await until(lambda: s.gateway.connections.holders <= 1)  # The test's own HTTP client.


@contextlib.asynccontextmanager
async def raw(s):
    """(reader, writer) of a session's WebSocket, whose frames are the test's."""
    async with connected(s) as (reader, writer):
        writer.write(head())
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        yield reader, writer


def socket_of(s):
    """The gateway's side of the only session."""
    sockets = s.server.server_state.connections
    (socket,) = (each for each in sockets if isinstance(each, websocket.WebSocketConnection))
    return socket


async def closed_with(reader):
    """The code of the close frame that is the last that comes."""
    told = await rest(reader)
    return int.from_bytes(told[told.rindex(b"\x88") + 2 :][:2], "big")


async def test_a_picture_is_encoded_once_in_two_turns():
    async with stack() as s, session(s) as client:
        await client.user("What is this?", {"image_url": data_url()})
        for _ in range(2):
            await client.send("response.create")
            done = (await client.event("response.done"))["response"]
            assert done["status"] == "completed"
            assert done["output"][0]["content"][0]["text"] == "Hello there."
            assert done["usage"]["input_token_details"]["image_tokens"] == 9
        assert len(s.encoder.calls) == 1
        assert len(s.llm.starts) == 2 and all(len(start.items) == 1 for start in s.llm.starts)


async def test_a_picture_that_cannot_be_read_fails_its_response_by_name():
    async with stack() as s, session(s) as client:
        await client.user({"image_url": "data:image/png;base64,AAAA"})
        item = (await client.event("conversation.item.done"))["item"]
        await client.send("response.create")
        done = (await client.event("response.done"))["response"]
        assert done["status"] == "failed"
        error = done["status_details"]["error"]
        assert error["code"] == "unsupported_image_format"
        assert error["param"] == f"{item['id']}.content[0].image_url"


async def test_a_cancel_frees_what_the_response_held():
    async with stack() as s, session(s) as client:
        generating = hold_first_token(s)
        await client.user("Hi")
        await client.send("response.create")
        await generating.wait()
        await client.send("response.cancel")
        done = (await client.event("response.done"))["response"]
        assert done["status"] == "cancelled"
        await asyncio.wait_for(s.llm.cancelled.wait(), 10)
        await until(lambda: not s.llm.running and not s.gateway.admission.requests.held)


async def test_a_client_that_leaves_frees_all():
    async with stack() as s:
        generating = hold_first_token(s)
        async with session(s) as client:
            await client.user("Hi", {"image_url": data_url()})
            await client.send("response.create")
            await generating.wait()
            assert s.gateway.admission.bytes.held
            client.ws.transport.abort()
        await asyncio.wait_for(s.llm.cancelled.wait(), 10)
        await settle(s)


def hold_first_token(s):
    """Lets the LLM write nothing; what is returned is set once it would."""
    generating = asyncio.Event()

    async def wait(llm, index):
        generating.set()
        await asyncio.Event().wait()

    s.llm.step = wait
    return generating


# ---- who may open a session


async def test_keys_come_in_a_header_or_as_a_subprotocol():
    async with stack(keys=keys_of(ada="sk-1")) as s:
        offered = ["realtime", "openai-insecure-api-key.sk-1", "openai-beta.realtime-v1"]
        async with session(s, subprotocols=offered) as client:
            assert client.ws.subprotocol == "realtime"
            assert s.gateway.admission.sessions._by_holder == {"key ada": 1}
        async with session(s, additional_headers={"Authorization": "Bearer sk-1"}) as client:
            assert client.ws.subprotocol is None
        wrong = [
            {},
            {"subprotocols": ["realtime", "openai-insecure-api-key.sk-2"]},
            {"additional_headers": {"Authorization": "Bearer sk-2"}},
        ]
        for given in wrong:
            with pytest.raises(InvalidStatus) as refused:
                async with session(s, **given):
                    pass
            answer = refused.value.response
            assert answer.status_code == 401
            assert json.loads(answer.body)["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"]


async def test_pages_of_other_origins_cannot_open_sessions():
    allowed = "https://app.example"
    for keys in (None, keys_of(ada="sk-1")):
        async with stack(keys=keys, cors_origins=(allowed,)) as s:
            headers = {"Authorization": "Bearer sk-1"}
            own = f"http://127.0.0.1:{s.client.base_url.port}"
            for origin in (allowed, own, None):
                async with session(s, origin=origin, additional_headers=headers):
                    pass
            for origin in ("https://evil.example", "null"):
                with pytest.raises(InvalidStatus) as refused:
                    async with session(s, origin=origin, additional_headers=headers):
                        pass
                assert refused.value.response.status_code == 403
                assert b"origin_not_allowed" in refused.value.response.body


async def test_a_foreign_host_is_refused_where_there_are_no_keys():
    async with stack() as s, connected(s) as (reader, writer):
        writer.write(head(Host="evil.example"))
        assert b"host_not_allowed" in await rest(reader)


async def test_refusals_before_a_session_are_answers_in_openais_shape():
    async with stack() as s:
        for query, status, code in (
            ("?model=gpt-realtime", 404, "model_not_found"),
            ("?call_id=rtc_1", 400, "unsupported"),
            ("?intent=transcription", 400, "unsupported"),
        ):
            with pytest.raises(InvalidStatus) as refused:
                async with session(s, query):
                    pass
            answer = refused.value.response
            assert answer.status_code == status
            assert json.loads(answer.body)["error"]["code"] == code
        async with session(s, ""):
            pass


async def test_sessions_are_bounded():
    async with stack(max_realtime_sessions=1) as s:
        async with session(s):
            with pytest.raises(InvalidStatus) as refused:
                async with session(s):
                    pass
            assert refused.value.response.status_code == 429
            assert refused.value.response.headers["retry-after"] == "1"
        await settle(s)
        async with session(s):
            pass


@pytest.mark.parametrize(
    "changes",
    [
        {"Sec_WebSocket_Version": "8"},
        {"Sec_WebSocket_Key": None},
        {"Upgrade": "h2c"},
        {"Connection": "keep-alive"},
    ],
)
async def test_what_is_no_handshake_is_told_how_to_make_one(changes):
    async with stack() as s, connected(s) as (reader, writer):
        writer.write(head(**{"Connection": "Upgrade", **changes}))
        answer = await reader.readuntil(b"}}")
        assert b" 426 " in answer and b"sec-websocket-version: 13" in answer
        assert b"upgrade_required" in answer


async def test_odd_handshakes_never_break_a_process():
    async with stack() as s:
        for sent in (
            head(Sec_WebSocket_Protocol="realtime, \xff"),
            head(Sec_WebSocket_Extensions="\xff"),
            head(Host="a..b"),
            head(Host="\xff"),
            head(method="POST"),
            head(path="/v1/nothing"),
            head(path="/health"),
            head(Content_Length="4") + b"body",
        ):
            async with connected(s) as (reader, writer):
                writer.write(sent + frame(CLOSE))
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 ")
        assert (await s.client.get("/live")).status_code == 200
        await settle(s)


async def test_bytes_after_the_handshake_are_frames():
    event = frame(TEXT, b'{"type":"nothing"}')
    async with stack() as s, connected(s) as (reader, writer):
        writer.write(head() + event)
        answer = await reader.readuntil(b"there is no event 'nothing'")
        assert b"session.created" in answer


# ---- what ends a session


async def test_a_stopped_gateway_ends_sessions_after_their_responses():
    async with stack(drain_timeout_s=20.0) as s:
        go = asyncio.Event()
        s.llm.step = lambda llm, index: go.wait()
        async with session(s) as busy, session(s) as idle:
            await busy.user("Hi")
            await busy.send("response.create")
            await s.llm.started.wait()
            s.server.running.stop()
            assert (await idle.event())["error"]["code"] == "server_stopping"
            with pytest.raises(ConnectionClosed) as closed:
                await idle.event()
            assert closed.value.rcvd.code == 1001
            go.set()
            done = await busy.event("response.done")
            assert done["response"]["status"] == "completed"
            assert (await busy.event())["error"]["code"] == "server_stopping"


async def test_a_response_that_outlasts_the_drain_fails():
    async with stack(drain_timeout_s=0.2) as s, session(s) as client:
        generating = hold_first_token(s)
        await client.user("Hi")
        await client.send("response.create")
        await generating.wait()
        s.server.running.stop()
        done = (await client.event("response.done"))["response"]
        assert done["status_details"]["error"]["code"] == "unavailable"
        assert (await client.event())["error"]["code"] == "server_stopping"


@pytest.mark.parametrize(
    ("limit", "code"), [("SESSION_IDLE_S", "session_idle"), ("MAX_SESSION_S", "session_expired")]
)
async def test_sessions_end_in_time(monkeypatch, limit, code):
    monkeypatch.setattr(route, limit, 0.2)
    async with stack() as s, session(s) as client:
        error = (await client.event())["error"]
        assert error["code"] == code and error["type"] == "timeout_error"
        with pytest.raises(ConnectionClosed) as closed:
            await client.event()
        assert closed.value.rcvd.code == 1001 and closed.value.rcvd.reason == code
        await settle(s)


# ---- hostile clients


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(BINARY, b"x"), 1003),
        (frame(TEXT, b"\xff"), 1007),
        (frame(3), 1002),  # An opcode that does not exist.
        (b"\x81\x02{}", 1002),  # Not masked.
        (b"\xc1" + frame(TEXT, b"{}")[1:], 1002),  # Compressed.
        (frame(PING, final=False), 1002),
        (frame(CONTINUATION, b"x"), 1002),
        (frame(TEXT, b"{", final=False) + frame(TEXT, b"}"), 1002),
        (frame(CLOSE, b"\x03\xe7"), 1002),  # 999 is no code.
        (frame(TEXT, b" " * 5000, length=2**40), 1009),
        (frame(TEXT, b" " * 3000, final=False) + frame(CONTINUATION, b" " * 3000), 1009),
    ],
)
async def test_frames_that_are_wrong_close_the_session_with_a_code(monkeypatch, sent, code):
    monkeypatch.setattr("gateway.service.MAX_EVENT_BYTES", 4096)
    monkeypatch.setattr(websocket, "CLOSE_S", 0.3)
    async with stack() as s:
        async with raw(s) as (reader, writer):
            writer.write(sent)
            assert await closed_with(reader) == code
        await settle(s)


async def test_events_that_are_wrong_are_answered_and_the_session_goes_on():
    async with stack() as s, session(s) as client:
        for text in ("", "{", "[]", "3", "null", '"x"', '{"type":3}', '{"a":' * 300, "\x00"):
            await client.ws.send(text)
            assert (await client.event())["error"]["type"] == "invalid_request_error"
        await client.user("Hi")
        await client.send("response.create")
        assert (await client.event("response.done"))["response"]["status"] == "completed"


async def test_a_message_is_counted_while_it_arrives(monkeypatch):
    monkeypatch.setattr(websocket, "CLOSE_S", 0.3)
    async with stack(max_bytes_in_flight=10_000) as s, raw(s) as (reader, writer):
        writer.write(frame(TEXT, b" " * 5000, length=9000))
        await until(lambda: s.gateway.admission.bytes.held == 5000)
        writer.write(frame(TEXT, b" " * 9000, length=9000)[8:])
        assert s.gateway.admission.sessions.held
    await settle(s)
    async with stack(max_bytes_in_flight=4000) as s, raw(s) as (reader, writer):
        writer.write(frame(TEXT, b" " * 5000))
        assert await closed_with(reader) == 1013


async def test_a_message_that_stops_arriving_ends_its_session():
    async with stack(stall_timeout_s=0.2) as s:
        async with raw(s) as (reader, writer):
            writer.write(frame(TEXT, b" " * 10, length=9000))
            assert b"session.created" in await rest(reader)
        await settle(s)


async def test_floods_of_small_frames_are_paced_and_cost_no_memory():
    async with stack() as s:
        async with raw(s) as (_, writer):
            writer.write(frame(TEXT, b"{", final=False) + frame(CONTINUATION, final=False) * 500)
            writer.write(frame(PING, b"x" * 100) * 500)
            (socket,) = (
                each for each in s.server.server_state.connections if hasattr(each, "queue")
            )
            await until(lambda: socket._paced)
            assert len(socket._unparsed) < 2**16
            assert (await s.client.get("/live")).status_code == 200
        await settle(s)


async def test_pings_of_a_client_that_does_not_read_are_answered_once():
    async with stack() as s, raw(s) as (reader, writer):
        socket = socket_of(s)
        await reader.readuntil(b"}}")
        socket.pause_writing()
        writer.write(frame(PING, b"1") + frame(PING, b"2"))
        await until(lambda: socket._unanswered is not None and socket._unanswered.payload == b"2")
        socket.resume_writing()
        assert await reader.readexactly(3) == b"\x8a\x012"


async def test_events_are_taken_at_a_bounded_rate(monkeypatch):
    monkeypatch.setattr(route, "EVENTS_PER_S", 20)
    waited = []
    sleep = asyncio.sleep

    async def watched(seconds):
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(route.asyncio, "sleep", watched)
    async with stack() as s, session(s) as client:
        for _ in range(40):
            await client.send("conversation.item.retrieve", item_id="x")
        for _ in range(40):
            await client.event()
    assert [seconds for seconds in waited if 0 < seconds <= 1]


async def test_a_session_and_each_response_leave_a_line(caplog):
    caplog.set_level(logging.INFO, "gateway.edge.middleware")
    async with stack(keys=keys_of(ada="sk-1")) as s:
        headers = {"Authorization": "Bearer sk-1", "x-request-id": "mine"}
        async with session(s, additional_headers=headers) as client:
            await client.user("Hi")
            await client.send("response.create")
            await client.event("response.done")
        await settle(s)
    lines = [r for r in caplog.records if r.getMessage() in ("session", "request")]
    response, whole = (r for r in lines if getattr(r, "fields", {}).get("path") == "/v1/realtime")
    assert response.getMessage() == "request" and response.fields["status"] == 200
    assert response.fields["completion_tokens"] == 4 and response.fields["key"] == "ada"
    assert whole.getMessage() == "session" and whole.fields["status"] == 101
    assert whole.fields["responses"] == 1 and whole.fields["closed"] == 1000
