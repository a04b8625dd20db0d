"""One client's WebSocket: uvicorn's protocol over wsproto, with bounds on what a client may send.

``gateway.edge.http1`` hands a connection over once the head of a handshake is parsed. A message
reaches the application as UTF-8 bytes, which are counted as they arrive. Frames can be as small as
six bytes, and each takes time of the event loop, so only some are parsed in one turn, and clients
that send many are paced.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from wsproto import events
from wsproto.connection import ConnectionState

from gateway.edge.connections import ClientConnection, Wait, holder_of
from gateway.edge.limits import FRAME_CHUNKS
from opticnerve.errors import Overloaded

if TYPE_CHECKING:
    from gateway.edge.connections import Connections

PIECE_BYTES = 2**14  # Most bytes of a frame parsed in one step.
FRAMES_A_TURN = 100  # Parsed in one turn of the event loop.
LENGTH_BYTES = {126: 2, 127: 8}  # Bytes of the extended length, by the 7-bit length in the header.
MASK_BYTES = 4
CLOSE_S = 3.0  # Time for a client to answer a close frame, and to read what was sent before it.
NO_BINARY, TOO_LARGE, TRY_LATER = 1003, 1009, 1013  # Codes of close frames.


def frame_size(data: bytearray) -> int:
    """The length of the frame that ``data`` begins with; 0 if its header is not complete."""
    if len(data) < 2:
        return 0
    short, header = data[1] & 0x7F, 2 + LENGTH_BYTES.get(data[1] & 0x7F, 0)
    if len(data) < header:
        return 0
    length = int.from_bytes(data[2:header], "big") if header > 2 else short
    return header + (MASK_BYTES if data[1] & 0x80 else 0) + length


class WebSocketConnection(ClientConnection, WSProtocol):
    """uvicorn's protocol with stricter rules: a binary message, a message over ``ws_max_size``, and
    a message for which there is no memory close the connection, with a code.

    The application may set ``scope["state"]["hold"]``, a function that counts the bytes of a
    message as they arrive, and may raise Overloaded. The application frees the bytes, and removes
    the function when it ends.
    """

    def __init__(self, owner: Connections, **given: Any) -> None:
        """``given``: uvicorn's arguments."""
        WSProtocol.__init__(self, **given)
        ClientConnection.__init__(self, owner)
        self.close_timeout = CLOSE_S
        self._unparsed = bytearray()
        self._message = bytearray()
        self._message_open = False  # A message has begun and is not complete.
        self._frame_left = 0  # Bytes of the current frame that are not parsed yet.
        self._received = 0
        self._paced = False
        self._unanswered: events.Ping | None = None

    def take_over(self, transport: asyncio.Transport, request: h11.Request, ahead: bytes) -> None:
        """Starts with a handshake's ``request``; ``ahead``: the bytes that arrived after it."""
        self.connection_made(transport)
        given = {name.lower(): value for name, value in request.headers}
        headers = [
            (b"host", b"here"),  # wsproto decodes a name, which may be malformed, and needs none.
            (b"connection", b"upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-version", given[b"sec-websocket-version"]),
            (b"sec-websocket-key", given[b"sec-websocket-key"]),
        ]
        offered = b",".join(v for n, v in request.headers if n.lower() == b"sec-websocket-protocol")
        if offered.isascii() and offered:
            headers.append((b"sec-websocket-protocol", offered))
        self.conn.initiate_upgrade_connection(headers, request.target)
        self.handle_events()  # Starts the application.
        self.scope["headers"] = [(name.lower(), value) for name, value in request.headers]
        self._unparsed += ahead
        self._read_or_pause()
        self.address = self.holder = holder_of(self.client)
        self.owner.add(self)

    # ---- asyncio's protocol

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        self._unparsed += data
        self._parse()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.owner.update(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unanswered is not None:
            ping, self._unanswered = self._unanswered, None
            self.handle_ping(ping)
        self.owner.update(self)

    def shutdown(self) -> None:
        """The application ends its session when the gateway is stopped."""
        if self.close_sent:
            super().shutdown()

    # ---- frames

    def _parse(self) -> None:
        """Parses what has arrived, frame by frame and long frames in pieces, up to
        FRAMES_A_TURN."""
        frames = 0
        while frames < FRAMES_A_TURN and self.handshake_complete:
            if not self._frame_left:
                self._frame_left = frame_size(self._unparsed)
                frames += self._frame_left > 0
            piece = bytes(self._unparsed[: min(self._frame_left, PIECE_BYTES)])
            if not piece or self.transport.is_closing():
                break
            del self._unparsed[: len(piece)]
            self._frame_left -= len(piece)
            super().data_received(piece)
        delay_s = self.owner.pacing_delay_s(self, FRAME_CHUNKS * frames)
        if delay_s > 0:
            self._paced = True
            self.loop.call_later(delay_s, self._end_pause)
        self._read_or_pause()
        self.owner.update(self)

    def _end_pause(self) -> None:
        self._paced = False
        self._parse()

    def _read_or_pause(self) -> None:
        """Reads on once the application has taken all messages, unless frames are paced."""
        busy = not (self.handshake_complete and self.queue.empty())
        self.read_paused = self._paced or (busy and not self.close_sent)
        if self.read_paused:
            self.transport.pause_reading()
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def handle_message(self, event: events.TextMessage | events.BytesMessage) -> None:
        if isinstance(event, events.BytesMessage):
            self._fail(NO_BINARY, "send JSON as text, not as a binary message")
            return
        piece = event.data.encode()
        if len(self._message) + len(piece) > self.config.ws_max_size:
            self._fail(TOO_LARGE, f"a message is larger than {self.config.ws_max_size} bytes")
            return
        hold = self.scope["state"].get("hold")
        try:
            if hold is not None:
                hold(len(piece))
        except Overloaded as error:
            self._fail(TRY_LATER, error.message)
            return
        self._message += piece
        self._message_open = not event.message_finished
        if event.message_finished:
            whole: Any = {"type": "websocket.receive", "bytes": self._message}
            self.queue.put_nowait(whole)
            self._message = bytearray()

    def handle_ping(self, event: events.Ping) -> None:
        """Answers a ping. A client that does not read gets one answer, to its last ping, once it
        reads again."""
        if self.writable.is_set():
            super().handle_ping(event)
        else:
            self._unanswered = event

    def handle_close(self, event: events.CloseConnection) -> None:
        if self.conn.state is ConnectionState.OPEN:  # From the parser, not from the client.
            self._fail(int(event.code), event.reason or "")
        else:
            super().handle_close(event)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._abort_later()

    def _fail(self, code: int, reason: str) -> None:
        """Closes the connection for a fault of the client. What it sends until it answers the close
        frame is read and dropped: with unread bytes left, the client might not receive the
        reason."""
        if self.close_sent or self.transport.is_closing():
            return
        self._message = bytearray()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(self.conn.send(events.CloseConnection(code=code, reason=reason)))
        self.close_sent = True
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)

    def _abort_later(self) -> None:
        """Ends a connection whose client does not read what was sent before its end."""
        self.loop.call_later(self.close_timeout, self.transport.abort)

    # ---- ASGI

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self._abort_later()

    async def receive(self) -> Any:
        message = await self.queue.get()
        self._read_or_pause()
        return message

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.accept":
            self._parse()

    # ---- what ``Connections`` asks

    def expects(self) -> Wait | None:
        if not self.writable.is_set():
            return Wait.READER
        return Wait.MESSAGE if self._message_open and not self.read_paused else None

    def progress(self) -> int:
        if self.wait is Wait.READER:
            return -self.transport.get_write_buffer_size()
        return self._received

    def current_holder(self) -> str:
        return self.scope["state"].get("holder") or self.holder

    def close(self) -> None:
        """Aborts the connection, without a close frame."""
        self.owner.remove(self)
        self.transport.abort()
