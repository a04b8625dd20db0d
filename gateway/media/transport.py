"""Connections to media servers, and bounds on the work that a server can cause over one.

A server chooses how its bytes arrive: one by one, or after thousands of 1xx answers. Each read
costs the event loop a tenth of a millisecond, however little it brings. So after many small reads
the next one waits until more has arrived. Headers, including 1xx answers before them, are read in
small steps. The bytes of headers and of a whole connection are bounded.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import anyio
import httpcore2
from anyio.abc import ByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

from gateway.edge.limits import FREE_SMALL_READS, MAX_MEDIA_HEAD_BYTES, SMALL_READ_DELAY_S

HEAD_STEP_BYTES = 2**12  # Bytes of headers that are parsed before other tasks run.
SMALL_READ_BYTES = 2**12


class UnreadableAnswer(httpcore2.ReadError):
    """A server's answer is refused or cut off. The message continues ``the fetch from HOST``."""


class PacedStream(ByteStream):
    """The bytes of a connection, below TLS. Reads are delayed after many small ones."""

    def __init__(self, inner: ByteStream, max_bytes: int) -> None:
        self._inner = inner
        self._left = max_bytes
        self._small_reads = 0
        self._delay = False

    async def receive(self, max_bytes: int = 2**16) -> bytes:
        if self._delay:
            await asyncio.sleep(SMALL_READ_DELAY_S)
        data = await self._inner.receive(max_bytes)
        small = len(data) < min(SMALL_READ_BYTES, max_bytes)
        self._small_reads += small
        self._delay = small and self._small_reads > FREE_SMALL_READS
        self._left -= len(data)
        if self._left < 0:
            raise UnreadableAnswer("sent far more than a picture's bytes")
        return data

    async def send(self, item: bytes) -> None:
        await self._inner.send(item)

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()


class MediaStream(httpcore2.AsyncNetworkStream):
    """A connection for httpcore2. Only connecting has a timeout of its own; the timeout of the
    whole fetch covers reading and writing. The user sets ``head_read`` once an answer's headers are
    read."""

    def __init__(self, socket: ByteStream) -> None:
        self._socket = socket
        self._head_left = MAX_MEDIA_HEAD_BYTES
        self.head_read = False

    async def read(
        self,
        max_bytes: int,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bytes:
        if not self.head_read:
            if self._head_left <= 0:
                raise UnreadableAnswer(
                    f"was answered with more than {MAX_MEDIA_HEAD_BYTES} bytes of headers"
                )
            max_bytes = min(max_bytes, HEAD_STEP_BYTES, self._head_left)
        try:
            data = await self._socket.receive(max_bytes)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError) as error:
            raise httpcore2.ReadError from error
        if not self.head_read:
            self._head_left -= len(data)
            await asyncio.sleep(0)
        return data

    async def write(
        self,
        buffer: bytes,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> None:
        try:
            await self._socket.send(buffer)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError) as error:
            raise httpcore2.WriteError from error

    async def aclose(self) -> None:
        await self._socket.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> MediaStream:
        try:
            async with asyncio.timeout(timeout):
                wrapped = await TLSStream.wrap(
                    self._socket,
                    server_side=False,
                    hostname=server_hostname,
                    ssl_context=ssl_context,
                    standard_compatible=False,
                )
        except BaseException as error:
            await anyio.aclose_forcefully(self._socket)
            if isinstance(error, TimeoutError):
                raise httpcore2.ConnectTimeout from error
            if isinstance(error, (anyio.EndOfStream, anyio.BrokenResourceError, ssl.SSLError)):
                raise httpcore2.ConnectError from error
            raise
        return MediaStream(wrapped)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._socket.extra(TLSAttribute.ssl_object, None)
        return None


class MediaNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to addresses; does not resolve names."""

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes``: the most that one connection may receive."""
        self._max_bytes = max_bytes

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> MediaStream:
        try:
            async with asyncio.timeout(timeout):
                socket = await anyio.connect_tcp(host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout from error
        except OSError as error:
            raise httpcore2.ConnectError from error
        return MediaStream(PacedStream(socket, self._max_bytes))
