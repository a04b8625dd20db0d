"""One request on its own connection, from a client that may be slow or leave, and how it ended.

Sends and reads bytes itself, so that a client can read one byte at a time and leave at a given one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from opticnerve.benchmark.answer import error_code
from opticnerve.benchmark.connection import PATH

GIVE_UP_S = 300.0  # Longer than any deadline of the server.
RECEIVE_BYTES = 4096  # A slow client's receive buffer.


@dataclass(frozen=True)
class Manner:
    """How a client behaves. Bytes are those of the connection."""

    name: str = "plain"
    write_bytes: int = 2**20  # At once.
    read_bytes: int = 2**16
    pause_s: float = 0.0  # After each write or read.
    paced_bytes: int = 4096  # Read at that pace; longer, it would be cut off (8 KiB in 30 s).
    leaves_at: float | None = None  # Disconnects after sending this share of the request,
    leaves_after: int | None = None  # or after this many bytes of the answer.

    @property
    def leaves(self) -> bool:
        return self.leaves_at is not None or self.leaves_after is not None


@dataclass(frozen=True)
class Ending:
    """How a request ended, as its client saw it. Times are of ``time.monotonic``.

    ``kind``: ``answer``; ``error``, in the API's form; ``left``: the client disconnected; ``lost``:
    the connection broke; ``refused``: it could not be opened; ``hung``: no end came within
    ``GIVE_UP_S``; or ``malformed``: no end, or more than one (see ``detail``).
    """

    kind: str
    sent: float
    ended: float
    status: int = 0
    code: str = ""
    texts: tuple[str, ...] = ()  # By choice; incomplete unless it is an answer.
    detail: str = ""


class MalformedAnswer(Exception):
    """The answer has no end, or more than one."""


class _Left(Exception):
    """The client has disconnected as its manner says."""


@dataclass
class _Answer:
    """The part of an answer that has arrived."""

    status: int = 0
    stream: bool = False
    code: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    done: bool = False
    line: bytes = b""  # The beginning of an event's line.
    body: bytearray = field(default_factory=bytearray)

    def start(self, head: h11.Response) -> None:
        self.status = head.status_code
        kind = dict(head.headers).get(b"content-type", b"")
        self.stream = kind.startswith(b"text/event-stream")

    def data(self, data: bytes) -> None:
        if not self.stream:
            self.body += data
            return
        *lines, self.line = (self.line + data).split(b"\n")
        for line in lines:
            if line.strip():
                self._event(line.decode())

    def _event(self, line: str) -> None:
        if self.done:
            raise MalformedAnswer(f"after [DONE]: {line[:200]}")
        if line == "data: [DONE]":
            self.done = True
            return
        if self.code:
            raise MalformedAnswer(f"after an error: {line[:200]}")
        body = json.loads(line.removeprefix("data: "))
        if "error" in body:
            self.code = error_code(body)
        for choice in body.get("choices", ()):
            index = choice["index"]
            if index in self.finished:
                raise MalformedAnswer(f"choice {index} goes on after its end")
            more = choice["delta"].get("content") or ""
            self.texts[index] = self.texts.get(index, "") + more
            if choice["finish_reason"]:
                self.finished.add(index)

    def end(self) -> None:
        """To be called at the end of the HTTP message. Raises MalformedAnswer."""
        if self.stream:
            if not self.done:
                raise MalformedAnswer("the stream has no [DONE]")
            if not self.code and self.finished != self.texts.keys():
                raise MalformedAnswer("a choice has no finish_reason")
            return
        body = json.loads(self.body)
        if self.status != 200:
            self.code = error_code(body)
            return
        for choice in body["choices"]:
            self.texts[choice["index"]] = choice["message"]["content"] or ""
        self.done = True

    @property
    def ordered(self) -> tuple[str, ...]:
        return tuple(self.texts[index] for index in sorted(self.texts))


async def ask(url: str, body: bytes, manner: Manner) -> Ending:
    """Sends one chat to the gateway at ``url`` and follows it to its end."""
    answer, sent = _Answer(), time.monotonic()

    def ending(kind: str, detail: str = "") -> Ending:
        now = time.monotonic()
        return Ending(kind, sent, now, answer.status, answer.code, answer.ordered, detail)

    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    with socket.socket() as connection:
        if manner.read_bytes < RECEIVE_BYTES:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, (parts.hostname, parts.port))
        except OSError as error:
            return ending("refused", repr(error))
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await _exchange(connection, _request(parts.netloc, body), answer, manner)
        except _Left:
            return ending("left")
        except TimeoutError:
            return ending("hung")
        except (OSError, h11.RemoteProtocolError) as error:
            return ending("lost", repr(error))
        except (MalformedAnswer, ValueError, KeyError, TypeError) as error:
            return ending("malformed", repr(error))
    return ending("error" if answer.code else "answer")


def _request(host: str, body: bytes) -> bytes:
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _exchange(
    connection: socket.socket, request: bytes, answer: _Answer, manner: Manner
) -> None:
    """Reads while it sends, since an error may come before the server has read everything."""
    sending = asyncio.ensure_future(_send(connection, request, manner))
    reading = asyncio.ensure_future(_read(connection, answer, manner))
    try:
        await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done() and isinstance(sending.exception(), _Left):
            raise _Left
        await reading
    finally:
        for task in (sending, reading):
            task.cancel()
        await asyncio.gather(sending, reading, return_exceptions=True)


async def _send(connection: socket.socket, request: bytes, manner: Manner) -> None:
    loop = asyncio.get_running_loop()
    stop = len(request) if manner.leaves_at is None else int(manner.leaves_at * len(request))
    for start in range(0, stop, manner.write_bytes):
        await loop.sock_sendall(connection, request[start : min(stop, start + manner.write_bytes)])
        await asyncio.sleep(manner.pause_s)
    if manner.leaves_at is not None:
        raise _Left


async def _read(connection: socket.socket, answer: _Answer, manner: Manner) -> None:
    """Reads up to the end of the connection, which ends the answer."""
    loop = asyncio.get_running_loop()
    protocol = h11.Connection(h11.CLIENT)
    protocol.send(h11.Request(method="POST", target=PATH, headers=[("host", "x")]))
    protocol.send(h11.EndOfMessage())
    count, ended = 0, False
    while True:
        try:
            size = manner.read_bytes if count < manner.paced_bytes else RECEIVE_BYTES
            data = await loop.sock_recv(connection, size)
        except ConnectionError:
            if ended:  # The kernel resets the connection if part of a refused body was unread.
                return
            raise
        if data and ended:
            raise MalformedAnswer("bytes after the answer's end")
        if not data and ended:
            return
        protocol.receive_data(data)
        ended = _take(protocol, answer)
        count += len(data)
        if manner.leaves_after is not None and count >= manner.leaves_after and not ended:
            raise _Left
        if manner.pause_s and count < manner.paced_bytes:
            await asyncio.sleep(manner.pause_s)


def _take(protocol: h11.Connection, answer: _Answer) -> bool:
    """Passes what has arrived to ``answer``. Returns whether the answer is complete."""
    while True:
        event: Any = protocol.next_event()
        match event:
            case h11.Response():
                answer.start(event)
            case h11.Data():
                answer.data(bytes(event.data))
            case h11.EndOfMessage():
                answer.end()
                return True
            case h11.NEED_DATA:
                return False
            case h11.InformationalResponse():
                continue
            case _:
                raise ConnectionResetError("the connection was closed before an answer")
