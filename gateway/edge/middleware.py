"""What surrounds every request: its id, its metrics, its last resort, its key, its end.

Plain ASGI, outermost first: ``RequestScope``, (CORS), ``Errors``, (``PageGuard``),
``Authentication``, ``Drain``, ``Disconnect``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from gateway.api import sse
from gateway.api.http import ErrorResponse, typed
from gateway.edge.auth import ANONYMOUS, Keys, needs_key
from gateway.edge.protocol import holder_of
from opticnerve.errors import OpticNerveError, Unauthenticated
from opticnerve.process import LAST_WORDS_S, Running
from opticnerve.telemetry import events, logs

log = logging.getLogger(__name__)

_WHOLE_URL = re.compile(r"https?://[^/]+(/.*)?", re.IGNORECASE | re.DOTALL)
MAX_METHOD = 20  # Characters in the log, as of a path that is no route's.
MAX_PATH = 100
CUT = "cut by the client"
QUIET = frozenset({"/live", "/ready", "/health", "/metrics"})  # Probes: no line for each.


def request_id(scope: Scope) -> str:
    """The caller's x-request-id with anything unsafe removed, or one of ours."""
    given = Headers(scope=scope).get("x-request-id", "")
    return logs.safe_id(given) or f"req-{uuid.uuid4().hex}"


class RequestScope:
    """Gives a request its id and its line in the log, brings its path to one form, counts it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        scope = _without_slash(_without_host(scope))
        if method == "HEAD":  # Every route that takes GET takes it; the server sends no body.
            scope["method"] = "GET"
        identity = scope.setdefault("state", {})["request_id"] = request_id(scope)
        event = events.begin(identity)
        answer = _Answer(send, identity)
        metrics.REQUESTS_IN_FLIGHT.inc()
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            typed(error)  # For the line: whoever called us closes the connection.
            raise
        finally:
            metrics.REQUESTS_IN_FLIGHT.dec()
            metrics.REQUESTS.labels(_route(scope) or "other", str(answer.status or 499)).inc()
            event.write(
                log,
                logging.DEBUG if scope["path"] in QUIET else logging.INFO,
                "request",
                method=method[:MAX_METHOD],
                path=_route(scope) or scope["path"][:MAX_PATH],
                status=answer.status or 499,
                key=str(scope["state"].get("caller", "")),
            )


class _Answer:
    """``send`` that adds x-request-id and remembers the status; 0 until the answer begins."""

    def __init__(self, send: Send, identity: str) -> None:
        self._send = send
        self._identity = identity
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._identity
        await self._send(message)


class Errors:
    """Answers with whatever error leaves the application, in OpenAI's shape.

    A stream that has begun ends with the error as an event. Any other answer that has begun cannot
    tell any more: its connection is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = streaming = False

        async def watched(message: Message) -> None:
            nonlocal begun, streaming
            if message["type"] == "http.response.start":
                begun, streaming = True, _is_event_stream(message)
            elif not message.get("more_body", False):
                streaming = False
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            shown = typed(error)
            if not begun:
                await ErrorResponse(shown)(scope, receive, send)
            elif streaming:
                await _end_stream(send, shown)
            else:
                raise


def _is_event_stream(start: Message) -> bool:
    return Headers(scope=start).get("content-type", "").startswith("text/event-stream")


async def _end_stream(send: Send, error: OpticNerveError) -> None:
    """For a client that reads; another one's connection is closed, as that of any answer that has
    no end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await send({"type": "http.response.body", "body": sse.failure(error)})


def _without_host(scope: Scope) -> Scope:
    """The path alone of a request for a whole URL, as clients behind a proxy send it."""
    found = _WHOLE_URL.fullmatch(scope["path"])
    return scope if found is None else {**scope, "path": found.group(1) or "/"}


def _without_slash(scope: Scope) -> Scope:
    path = scope["path"]
    if len(path) > 1 and path.endswith("/"):
        return {**scope, "path": path.rstrip("/") or "/"}
    return dict(scope)


def _route(scope: Scope) -> str:
    """The path that the route declares, never what a client typed; empty where there is none."""
    route: Any = scope.get("route")
    return str(route.path) if route else ""


class Authentication:
    """Lets only known keys pass. Into the request's state it puts the ``Caller`` as ``caller``, and
    as ``holder`` whose share of the server's places the request counts in."""

    def __init__(self, app: ASGIApp, keys: Keys, *, public_models: bool) -> None:
        self.app = app
        self.keys = keys
        self.public_models = public_models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            open_path = not needs_key(scope["path"], public_models=self.public_models)
            try:
                caller = self.keys.identify(Headers(scope=scope).get("authorization"))
            except Unauthenticated as error:
                if not open_path:
                    await ErrorResponse(error)(scope, receive, send)
                    return
                caller = ANONYMOUS
            key = None if caller is ANONYMOUS else caller.name
            scope["state"]["caller"] = caller
            scope["state"]["holder"] = holder_of(scope.get("client"), key)
        await self.app(scope, receive, send)


class Drain:
    """Ends requests that still run when the gateway's drain is over, with Unavailable."""

    def __init__(self, app: ASGIApp, running: Running) -> None:
        self.app = app
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.running.work():
            await self.app(scope, receive, send)


class Disconnect:
    """Cancels a request whose client went away, streaming or not, at whatever stage it is.

    Once the body is read, this alone listens to the client; the application that asks hears of
    a disconnect only when there was one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = _Client(receive, send)
        work = asyncio.create_task(_run(self.app, scope, client))
        watch = asyncio.create_task(client.watch())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or client.answered:
                await work
            else:
                events.note(ended=CUT)
        finally:
            await _end(watch)
            await _end(work)


class _Client:
    """The two directions of one request. ``answered``: the whole answer is sent."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.answered = False
        self._receive = receive
        self._send = send
        self._read = asyncio.Event()  # The whole body is read.
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        if self._read.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone.set()
        if not message.get("more_body", False):
            self._read.set()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.answered = True  # Before it is sent: what follows is no disconnect.
        await self._send(message)

    async def watch(self) -> None:
        """Returns when the client is gone."""
        await self._read.wait()
        while not self._gone.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._gone.set()


async def _run(app: ASGIApp, scope: Scope, client: _Client) -> None:
    await app(scope, client.receive, client.send)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits until its ``finally`` has run."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
