"""Places are not held by clients that send or read slowly or not at all: others are served
meanwhile, and the places come back."""

import asyncio
import contextlib
import json
import socket

import pytest

from gateway.edge.connections import Wait
from gateway.edge.limits import PROGRESS_BYTES
from tests.fakes import until
from tests.gateways import body, connected, keys_of, rest, stack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]

BARE = {"encoders": 0, "llms": 0, "ready": False}
ADA, BOB = ({"authorization": f"Bearer sk-{name}"} for name in ("ada", "bob"))
KEYS = keys_of(ada="sk-ada", bob="sk-bob")
SOCKETS = 60
GET = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n"
    b"authorization: Bearer sk-bob\r\n\r\n"
)


@contextlib.asynccontextmanager
async def crowd(s, sent, number=SOCKETS, address="127.0.0.1"):
    """Clients that send so much, and read nothing. Yields their sockets, some closed by the
    server."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as exits:
        clients = []
        for _ in range(number):
            client = exits.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            client.bind((address, 0))
            url = s.client.base_url
            await loop.sock_connect(client, (url.host, url.port))
            with contextlib.suppress(BlockingIOError):
                client.send(sent)
            clients.append(client)
        yield clients


def waiting(s, wait):
    return [c for c in s.server.server_state.connections if c.wait is wait]


async def ask(s, path, headers=None):
    """By a connection of its own."""
    headers = {"connection": "close", **(headers or {})}
    return (await s.client.get(path, headers=headers)).status_code


async def test_sixty_sockets_that_pipeline_and_read_nothing_keep_no_place():
    """Of as many places: others are served as fast as they ask, and then all places are free."""
    async with stack(**BARE, max_connections=SOCKETS, stall_timeout_s=2.0) as s:
        await ask(s, "/openapi.json")  # Written when it is first asked for.
        async with crowd(s, GET * 400, address="127.0.0.2"):
            await until(lambda: len(waiting(s, Wait.READER)) == SOCKETS)
            for _ in range(20):
                assert await ask(s, "/v1/models") == 200
            await until(lambda: not s.server.server_state.connections)
        await until(lambda: not s.gateway.running._limits)  # No request is left behind.


async def test_whoever_reads_late_gets_the_whole_answer():
    last = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    async with stack(**BARE) as s:
        whole = (await s.client.get("/openapi.json")).content
        async with crowd(s, GET * 20 + last, 1) as (client,):
            await until(lambda: waiting(s, Wait.READER))
            told = b""
            while piece := await asyncio.get_running_loop().sock_recv(client, 2**16):
                told += piece
        assert told.count(whole) == 21


async def test_requests_that_are_sent_ahead_are_not_read_ahead():
    """They wait at their client, however fast others before them are answered."""
    head = b"POST /v1/apply_template HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n"
    ahead = (head + b"{}") * 50_000
    async with stack(**BARE) as s, connected(s) as (reader, writer):
        writer.write(ahead)
        kept = 0
        for _ in range(200):
            assert b" 400 Bad" in await reader.readuntil(b"}}")
            (connection,) = s.server.server_state.connections
            kept = max(kept, len(connection.conn.trailing_data[0]))
        assert 0 < kept < len(ahead) / 8
        assert connection.wait is Wait.TURN
        writer.transport.abort()


async def test_requests_that_are_sent_ahead_keep_no_place_from_another_key():
    """While they are answered, and their client reads."""
    ahead = HEAD.replace(b"1000", b"2") + b"{}"
    async with stack(keys=KEYS, max_connections=4) as s, contextlib.AsyncExitStack() as exits:
        for _ in range(4):
            _, writer = await exits.enter_async_context(connected(s))
            exits.callback(writer.transport.abort)
            writer.write(ahead * 20_000)
        await until(lambda: len(waiting(s, Wait.TURN)) >= 3)
        for _ in range(3):
            assert (await s.chat(headers={**ADA, "connection": "close"})).status_code == 200


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"{", HEAD.partition(b"content")[0]])
async def test_heads_and_bodies_that_do_not_come_keep_no_place_from_another_key(sent):
    """All by one address, as behind a proxy."""
    async with stack(keys=KEYS, max_connections=SOCKETS, max_concurrent_requests=4) as s:
        async with crowd(s, sent):
            whole = b"\r\n\r\n" in sent
            await until(lambda: len(waiting(s, Wait.BODY if whole else Wait.HEAD)) >= SOCKETS - 1)
            assert s.gateway.admission.requests.held == 0
            for _ in range(20):
                headers = {**ADA, "connection": "close"}
                assert (await s.chat(headers=headers)).status_code == 200
        await until(s.idle)


@pytest.mark.parametrize("sent", [HEAD, HEAD + b" " * 999])
async def test_a_body_that_stalls_is_a_408_and_the_end_of_its_connection(sent):
    async with stack(keys=KEYS, stall_timeout_s=0.3) as s, connected(s) as (reader, writer):
        writer.write(sent)
        told = await rest(reader)
        assert told.startswith(b"HTTP/1.1 408 ") and b"connection: close" in told
        assert b"--stall-timeout-s" in told
        await until(s.idle)
        await until(lambda: not s.server.server_state.connections)


async def test_a_body_that_keeps_coming_is_waited_for():
    """For longer than a client may pause."""
    text, pieces = json.dumps(body()).encode(), 50
    head = HEAD.replace(b"1000", b"%d" % (len(text) + pieces * PROGRESS_BYTES))
    async with stack(keys=KEYS, stall_timeout_s=2.0) as s, connected(s) as (reader, writer):
        began = asyncio.get_running_loop().time()
        writer.write(head)
        for _ in range(pieces):
            writer.write(b" " * PROGRESS_BYTES)
            await asyncio.sleep(2.5 / pieces)
        assert asyncio.get_running_loop().time() > began + 2.0
        writer.write(text)
        assert b" 200 OK" in await reader.readuntil(b"\r\n")


async def test_without_its_key_a_body_is_not_waited_for():
    async with stack(keys=KEYS, max_connections=SOCKETS) as s:
        sent = HEAD.replace(b"sk-bob", b"sk-eve")
        async with crowd(s, sent) as clients:
            await until(lambda: len(waiting(s, Wait.HEAD)) >= SOCKETS)
            loop = asyncio.get_running_loop()
            for client in clients:
                assert b" 401 " in await loop.sock_recv(client, 100)
            assert (await s.chat(headers=ADA)).status_code == 200


async def test_one_address_that_takes_all_gives_way_to_others():
    async with stack(max_connections=SOCKETS) as s, crowd(s, HEAD, address="127.0.0.2"):
        await until(lambda: len(waiting(s, Wait.BODY)) >= SOCKETS - 1)
        asked = [s.chat(headers={"connection": "close"}) for _ in range(20)]
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
        held = s.gateway.connections._by_address["127.0.0.2"]
        assert held >= SOCKETS - 21  # No more than were needed are closed.


async def test_an_address_may_have_a_bound_of_its_own():
    async with stack(max_connections_per_address=3) as s, crowd(s, b"", 5, "127.0.0.2") as clients:
        await until(lambda: s.gateway.connections._by_address["127.0.0.2"] == 3)
        loop = asyncio.get_running_loop()
        for client in clients[3:]:
            with contextlib.suppress(ConnectionResetError):
                assert await loop.sock_recv(client, 1) == b""
        assert (await s.chat()).status_code == 200


async def test_a_key_that_has_its_share_is_refused_and_others_are_served():
    async with stack(keys=KEYS, max_concurrent_requests=8) as s:
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        asked = [asyncio.create_task(s.chat(headers=BOB)) for _ in range(12)]
        await until(lambda: s.llm.running == 6 and sum(task.done() for task in asked) == 6)
        ours = [asyncio.create_task(s.chat(headers=ADA)) for _ in range(2)]
        await until(lambda: s.llm.running == 8)
        go.set()
        assert [(await answer).status_code for answer in ours] == [200, 200]
        theirs = [await answer for answer in asked]
        assert sorted(answer.status_code for answer in theirs) == [200] * 6 + [429] * 6
        refused = next(answer for answer in theirs if answer.status_code == 429)
        assert "its fair share" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]


async def test_without_keys_addresses_share():
    async with stack(max_concurrent_requests=8) as s:
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        alone = [asyncio.create_task(s.chat()) for _ in range(7)]
        await until(lambda: s.llm.running == 7)  # One address alone may have all.
        async with connected(s, "127.0.0.2") as (reader, writer):
            await until(lambda: s.gateway.connections.holders == 2)
            assert (await s.chat()).status_code == 429
            raw = json.dumps(body()).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            writer.write(head + b"content-length: %d\r\n\r\n" % len(raw) + raw)
            await until(lambda: s.llm.running == 8)
            go.set()
            assert b" 200 OK" in await reader.readuntil(b"\r\n")
        assert [(await answer).status_code for answer in alone] == [200] * 7
