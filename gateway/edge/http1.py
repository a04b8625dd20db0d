"""HTTP/1 on one client's connection: uvicorn's protocol with a strict parser, which reports what
the connection waits for. Bytes that two parsers could read as different requests are refused, so
that no request is smuggled past a proxy."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway import metrics
from gateway.api.http import JSONResponse
from gateway.edge.connections import ClientConnection, Wait, holder_of
from gateway.edge.limits import IDLE_TIMEOUT_S, MAX_HEAD_BYTES
from gateway.edge.websocket import WebSocketConnection
from opticnerve.errors import InvalidRequest
from opticnerve.telemetry import logs
from opticnerve.telemetry.metrics import count_error

if TYPE_CHECKING:
    from gateway.edge.connections import Connections

log = logging.getLogger(__name__)

READ_BYTES = 2**14  # Most bytes read and parsed in one step, except within a body of known length.
MAX_READ_BYTES = 2**18
VERSIONS = (b"1.0", b"1.1")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_QUOTED = re.compile(
    r"[:,]? (?:bytearray\()?b['\"].*", re.DOTALL
)  # h11's messages quote the client's bytes.


class StrictParser(h11.Connection):
    """h11's request parser, made stricter. h11 itself accepts lines that end in LF alone, any HTTP
    version of two single digits, and Content-Length together with Transfer-Encoding.

    ``fault``: why a request was refused; quotes nothing that the client sent, which may be a key.
    ``has_more``: bytes have arrived after the request that is being answered. ``body_left``: bytes
    still missing from a body of known length. ``has_body``: whether the last request has a body.
    ``chunks``: the number of body chunks that have arrived.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.fault = ""
        self.has_more = False
        self.body_left = 0
        self.has_body = False
        self.chunks = 0
        self._chunked = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises h11.RemoteProtocolError."""
        # Only headers, and the trailers of chunked bodies, consist of lines.
        reads_lines = self.their_state is h11.IDLE or self._chunked
        before = self.trailing_data[0] if reads_lines else b""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(event)
            if reads_lines and isinstance(event, h11.Request | h11.EndOfMessage):
                left = len(self.trailing_data[0])
                if _BARE_LF.search(before[: len(before) - left]):
                    raise h11.RemoteProtocolError("a line ends in LF without CR")
        except h11.RemoteProtocolError as error:
            self.fault = _QUOTED.sub("", str(error))
            raise
        self.has_more = event is h11.PAUSED
        if isinstance(event, h11.Data):
            self.body_left -= 0 if self._chunked else len(event.data)
            self.chunks += self._chunked
        return event

    def _check(self, request: h11.Request) -> None:
        if request.http_version not in VERSIONS:
            raise h11.RemoteProtocolError("the version is neither HTTP/1.0 nor HTTP/1.1")
        headers = dict(request.headers)
        self.body_left = int(headers.get(b"content-length", 0))  # h11 has validated it.
        self._chunked = b"transfer-encoding" in headers
        self.has_body = self._chunked or self.body_left > 0
        if self._chunked and (b"content-length" in headers or request.http_version == b"1.0"):
            raise h11.RemoteProtocolError("Transfer-Encoding beside Content-Length or in HTTP/1.0")


class PacedFlow(FlowControl):
    """Stops reading once pipelined bytes have arrived, until the current request is answered:
    uvicorn would read on and keep all of them in memory. Also stops while chunks are paced."""

    def __init__(self, transport: asyncio.Transport, parser: StrictParser) -> None:
        super().__init__(transport)
        self._parser = parser
        self._paced = False

    def resume_reading(self) -> None:
        answers_first = self._parser.has_more and self._parser.our_state is not h11.DONE
        if not self._paced and not answers_first:
            super().resume_reading()

    def pause_for(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._paced = True
        self.pause_reading()
        loop.call_later(seconds, self._end_pause)

    def _end_pause(self) -> None:
        self._paced = False
        self.resume_reading()


class Connection(ClientConnection, H11Protocol):
    """A connection while it speaks HTTP/1."""

    conn: StrictParser

    def __init__(self, owner: Connections, **given: Any) -> None:
        """``given``: uvicorn's arguments."""
        H11Protocol.__init__(self, **given)
        ClientConnection.__init__(self, owner)
        self.conn = StrictParser()
        self._received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: PacedFlow = PacedFlow(transport, self.conn)
        self._limit_reads()
        self.address = self.holder = holder_of(self.client)
        self.owner.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        before = self.conn.chunks
        super().data_received(data)
        self._limit_reads()
        delay_s = self.owner.pacing_delay_s(self, self.conn.chunks - before)
        if delay_s > 0:
            self.flow.pause_for(self.loop, delay_s)

    def _limit_reads(self) -> None:
        """Bounds one read, which could otherwise bring thousands of chunks to parse."""
        size = min(max(READ_BYTES, self.conn.body_left), MAX_READ_BYTES)
        self.transport.max_size = size  # type: ignore[attr-defined]  # asyncio's size of one recv.

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not None:
            self.head_timeout_s = IDLE_TIMEOUT_S
        self.owner.update(self)
        if self.cycle is not before:
            self.loop.call_soon(self.owner.update, self)  # Once the request's key is known.

    def _should_upgrade_to_ws(self) -> bool:
        """Whether a request is a WebSocket handshake as RFC 6455 defines it. In any other request,
        an Upgrade header is ignored."""
        headers = dict(self.headers)
        return (
            self.scope["method"] == "GET"
            and self.scope["http_version"] == "1.1"
            and not self.conn.has_body
            and headers.get(b"sec-websocket-version") == b"13"
            and b"sec-websocket-key" in headers
        )

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hands the connection over to ``WebSocketConnection``."""
        ahead, _ = self.conn.trailing_data
        self.connections.discard(self)
        self.owner.remove(self)
        socket = WebSocketConnection(
            self.owner,
            config=self.config,
            server_state=self.server_state,
            app_state=self.app_state,
        )
        self.transport.set_protocol(socket)
        socket.take_over(self.transport, event, ahead)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.owner.update(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.owner.update(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.owner.update(self)

    def expects(self) -> Wait | None:
        if self.flow.write_paused:
            return Wait.READER
        if self.cycle is None or self.cycle.response_complete:
            return Wait.HEAD
        if self.cycle.more_body:
            return Wait.BODY
        return Wait.TURN if self.conn.has_more else None

    def progress(self) -> int:
        if self.wait is Wait.READER:
            return -self.transport.get_write_buffer_size()
        return self._received if self.wait is Wait.BODY else 0

    def current_holder(self) -> str:
        keyed = None if self.cycle is None else self.cycle.scope["state"].get("holder")
        return keyed or self.holder

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP, and closes. uvicorn's ``msg`` has no reason; ours
        has."""
        error = InvalidRequest(f"this is no HTTP/1.1 request: {self.conn.fault}", code="not_http")
        event = logs.Event()
        event.error = error
        event.write(log, logging.INFO, "request", status=400)
        metrics.REQUESTS.labels("other", "400").inc()
        count_error("other", error)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = JSONResponse(error.to_openai(), 400, {"connection": "close"})
            lines = [b"HTTP/1.1 400 Bad Request", *map(b": ".join, answer.raw_headers), b"", b""]
            self.transport.write(b"\r\n".join(lines) + bytes(answer.body))
        self.transport.close()

    def close(self) -> None:
        self.owner.remove(self)
        unsent = self.transport.get_write_buffer_size()
        if unsent or self.transport.is_closing() or self.expects() is not Wait.HEAD:
            self.transport.abort()
        else:
            self.timeout_keep_alive_handler()
