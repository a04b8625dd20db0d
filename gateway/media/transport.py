"""The connections that media come over, and how much work a server can make of one.

A server chooses how its bytes arrive: one by one, or behind thousands of empty answers (1xx). Each
piece costs the event loop a tenth of a millisecond, whatever it carries. So small pieces are not
read one by one but given time to become large ones; the head of an answer is read in small steps
and bounded, with all that comes before it; and so is all that a connection brings.
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

MAX_HEAD_BYTES = 2**15  # Of an answer, with the 1xx answers before it.
HEAD_STEP_BYTES = 2**12  # Parsed between two turns of other tasks.
SMALL_BYTES = 2**12
FREE_SMALL_READS = 32
PAUSE_S = 0.005  # Before the next read once small ones are no longer free: 200 a second.


class TooMuch(httpcore2.ReadError):
    """A server sends more than is read, or in more pieces; the message continues ``the fetch``."""


class Socket(ByteStream):
    """What the network brings, unciphered or not."""

    def __init__(self, inner: ByteStream, max_bytes: int) -> None:
        self._inner = inner
        self._left = max_bytes
        self._small_reads = 0
        self._pause = False

    async def receive(self, max_bytes: int = 2**16) -> bytes:
        if self._pause:
            await asyncio.sleep(PAUSE_S)
        data = await self._inner.receive(max_bytes)
        small = len(data) < min(SMALL_BYTES, max_bytes)
        self._small_reads += small
        self._pause = small and self._small_reads > FREE_SMALL_READS
        self._left -= len(data)
        if self._left < 0:
            raise TooMuch("brought much more than a picture's bytes")
        return data

    async def send(self, item: bytes) -> None:
        await self._inner.send(item)

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Stream(httpcore2.AsyncNetworkStream):
    """A connection as httpcore2 uses one. Only connecting has a time of its own: reading and
    writing end with the fetch. ``head_read`` is set once the answer's head is there."""

    def __init__(self, socket: ByteStream) -> None:
        self._socket = socket
        self._head_left = MAX_HEAD_BYTES
        self.head_read = False

    async def read(
        self,
        max_bytes: int,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bytes:
        if not self.head_read:
            if self._head_left <= 0:
                raise TooMuch(f"was answered with more than {MAX_HEAD_BYTES} bytes of headers")
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
    ) -> Stream:
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
        return Stream(wrapped)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._socket.extra(TLSAttribute.ssl_object, None)
        return None


class Network(httpcore2.AsyncNetworkBackend):
    """Connects to addresses; it resolves no name."""

    def __init__(self, max_bytes: int) -> None:
        """``max_bytes``: all that one connection may bring."""
        self._max_bytes = max_bytes

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Stream:
        try:
            async with asyncio.timeout(timeout):
                socket = await anyio.connect_tcp(host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout from error
        except OSError as error:
            raise httpcore2.ConnectError from error
        return Stream(Socket(socket, self._max_bytes))
