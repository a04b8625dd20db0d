"""HTTPS: TLS on a client's connection, below the protocols that read requests.

A connection counts from the moment it is accepted, so clients that never finish a handshake are
bounded like those that never finish a request. asyncio's own TLS is not used: it keeps 256 KiB for
each connection, hands over everything that has arrived at once, and reports everything as sent.
Here an idle connection holds memory for one record in each direction, one record with data is read
in each turn of the event loop, and what a client has not read yet counts as unsent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import get_remote_addr

from gateway.edge.connections import ClientConnection, Wait, holder_of
from gateway.edge.http1 import Connection
from gateway.edge.limits import HANDSHAKE_TIMEOUT_S
from opticnerve.certificates import PemFiles
from opticnerve.errors import ConfigError

if TYPE_CHECKING:
    from gateway.edge.connections import Connections
    from opticnerve.config.gateway import HttpsConfig

log = logging.getLogger(__name__)

RECEIVE_BYTES = 2**16  # Most bytes read from a socket at once.
RECORD_BYTES = 2**14  # Most bytes of data in one record.
HEADER_BYTES = 5  # A record's header; its last two bytes are the length of the rest.
MAX_EMPTY_RECORDS = 16  # In a row, such as key updates, each of which takes time.


class Https:
    """The server's certificate, and the authorities that clients' certificates are checked against.
    Files that change are read again for new connections. One for each event loop."""

    def __init__(self, certificate: str, key: str, client_ca: str | None = None) -> None:
        """Raises ConfigError."""
        self._files = PemFiles(certificate, key, client_ca)
        self._pem = self._files.current()
        self._context = self._make()
        self.buffer = memoryview(bytearray(RECEIVE_BYTES))  # For whichever socket is being read.

    @classmethod
    def of(cls, config: HttpsConfig) -> Https | None:
        """The TLS of ``config``; None for a gateway that speaks plain HTTP. Raises ConfigError."""
        if config.https_certificate is None or config.https_key is None:
            return None
        return cls(config.https_certificate, config.https_key, config.https_client_ca)

    def context(self) -> ssl.SSLContext:
        """The context for new connections; a new object only if the files have changed."""
        pem = self._files.current()
        if pem is not self._pem:
            with contextlib.suppress(ConfigError):  # Being replaced; retried later.
                self._context, self._pem = self._make(), pem
        return self._context

    def _make(self) -> ssl.SSLContext:
        context = self._files.server_context()
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        return context


class TlsSession:
    """One connection's TLS, and the socket's transport that it writes to."""

    def __init__(self, context: ssl.SSLContext, lower: asyncio.Transport) -> None:
        self.lower = lower
        # OpenSSL's buffers never shrink, so both get one record at a time.
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._arrived = bytearray()  # Records after the handshake; the last may be incomplete.
        self._empty_records = 0
        self.ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    @property
    def has_record(self) -> bool:
        """Whether a complete record waits to be read."""
        return HEADER_BYTES <= len(self._arrived) >= self._record_size()

    def handshake(self, data: memoryview) -> bool:
        """Continues the handshake with ``data``. Returns whether it is complete. Raises
        ssl.SSLError."""
        self._incoming.write(data)
        try:
            self.ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self._flush()
        self._arrived += self._incoming.read()
        return True

    def received(self, data: memoryview) -> None:
        self._arrived += data

    def read(self) -> bytes | None:
        """The data of the next record; b"" once the client has ended; None if no complete record
        with data has arrived. Raises ssl.SSLError."""
        while self.has_record:
            size = self._record_size()
            self._incoming.write(self._arrived[:size])
            del self._arrived[:size]
            try:
                data = self.ssl.read(RECORD_BYTES)
            except ssl.SSLWantReadError:
                self._count_empty_record()
                continue
            finally:
                self._flush()
            self._empty_records = 0
            return data
        return None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Raises ssl.SSLError."""
        left = memoryview(data)
        while left:
            left = left[self.ssl.write(left[:RECORD_BYTES]) :]
            self._flush()

    def end(self) -> None:
        """Sends the close alert, and does not wait for the client's."""
        with contextlib.suppress(ssl.SSLError):
            self.ssl.unwrap()
        self._flush()

    def _record_size(self) -> int:
        """Bytes of the first record that has arrived; its header must be complete."""
        return HEADER_BYTES + int.from_bytes(self._arrived[HEADER_BYTES - 2 : HEADER_BYTES], "big")

    def _count_empty_record(self) -> None:
        self._empty_records += 1
        if self._empty_records > MAX_EMPTY_RECORDS:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "too many records without data")

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.lower.write(self._outgoing.read())


