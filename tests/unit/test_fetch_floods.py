"""What a fetch costs where the server means harm: the loop's CPU and turns, and bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat

import pytest

from gateway.edge.admission import SharedCapacity
from gateway.edge.limits import FREE_SMALL_READS, LEAST_CHUNK_BYTES, SMALL_READ_DELAY_S
from gateway.media import fetch as fetching
from gateway.media import response_body as bodies
from gateway.media.fetch import MediaFetcher
from gateway.media.transport import PacedStream
from opticnerve.config import GatewayConfig
from opticnerve.errors import MediaFetchFailed, OpticNerveError
from tests.media_server import Server, run

pytestmark = pytest.mark.slow

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MAX_BYTES = 2**20
MANY = "answered with more than 32768 bytes of headers"
CRUMBS = "chunks of a few bytes"


@contextlib.contextmanager
def sending(pieces: Iterable[bytes]) -> Iterator[int]:
    """The port of a server that answers with ``pieces``, in packets of their own where it can. It
    works in a thread of its own, whose CPU is not the fetch's."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(10)


def flood(first: bytes, unit: bytes) -> Iterable[bytes]:
    """``first``, and then ``unit`` for ever."""
    return chain([first], repeat(unit))


def packets(answer: bytes, size: int = 300) -> Iterable[bytes]:
    return [answer[start : start + size] for start in range(0, len(answer), size)]


@dataclass
class Cost:
    """CPU of the loop's thread, in seconds: in all, and the longest between two turns of
    another task."""

    error: OpticNerveError
    cpu: float = 0.0
    longest: float = 0.0


