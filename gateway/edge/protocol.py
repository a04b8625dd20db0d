"""One client's connection: uvicorn's, with a strict parser, and told apart by what it waits for."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from enum import Enum
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway import metrics
from gateway.api.http import JSONResponse
from gateway.edge.parser import StrictParser
from opticnerve.errors import InvalidRequest
from opticnerve.telemetry import events

if TYPE_CHECKING:
    from gateway.edge.connections import Connections

log = logging.getLogger(__name__)

SITE_BITS = 64  # Of an IPv6 address: who has one has the whole network.
READ_BYTES = 2**14  # At once, and parsed in one step; more of a body of known length.
MOST_READ_BYTES = 2**18


class Wait(Enum):
    """What a connection expects of its client."""

    HEAD = "a request's head"
    BODY = "more of its body"
    READER = "to take more of an answer"
    TURN = "nothing: requests that were sent ahead wait for their turn"


class Flow(FlowControl):
    """Does not read on while a request is answered after which more has come: uvicorn would with
    every request, and keep whatever a client sends ahead. Nor while it rests."""

    def __init__(self, transport: asyncio.Transport, parser: StrictParser) -> None:
        super().__init__(transport)
        self._parser = parser
        self._rests = False

    def resume_reading(self) -> None:
        answers_first = self._parser.ahead and self._parser.our_state is not h11.DONE
        if not self._rests and not answers_first:
            super().resume_reading()

    def rest(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Reads nothing for so long."""
        self._rests = True
        self.pause_reading()
        loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._rests = False
        self.resume_reading()


def holder_of(client: tuple[str, int] | None, key_name: str | None = None) -> str:
    """Whose share of the places something counts in: a key's, or else its address's."""
    if key_name is not None:
        return f"key {key_name}"
    host = client[0].partition("%")[0] if client else ""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, SITE_BITS), strict=False))


class Connection(H11Protocol):
    """``owner`` is told whenever it may wait for something else. ``wait``, ``since``, ``mark`` and
    ``timer`` are the owner's notes."""

    conn: StrictParser

    def __init__(self, owner: Connections, *given: Any) -> None:
        super().__init__(*given)
        self.owner = owner
        self.conn = StrictParser()
        self.address = self.holder = ""
        self.wait: Wait | None = None
        self.since = 0.0  # When it began to wait, or last made progress. On the loop's clock.
        self.mark = 0  # ``moved`` by then.
        self.timer: asyncio.TimerHandle | None = None
        self._came = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: Flow = Flow(transport, self.conn)
        self._read_in_steps()
        self.address = self.holder = holder_of(self.client)
        self.owner.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        before = self.conn.chunks
        super().data_received(data)
        self._read_in_steps()
        rest_s = self.owner.rest_s(self, self.conn.chunks - before)
        if rest_s > 0:
            self.flow.rest(self.loop, rest_s)

    def _read_in_steps(self) -> None:
        """What one read brings may be thousands of chunks, each with a cost of its own."""
        size = min(max(READ_BYTES, self.conn.left), MOST_READ_BYTES)
        self.transport.max_size = size  # type: ignore[attr-defined]  # asyncio's, of one recv.

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        self.owner.settle(self)
        if self.cycle is not before:
            self.loop.call_soon(self.owner.settle, self)  # Once its key is known.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.owner.settle(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.owner.settle(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.owner.settle(self)

    def expects(self) -> Wait | None:
        """What of its client it waits for; None while it is at work."""
        if self.flow.write_paused:
            return Wait.READER
        if self.cycle is None or self.cycle.response_complete:
            return Wait.HEAD
        if self.cycle.more_body:
            return Wait.BODY
        return Wait.TURN if self.conn.ahead else None

    def moved(self) -> int:
        """Bytes that the client has brought, or while it should read, taken; from any number on."""
        if self.wait is Wait.READER:
            return -self.transport.get_write_buffer_size()
        return self._came if self.wait is Wait.BODY else 0

    def current_holder(self) -> str:
        """That of its last request with a key, or its address."""
        told = None if self.cycle is None else self.cycle.scope["state"].get("holder")
        return told or self.holder

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP, and the connection's end. ``msg`` is uvicorn's, without a reason."""
        error = InvalidRequest(f"this is no HTTP/1.1 request: {self.conn.fault}", code="not_http")
        event = events.Event()
        event.error = error
        event.write(log, logging.INFO, "request", status=400)
        metrics.REQUESTS.labels("other", "400").inc()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = JSONResponse(error.to_openai(), 400, {"connection": "close"})
            lines = [b"HTTP/1.1 400 Bad Request", *map(b": ".join, answer.raw_headers), b"", b""]
            self.transport.write(b"\r\n".join(lines) + bytes(answer.body))
        self.transport.close()

    def close(self) -> None:
        """What the client has not sent of a request, or read of an answer, is given up."""
        self.owner.leave(self)
        unsent = self.transport.get_write_buffer_size()
        if unsent or self.transport.is_closing() or self.expects() is not Wait.HEAD:
            self.transport.abort()
        else:
            self.timeout_keep_alive_handler()