class Handshake(ClientConnection, asyncio.BufferedProtocol):
    """A connection until its handshake is complete; then a ``Connection`` over a ``TlsTransport``
    replaces it. It counts as a connection that waits for headers."""

    def __init__(self, owner: Connections, https: Https, **given: Any) -> None:
        """``given``: uvicorn's arguments."""
        super().__init__(owner)
        self.loop = given["_loop"] or asyncio.get_running_loop()
        self.head_timeout_s = HANDSHAKE_TIMEOUT_S
        self._https = https
        self._given = given
        # uvicorn shuts these down with the server.
        self._served: set[Any] = given["server_state"].connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._session = TlsSession(self._https.context(), transport)
        self.address = self.holder = holder_of(get_remote_addr(transport))
        self._served.add(self)
        self.owner.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._https.buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            complete = self._session.handshake(self._https.buffer[:nbytes])
        except ssl.SSLError as error:
            log.debug("%s failed in the TLS handshake: %s", self.holder, error)
            self.transport.close()
            return
        if complete:
            self._leave()
            upper = Connection(self.owner, **self._given)
            TlsTransport(self._session, self._https.buffer, upper).start()

    def shutdown(self) -> None:
        """The server is stopped."""
        self.transport.abort()

    def _leave(self) -> None:
        self._served.discard(self)
        self.owner.remove(self)

    # ---- what ``Connections`` asks

    def expects(self) -> Wait | None:
        return Wait.HEAD

    def progress(self) -> int:
        return 0

    def current_holder(self) -> str:
        return self.address

    def close(self) -> None:
        self.owner.remove(self)
        self.transport.abort()


class TlsTransport(asyncio.BufferedProtocol, asyncio.Transport):
    """Sits between a socket's transport, whose protocol it is, and the HTTP protocol, whose
    transport it is."""

    def __init__(
        self, session: TlsSession, buffer: memoryview, protocol: asyncio.BaseProtocol
    ) -> None:
        super().__init__()
        self._session = session
        self._lower = session.lower
        self._buffer = buffer
        self._protocol: Any = protocol
        self._paused = False  # By the protocol above.
        self._due = False  # Whether ``_next_turn`` is scheduled.

    def start(self) -> None:
        """Takes the connection over after the handshake."""
        self._lower.set_protocol(self)
        self._protocol.connection_made(self)
        self._deliver()

    # ---- towards the socket

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._session.received(self._buffer[:nbytes])
        self._deliver()

    def eof_received(self) -> None:
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        protocol, self._protocol = self._protocol, asyncio.Protocol()  # Breaks the reference cycle.
        protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def _deliver(self) -> None:
        """Hands one record's data to the protocol above. The rest of what has arrived follows in
        later turns of the event loop; until then nothing more is read from the socket."""
        if self._paused or self._due or self._lower.is_closing():
            return
        try:
            data = self._session.read()
        except ssl.SSLError as error:
            log.debug("a client failed in TLS: %s", error)
            self._lower.close()
            return
        if data is None:
            self._lower.resume_reading()
        elif data:
            self._protocol.data_received(data)
            self._read_on()
        else:
            self._protocol.eof_received()
            self.close()

    def _read_on(self) -> None:
        if self._session.has_record and not self._due:
            self._due = True
            self._lower.pause_reading()
            asyncio.get_running_loop().call_soon(self._next_turn)
        elif not self._paused and not self._due:
            self._lower.resume_reading()

    def _next_turn(self) -> None:
        self._due = False
        try:
            self._deliver()
        except Exception:  # A bug: asyncio would only log it, and leave the connection open.
            self._lower.abort()
            raise

    # ---- towards the protocol above

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol  # type: ignore[no-any-return]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._session.ssl.context
        return self._lower.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._lower.is_closing()

    def is_reading(self) -> bool:
        return not self._paused

    def pause_reading(self) -> None:
        self._paused = True
        self._lower.pause_reading()

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._read_on()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._lower.is_closing():
            return
        try:
            self._session.write(data)
        except ssl.SSLError as error:
            log.debug("a client cannot be answered over TLS: %s", error)
            self._lower.abort()

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._lower.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._lower.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._lower.set_write_buffer_limits(high, low)

    def close(self) -> None:
        if not self._lower.is_closing():
            self._session.end()
            self._lower.close()

    def abort(self) -> None:
        self._lower.abort()
