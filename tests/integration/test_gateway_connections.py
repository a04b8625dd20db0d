"""Connections that do nothing are closed, and those with work are left alone."""

import asyncio
import contextlib
import json
import resource
import subprocess
import sys

import pytest

from gateway.edge import connections, http1
from gateway.edge.connections import Wait
from gateway.edge.http1 import READ_BYTES, Connection
from opticnerve.errors import ConfigError
from tests.fakes import until
from tests.gateways import body, connected, rest, stack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


async def drip(writer, text=b"x"):
    """Sends a byte now and then, for ever."""
    with contextlib.suppress(OSError):
        while True:
            writer.write(text)
            await writer.drain()
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def dripping(writer, text=b"x"):
    task = asyncio.create_task(drip(writer, text))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.parametrize("sent", [b"", b"GET /live HTTP/1.1\r\nx-long: "])
async def test_a_connection_without_a_whole_head_is_closed(sent, monkeypatch):
    monkeypatch.setattr(connections, "FIRST_HEAD_TIMEOUT_S", 0.2)
    async with stack(encoders=0, llms=0, ready=False) as s, connected(s) as (reader, writer):
        writer.write(sent)
        async with dripping(writer) if sent else contextlib.nullcontext():
            assert await rest(reader) == b""


async def test_a_body_that_nobody_reads_keeps_no_connection(monkeypatch):
    monkeypatch.setattr(http1, "IDLE_TIMEOUT_S", 0.2)
    async with stack(encoders=0, llms=0, ready=False) as s, connected(s) as (reader, writer):
        head = b"POST /v1/nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
        writer.write(head)
        async with dripping(writer):
            assert (await rest(reader)).startswith(b"HTTP/1.1 404 ")


async def test_a_connection_rests_before_and_after_its_requests_and_not_meanwhile():
    async with stack() as s:
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        asked = asyncio.create_task(s.chat())
        await until(lambda: s.llm.running)
        (connection,) = s.server.server_state.connections
        assert connection.wait is None
        go.set()
        assert (await asked).status_code == 200
        await until(lambda: connection.wait is Wait.HEAD)


async def test_beyond_the_limit_the_connection_longest_at_rest_is_closed():
    async with contextlib.AsyncExitStack() as exits:
        s = await exits.enter_async_context(stack(max_connections=3))
        served = s.server.server_state.connections
        assert (await s.client.get("/live")).status_code == 200
        (first,) = served
        idle = []
        for _ in range(3):
            idle.append(await exits.enter_async_context(connected(s)))
            await until(lambda: len(served) == min(len(idle) + 1, 3))
        await until(lambda: first not in served)
        assert (await s.client.get("/live")).status_code == 200  # By a new connection.
        assert await rest(idle[0][0]) == b""
        await until(lambda: len(served) == 3)
        idle[2][1].write(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 OK" in await idle[2][0].readuntil(b"\r\n")


async def test_connections_at_work_are_not_closed_for_new_ones():
    async with stack(max_connections=2) as s:
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        asked = [asyncio.create_task(s.chat()) for _ in range(2)]
        await until(lambda: s.llm.running == 2)
        async with connected(s) as (reader, _):
            assert await rest(reader) == b""
        go.set()
        assert [(await answer).status_code for answer in asked] == [200, 200]


@pytest.fixture
def limits(monkeypatch):
    """(soft, hard) limits of open files as they are set one after another."""
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    return limits


def test_the_limit_of_files_is_raised_to_what_connections_and_workers_need(limits):
    connections.allow_files(500, workers=2)
    assert len(limits) == 1
    connections.allow_files(2000, workers=3)
    assert limits[-1] == (2259, 4096)
    limits[-1] = (1024, resource.RLIM_INFINITY)
    connections.allow_files(9000, workers=0)
    assert limits[-1] == (9256, resource.RLIM_INFINITY)


def test_a_limit_of_files_that_is_too_low_for_the_connections_is_refused(limits):
    with pytest.raises(ConfigError) as refused:
        connections.allow_files(9000, workers=4)
    told = refused.value.message
    assert "--max-connections 9000 needs 9260 open files" in told and "only 4096" in told
    assert "ulimit -n to 9260, or set --max-connections 3836 or less" in told
    connections.allow_files(3836, workers=4)
    assert limits[-1] == (4096, 4096)
    limits[-1] = (64, 64)
    with pytest.raises(ConfigError, match=r"raise ulimit -n to 260$"):
        connections.allow_files(1, workers=3)


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [("up",), ("gateway", "--llm-addresses", "127.0.0.1:9", "--encoder-addresses", "127.0.0.1:9")],
)
def test_a_process_with_too_few_files_does_not_start(command):
    run = [sys.executable, "-m", "opticnerve", *command, "--port", "0"]
    limited = ["sh", "-c", 'ulimit -n 1024 && exec "$@"', "sh", *run]
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "needs 4354 open files" in ended.stderr and ended.stderr.count("\n") == 1


async def test_a_body_in_crumbs_is_read_in_short_steps_with_rests(monkeypatch):
    monkeypatch.setattr(connections, "BODY_CHUNKS_PER_S", 100_000)
    steps, rests, delay_s = [], [], connections.Connections.pacing_delay_s

    def counted(owner, connection, chunks):
        steps.append(chunks)
        rests.append(delay_s(owner, connection, chunks))
        return rests[-1]

    monkeypatch.setattr(connections.Connections, "pacing_delay_s", counted)
    sent = json.dumps(body()).encode().ljust(30_000)
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in sent) + b"0\r\n\r\n"
    async with stack() as s, connected(s) as (reader, writer):
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + crumbs
        )
        assert (await rest(reader)).startswith(b"HTTP/1.1 200 ")
    assert sum(steps) == len(sent)
    assert max(steps) <= READ_BYTES // 6 + 1
    assert sum(rests) > 0.2


async def test_a_large_body_of_known_length_is_read_in_large_steps(monkeypatch):
    reads, data_received = [], Connection.data_received

    def counted(connection, data):
        reads.append(len(data))
        data_received(connection, data)

    monkeypatch.setattr(Connection, "data_received", counted)
    async with stack() as s:
        padded = json.dumps(body()).encode().ljust(2**21)
        answer = await s.client.post("/v1/chat/completions", content=padded)
    assert answer.status_code == 200
    assert max(reads) > READ_BYTES
