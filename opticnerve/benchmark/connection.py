"""HTTP/1.1 to one server: h11 over asyncio's streams.

A load generator must be cheap, or it would measure itself: httpx2 takes three times the CPU time
for the same answers, and with it one core handles only 150 streams a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import h11

from opticnerve.benchmark.answer import Answer, AnswerStream, body_code

PATH = "/v1/chat/completions"
CONNECT_S = 10.0
READ_BYTES = 2**16
MAX_ERROR_BYTES = 2**20  # Most bytes read of a body that is not a stream.
Event = h11.Request | h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage


class StaleConnection(ConnectionError):
    """The server closed a kept-alive connection before any byte of an answer arrived."""


class LoadConnection:
    """One connection, for one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)
        self.answered = 0  # Number of answered requests.
        self.read_at = 0.0  # When bytes last arrived.

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        ready = self._http.our_state is h11.IDLE and self._http.their_state is h11.IDLE
        return ready and not self._reader.at_eof() and not self._writer.is_closing()

    async def send(self, head: h11.Request, body: bytes) -> None:
        """Sends a request. Raises OSError; StaleConnection if it may be sent again on another
        connection."""
        self._writer.write((self._http.send(head) or b"") + body)
        self._http.send(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())
        with self._stale():
            await self._writer.drain()

    async def receive(self) -> AsyncIterator[Event]:
        """Yields the events of the answer. Raises like ``send``, and h11.ProtocolError."""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                await self._read()
            elif isinstance(event, Event):
                yield event
                if isinstance(event, h11.EndOfMessage):
                    break
            else:
                raise ConnectionError("the connection was closed")
        self.answered += 1
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()

    async def _read(self) -> None:
        with self._stale():
            data = await self._reader.read(READ_BYTES)
            self.read_at = time.perf_counter()
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise ConnectionError("the connection was closed")
        self._http.receive_data(data)

    @contextlib.contextmanager
    def _stale(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.answered and self._http.their_state is h11.SEND_RESPONSE:
                raise StaleConnection(str(error)) from error
            raise

    def close(self) -> None:
        self._writer.close()


class LoadTarget:
    """A server and a pool of kept-alive connections to it, one for each concurrent request. A
    context manager."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 1200.0,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        """``url``: without the route. ``timeout_s``: for a request, from sending it to the end of
        its answer. ``trust``: verifies the certificate of an https:// server; None: the system's
        authorities do."""
        parts = urlsplit(url)
        self.timeout_s = timeout_s
        self._host = parts.hostname or ""
        https = parts.scheme == "https"
        self._tls = (trust or ssl.create_default_context()) if https else None
        self._port = parts.port or (443 if self._tls else 80)
        self._target = parts.path.rstrip("/") + PATH
        self._headers = [("host", parts.netloc.rpartition("@")[2]), ("accept", "text/event-stream")]
        self._headers += [("content-type", "application/json"), *(headers or {}).items()]
        self._idle: list[LoadConnection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().close()

    async def ask(self, body: bytes) -> Answer:
        """Sends one request and reads its stream to the end. Errors are reported in the Answer."""
        stream, status, code = AnswerStream(), 0, ""
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                status, code = await self._exchange(body, stream)
        except TimeoutError:
            code = "timeout"
        except (OSError, h11.ProtocolError, ValueError) as error:
            code = type(error).__name__
        return stream.answer(sent, time.perf_counter(), status, code)

    async def _exchange(self, body: bytes, stream: AnswerStream) -> tuple[int, str]:
        """(status, error code of an answer that is not a stream)"""
        while (kept := self._kept()) is not None:
            with contextlib.suppress(StaleConnection):
                return await self._post(kept, body, stream)
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        return await self._post(LoadConnection(reader, writer), body, stream)

    def _kept(self) -> LoadConnection | None:
        while self._idle:
            kept = self._idle.pop()
            if kept.is_open:
                return kept
            kept.close()
        return None

    async def _post(
        self, connection: LoadConnection, body: bytes, stream: AnswerStream
    ) -> tuple[int, str]:
        headers = [*self._headers, ("content-length", str(len(body)))]
        status, other = 0, b""
        try:
            head = h11.Request(method="POST", target=self._target, headers=headers)
            await connection.send(head, body)
            async for event in connection.receive():
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data) and status == 200:
                    stream.feed(bytes(event.data), connection.read_at)
                elif isinstance(event, h11.Data) and len(other) < MAX_ERROR_BYTES:
                    other += event.data
        finally:
            if connection.is_open:
                self._idle.append(connection)
            else:
                connection.close()
        return status, "" if status == 200 else body_code(other)