async def fetched(port: int, timeout_s: float) -> Cost:
    fetch = MediaFetcher(
        GatewayConfig(
            allow_private_media=True, media_timeout_s=timeout_s, max_media_bytes=MAX_BYTES
        )
    )
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.002)
            longest = max(longest, time.thread_time() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    before = time.thread_time()
    with pytest.raises(OpticNerveError) as caught:
        await fetch.fetch(f"http://127.0.0.1:{port}/x")
    cost = Cost(caught.value, time.thread_time() - before, longest)
    watching.cancel()
    return cost


@pytest.mark.parametrize(
    ("first", "unit", "said"),
    [
        (b"", b"HTTP/1.1 100 C\r\n\r\n" * 1000, MANY),
        (b"", b"HTTP/1.1 103 C\r\nLink: </a>\r\n\r\n" * 1000, MANY),
        (OK, b"X: y\r\n" * 1000, MANY),
        (OK + b"X: ", b"y" * 1000, MANY),
        (CHUNKED, b"1\r\nx\r\n" * 1000, CRUMBS),
        (CHUNKED, (b"40\r\n" + b"x" * 64 + b"\r\n") * 100, CRUMBS),
        (CHUNKED, b"1;" + b"a" * 90_000 + b"\r\nx\r\n", "more than a picture's bytes"),
        (CHUNKED, b"1;" + b"a" * 9_000, "broke off"),
        (CHUNKED + b"0\r\n", b"X: y\r\n" * 1000, "broke off"),
    ],
    ids=[
        "100",
        "103",
        "headers",
        "header",
        "bytes",
        "crumbs",
        "extensions",
        "extension",
        "trailer",
    ],
)
def test_a_flood_is_cut(first: bytes, unit: bytes, said: str) -> None:
    """Not at the time cap, which no test of this length reaches."""
    with sending(flood(first, unit)) as port:
        cost = asyncio.run(fetched(port, 600))
    assert said in cost.error.message
    assert cost.cpu < 2.0  # Of some hundredths.
    assert cost.longest < 0.1


def test_a_body_byte_by_byte_is_read_in_pieces() -> None:
    """Each read costs a tenth of a millisecond, whatever it brings: without a pause between small
    ones such a server takes a core."""
    reads = 0
    receive = PacedStream.receive

    async def counted(self: PacedStream, max_bytes: int = 2**16) -> bytes:
        nonlocal reads
        reads += 1
        return await receive(self, max_bytes)

    seconds = 1.5
    with pytest.MonkeyPatch.context() as patch, sending(flood(OK + b"\r\n", b"x")) as port:
        patch.setattr(PacedStream, "receive", counted)
        cost = asyncio.run(fetched(port, seconds))
    assert "longer than" in cost.error.message or "larger" in cost.error.message
    assert reads < 2 * (FREE_SMALL_READS + seconds / SMALL_READ_DELAY_S)


def test_a_picture_in_honest_pieces_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small packets and chunks of twice the least size, more of them than are free. A chunk that
    two reads bring counts as two."""
    monkeypatch.setattr(bodies, "FREE_MEDIA_CHUNKS", 50)
    size = 2 * LEAST_CHUNK_BYTES
    body = b"".join(b"%x\r\n" % size + bytes([i]) * size + b"\r\n" for i in range(200))

    async def work(server: Server, fetch: MediaFetcher) -> None:
        with sending(packets(CHUNKED + body + b"0\r\n\r\n")) as port:
            data = await fetch.fetch(f"http://127.0.0.1:{port}/x")
        assert len(data) == 200 * size and data[-1] == 199

    run(work)


def test_early_hints_come_before_an_answer() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 20
    answer += OK + b"Content-Length: 3\r\n\r\nabc"

    async def work(server: Server, fetch: MediaFetcher) -> None:
        with sending(packets(answer)) as port:
            assert await fetch.fetch(f"http://127.0.0.1:{port}/x") == b"abc"

    run(work)


def test_one_slow_server_leaves_connections_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_FETCHES", 4)
    monkeypatch.setattr(fetching, "MAX_FETCHES_PER_ADDRESS", 3)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2" if host == "slow.example" else "127.0.0.1"]

    async def work(server: Server, fetch: MediaFetcher) -> None:
        async with contextlib.AsyncExitStack() as exits:
            slow = await asyncio.start_server(lambda *_: asyncio.sleep(600), "127.0.0.2", 0)
            exits.callback(slow.close)
            port = slow.sockets[0].getsockname()[1]
            url = f"http://slow.example:{port}/x"
            waiting = [asyncio.create_task(fetch.fetch(url)) for _ in range(20)]
            while fetch._slots.held < 3:  # Those that hold the address' share.
                await asyncio.sleep(0.01)
            assert await fetch.fetch(server.url("/ok", "quick.example"))
            assert fetch._slots.held == 3
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert fetch._slots.held == 0

    run(work, fetcher={"resolve": resolve})


async def _shares() -> None:
    shares = SharedCapacity("slots", 3, 2)
    order: list[str] = []

    async def want(name: str) -> None:
        await shares.acquire(name)
        order.append(name)

    tasks = [asyncio.create_task(want(name)) for name in ("a", "a", "a", "a", "b", "c")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["a", "a", "b"] and shares.held == 3
    tasks[2].cancel()
    await asyncio.gather(tasks[2], return_exceptions=True)
    shares.release("b")  # The fourth of a still has no room; c has.
    await asyncio.sleep(0)
    assert order == ["a", "a", "b", "c"]
    shares.release("a")
    tasks[3].cancel()  # Too late: the place is its own by now, and is given back.
    await asyncio.gather(*tasks, return_exceptions=True)
    assert shares.held == 2 and not shares._waiting
    shares.release("a")
    shares.release("c")
    assert shares.held == 0 and not shares._by_holder


def test_shares_are_given_in_order_past_who_has_his() -> None:
    asyncio.run(_shares())


def test_a_time_cap_of_its_own_for_connecting() -> None:
    """A server that takes the connection and never speaks TLS."""

    async def work(server: Server, fetch: MediaFetcher) -> None:
        silent = await asyncio.start_server(lambda *_: asyncio.sleep(600), "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        with pytest.raises(MediaFetchFailed, match="could not connect"):
            await fetch.fetch(f"https://127.0.0.1:{port}/x")
        silent.close()

    run(work, media_timeout_s=1.5)
