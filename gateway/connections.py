"""Clients' connections: how many there may be, and how long one may be at rest.

A connection is at work from a request's whole head to the end of its answer, and otherwise at
rest. Bytes that complete no head do not wake it, so that nobody keeps one by dripping.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gateway import metrics
from gateway.http import JSONResponse, reason
from gateway.parser import StrictParser
from opticnerve.errors import ConfigError, InvalidRequest

log = logging.getLogger(__name__)

FIRST_REST_S = 30.0  # Until the first request.
REST_S = 75.0  # Until the next one.
OTHER_FILES = 256  # Open besides connections: libraries, logs, pictures on their way.


class Connections:
    """All of one server. Where a new one does not fit, the one longest at rest is closed, or, if
    all are at work, the new one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._all: set[Connection] = set()
        self._resting: dict[Connection, asyncio.TimerHandle] = {}  # Longest at rest first.
        self._crowded = False

    def connect(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        """What uvicorn calls for a protocol."""
        return Connection(self, config, server_state, app_state, _loop)

    def enter(self, connection: Connection) -> None:
        self._all.add(connection)
        self.rest(connection)
        crowded = len(self._all) > self.most
        if crowded:
            self._close_one(connection)
        if crowded and not self._crowded:
            log.warning(
                "more than %d connections: those at rest are closed; see --max-connections",
                self.most,
            )
        self._crowded = crowded

    def leave(self, connection: Connection) -> None:
        self._all.discard(connection)
        self.wake(connection)

    def rest(self, connection: Connection) -> None:
        if connection in self._all and connection not in self._resting:
            seconds = FIRST_REST_S if connection.cycle is None else REST_S
            timer = connection.loop.call_later(seconds, connection.close)
            self._resting[connection] = timer

    def is_resting(self, connection: Connection) -> bool:
        return connection in self._resting

    def wake(self, connection: Connection) -> None:
        timer = self._resting.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _close_one(self, new: Connection) -> None:
        # One that is closing already waits for a client that does not read.
        closing = (c for c in self._all if c.transport.is_closing())
        next(closing, next(iter(self._resting), new)).close()


class Connection(H11Protocol):
    conn: StrictParser

    def __init__(self, owner: Connections, *given: Any) -> None:
        super().__init__(*given)
        self.owner = owner
        self.conn = StrictParser()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.owner.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.leave(self)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP, and the connection's end. ``msg`` is uvicorn's, without a reason."""
        error = InvalidRequest(f"this is no HTTP/1.1 request: {self.conn.fault}", code="not_http")
        log.info("400: %s", reason(error))
        metrics.REQUESTS.labels("other", "400").inc()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = JSONResponse(error.to_openai(), 400, {"connection": "close"})
            lines = [b"HTTP/1.1 400 Bad Request", *map(b": ".join, answer.raw_headers), b"", b""]
            self.transport.write(b"\r\n".join(lines) + bytes(answer.body))
        self.transport.close()

    def close(self) -> None:
        """What the client has not read of an answer is given up."""
        self.owner.leave(self)
        if self.transport.get_write_buffer_size() or self.transport.is_closing():
            self.transport.abort()
        else:
            self.timeout_keep_alive_handler()

    def _settle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.owner.rest(self)
        else:
            self.owner.wake(self)


def allow_files(connections: int, workers: int) -> None:
    """Lets this process open as many files as so many connections of clients and workers need: the
    soft limit is raised where it is lower. Raises ConfigError where the hard one is lower too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = OTHER_FILES + workers
    wanted = connections + others
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        lower = f", or set --max-connections {hard - others} or less" if hard > others else ""
        raise ConfigError(
            f"--max-connections {connections} needs {wanted} open files with those of {workers} "
            f"workers and of the gateway itself, and only {hard} are allowed: raise ulimit -n to "
            f"{wanted}{lower}",
            param="max_connections",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
