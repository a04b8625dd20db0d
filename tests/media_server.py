"""An HTTP server with bad manners, and a media fetcher that may reach it. For tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import random
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.media.fetch import MediaFetcher
from opticnerve.config import GatewayConfig
from opticnerve.errors import OpticNerveError

BODY = b"bytes of a picture" * 50


def deflated(body: bytes, wbits: int) -> bytes:
    made = zlib.compressobj(9, wbits=wbits)
    return made.compress(body) + made.flush()


@functools.cache
def coded() -> dict[str, tuple[str, bytes]]:
    """By name: a Content-Encoding, and what is sent for BODY."""
    return {
        "gzip": ("gzip", gzip.compress(BODY)),
        "x-gzip": ("X-GZip", gzip.compress(BODY)),
        "members": ("gzip", gzip.compress(BODY[:100]) + gzip.compress(BODY[100:]) + bytes(100)),
        "deflate": ("deflate", deflated(BODY, 15)),
        "deflate-raw": ("deflate", deflated(BODY, -15)),
        "identity": ("identity", BODY),
        "empty": ("", BODY),
        "identity-gzip": ("identity, gzip,", gzip.compress(BODY)),
        "br": ("br", BODY),
        "zstd": ("zstd", BODY),
        "twice": ("gzip, gzip", gzip.compress(gzip.compress(BODY))),
        "odd": ("<b>secret</b>", BODY),
        "no-gzip": ("gzip", BODY),
        "half": ("gzip", gzip.compress(BODY)[:-9]),
        "one-byte": ("deflate", b"x"),
        "wrong-sum": ("gzip", gzip.compress(BODY)[:-8] + bytes(8)),
        "nothing": ("gzip", b""),
        "large": ("gzip", gzip.compress(bytes(100_001))),
        "large-as-sent": ("gzip", gzip.compress(random.Random(1).randbytes(110_000))),
        "padding": ("gzip", gzip.compress(BODY) + bytes(2**20)),
        "huge": ("gzip", gzip.compress(bytes(2**27))),
    }


Handler = Callable[["Server", str, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A tiny HTTP server: paths to handlers, requests remembered as raw heads."""

    port: int = 0
    heads: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


def response(status: str, body: bytes = b"", length: bool = True, **headers: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\n"
    for name, value in headers.items():
        head += f"{name.replace('_', '-')}: {value}\r\n"
    if length:
        head += f"Content-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


async def answer(server: Server, path: str, writer: asyncio.StreamWriter) -> None:
    if path == "/ok":
        writer.write(response("200 OK", BODY, Set_Cookie="a=b"))
    elif path.startswith("/to/"):  # /to/<anything>: redirected there.
        writer.write(response("302 Found", Location=path[4:]))
    elif path == "/loop":
        writer.write(response("301 Moved Permanently", Location="/loop"))
    elif path.startswith("/hops/"):
        left = int(path[6:])
        to = f"/hops/{left - 1}" if left > 1 else "/ok"
        writer.write(response("307 Temporary Redirect", Location=to))
    elif path == "/slow":
        writer.write(response("200 OK", length=False))
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
    elif path == "/silent":
        await asyncio.sleep(600)
    elif path == "/announced":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n")
    elif path == "/endless":
        writer.write(response("200 OK", length=False))
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65536))
                await writer.drain()
    elif path == "/short":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
    elif path.startswith("/coded/"):  # /coded/<name of an entry of ``coded``>
        coding, body = coded()[path[7:]]
        writer.write(response("200 OK", body, length=False, Content_Encoding=coding))
    elif path == "/trickle":  # A byte at a time.
        writer.write(response("200 OK", length=False, Content_Encoding="gzip"))
        for byte in coded()["gzip"][1]:
            writer.write(bytes([byte]))
            await writer.drain()
    elif path == "/rubbish":
        writer.write(b"secret rubbish\r\n\r\n")
    else:
        writer.write(response("404 Not Found", b"secret page"))


@contextlib.asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    coded()  # Before anything is timed or its memory measured.
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            server.heads.append(head)
            server.asked.set()
            await answer(server, head.split(" ")[1], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            tasks.discard(task)
            server.closed.set()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class FakeResolver:
    """Names to addresses; a list of lists answers differently each time."""

    def __init__(self, **names: list[Any]) -> None:
        self.names = {name.replace("_", "."): answers for name, answers in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.names.get(host)
        if answers is None:
            raise OSError("no such name")
        if answers and isinstance(answers[0], list):
            return list(answers.pop(0) if len(answers) > 1 else answers[0])
        return list(answers)


def run(
    work: Callable[[Server, MediaFetcher], Awaitable[Any]],
    *,
    tls: ssl.SSLContext | None = None,
    resolve: FakeResolver | None = None,
    fetcher: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Runs ``work`` with a server and a fetcher that may reach it."""
    config = GatewayConfig(**{"allow_private_media": True, "media_timeout_s": 60.0, **settings})
    extra: dict[str, Any] = dict(fetcher or {})
    if resolve is not None:
        extra["resolve"] = resolve

    async def main() -> Any:
        async with serving(tls) as server:
            return await work(server, MediaFetcher(config, **extra))

    return asyncio.run(main())


def fails(path: str, kind: type[OpticNerveError], said: str, **options: Any) -> OpticNerveError:
    async def work(server: Server, fetch: MediaFetcher) -> OpticNerveError:
        with pytest.raises(kind, match=said) as caught:
            await fetch.fetch(server.url(path), param="messages.0.content.1")
        assert type(caught.value) is kind
        assert caught.value.param == "messages.0.content.1"
        assert "secret" not in caught.value.message
        return caught.value

    error: OpticNerveError = run(work, **options)
    return error


def fetch_only(url: str, **settings: Any) -> bytes:
    async def work(server: Server, fetch: MediaFetcher) -> bytes:
        return await fetch.fetch(url, param="here")

    data: bytes = run(work, **settings)
    return data
