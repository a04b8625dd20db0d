"""The ASGI layers around every request, outermost first: ``RequestScope``, (CORS), ``Errors``,
(``PageGuard``), ``Authentication``, ``Cancellation``. The server has no lifespan and no
websockets: every scope is an HTTP request's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from gateway.api import sse
from gateway.api.anthropic.errors import is_anthropic
from gateway.api.http import send_error, typed
from gateway.edge.auth import ANONYMOUS, Keys, needs_key
from gateway.edge.http1 import holder_of
from opticnerve import addresses
from opticnerve.errors import Forbidden, Unauthenticated, UnsupportedMediaType
from opticnerve.process import LAST_WORDS_S, Running
from opticnerve.telemetry import logs
from opticnerve.telemetry.logs import printable

log = logging.getLogger(__name__)

_WHOLE_URL = re.compile(r"https?://[^/]+(/.*)?", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]*)?")
MAX_METHOD_CHARACTERS = 20  # In the log.
MAX_PATH_CHARACTERS = 100  # In the log, of a path without a route.
MAX_SHOWN = 80  # Characters of a header that an error message repeats.
CLIENT_LEFT = "cut by the client"
PROBE_PATHS = frozenset({"/live", "/ready", "/health", "/metrics"})  # Logged as debug lines.
ANY = "*"
BROWSER_HEADERS = ("origin", "sec-fetch-site", "sec-fetch-mode")


def request_id(scope: Scope) -> str:
    """The caller's x-request-id without unsafe characters, or a new id."""
    given = Headers(scope=scope).get("x-request-id", "")
    return logs.safe_id(given) or f"req-{uuid.uuid4().hex}"


class RequestScope:
    """Gives a request its id, normalises its path, counts it and writes its log line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        scope = {**scope, "path": _normalised(scope["path"])}
        if method == "HEAD":  # Every route that takes GET takes it; the server sends no body.
            scope["method"] = "GET"
        state = scope.setdefault("state", {})
        identity = state["request_id"] = request_id(scope)
        state["method"] = method
        event = logs.begin_event(identity)
        status = 0  # Until the answer begins.

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identity
                if is_anthropic(scope["path"]):
                    headers["request-id"] = identity
            await send(message)

        metrics.REQUESTS_IN_FLIGHT.inc()
        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            typed(error)  # For the log line; uvicorn closes the connection.
            raise
        finally:
            metrics.REQUESTS_IN_FLIGHT.dec()
            route, status = _route(scope), status or 499
            metrics.REQUESTS.labels(route or "other", str(status)).inc()
            event.write(
                log,
                logging.DEBUG if scope["path"] in PROBE_PATHS else logging.INFO,
                "request",
                method=method[:MAX_METHOD_CHARACTERS],
                path=route or scope["path"][:MAX_PATH_CHARACTERS],
                status=status,
                key=str(scope["state"].get("caller", "")),
            )


class Errors:
    """Turns an error that leaves the application into an answer.

    A stream that has begun ends with the error as an event, in the form of its own API. The
    connection of any other answer that has begun is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = streaming = False

        async def watched(message: Message) -> None:
            nonlocal begun, streaming
            if message["type"] == "http.response.start":
                content_type = Headers(scope=message).get("content-type", "")
                begun, streaming = True, content_type.startswith("text/event-stream")
            elif not message.get("more_body", False):
                streaming = False
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            shown = typed(error)
            if not begun:
                await send_error(shown, scope, receive, send)
            elif streaming:
                failure = scope["state"].get("failure", sse.failure)
                await _end_stream(send, failure(shown))
            else:
                raise


async def _end_stream(send: Send, data: bytes) -> None:
    """Sends the error as an event, if the client still reads. The stream stays without an end, so
    uvicorn closes its connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await send({"type": "http.response.body", "body": data})


def _normalised(path: str) -> str:
    """Without trailing slashes, and without the host if the request line has a whole URL, which a
    proxy's clients send."""
    found = _WHOLE_URL.fullmatch(path)
    path = (found[1] or "/") if found else path
    return path.rstrip("/") or path[:1]


def _route(scope: Scope) -> str:
    """The path as the route declares it, without the client's text; empty without a route."""
    route: Any = scope.get("route")
    return str(route.path) if route else ""


class Authentication:
    """Checks the API key. Sets the request's state: ``caller``, the ``Caller``, and ``holder``, the
    name for which the request counts in every bound."""

    def __init__(self, app: ASGIApp, keys: Keys, *, public_models: bool) -> None:
        self.app = app
        self.keys = keys
        self.public_models = public_models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Unauthenticated."""
        try:
            headers = Headers(scope=scope)
            caller = self.keys.identify(headers.get("authorization"), headers.get("x-api-key"))
        except Unauthenticated:
            if needs_key(scope["path"], public_models=self.public_models):
                raise
            caller = ANONYMOUS
        key = None if caller is ANONYMOUS else caller.name
        scope["state"]["caller"] = caller
        scope["state"]["holder"] = holder_of(scope.get("client"), key)
        await self.app(scope, receive, send)


class PageGuard:
    """Refuses web pages' requests to a gateway without keys, which listens on loopback alone.

    A page opened here can make the browser send requests to loopback addresses, under a host name
    of its own (DNS rebinding) or across origins. Programs send this machine's name as Host, and
    no Origin. So the Host must be a name of this machine or one of ``hosts``, and the Origin, if
    any, this server's or one of ``origins``. ``*`` in either allows any.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app = app
        self.hosts = {host.strip("[]").lower() for host in hosts}
        self.origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Forbidden and UnsupportedMediaType."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if host and not self._is_ours(host):
            raise Forbidden(
                f"this server has no keys and is for this machine alone, and the request is for "
                f"the host {printable(host, MAX_SHOWN)!r}; call it as localhost, or see "
                "--allowed-hosts and --api-key-file",
                code="host_not_allowed",
            )
        if origin is not None and not self._is_allowed(origin, host):
            raise Forbidden(
                f"this server has no keys and is for this machine alone, and the request is from "
                f"a page of {printable(origin, MAX_SHOWN)!r}; see --cors-origins and "
                "--api-key-file",
                code="origin_not_allowed",
            )
        # Without a preflight request, a page can send a body without a type, or with another one.
        from_browser = any(name in headers for name in BROWSER_HEADERS)
        typeless = not headers.get("content-type", "").strip()
        if scope["method"] == "POST" and from_browser and typeless:
            raise UnsupportedMediaType("the body has no type; send JSON as application/json")
        await self.app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = found[1].strip("[]").rstrip(".") if found else ""
        return ANY in self.hosts or addresses.is_loopback(name) or name in self.hosts

    def _is_allowed(self, origin: str, host: str) -> bool:
        own = (f"http://{host}", f"https://{host}")
        return origin in self.origins or ANY in self.origins or origin.lower() in own


class Cancellation:
    """Cancels a request whose client disconnected, streaming or not, at any stage; and one that
    still runs when the gateway's drain is over, which then raises Unavailable.

    Once the body is read, only this layer receives from the client; the application's ``receive``
    then returns when the client disconnects.
    """

    def __init__(self, app: ASGIApp, running: Running) -> None:
        self.app = app
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _ClientChannel(receive, send)
        async with self.running.work():
            work = asyncio.ensure_future(self.app(scope, client.receive, client.send))
            watch = asyncio.create_task(client.watch())
            try:
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if work.done() or client.answered:
                    await work
                else:
                    logs.note(ended=CLIENT_LEFT)
            finally:
                await _end(watch)
                await _end(work)


class _ClientChannel:
    """The messages of one request, in both directions. ``answered``: the answer is complete."""

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
            self.answered = True  # Before it is sent: a disconnect after that cancels nothing.
        await self._send(message)

    async def watch(self) -> None:
        """Returns when the client has disconnected."""
        await self._read.wait()
        while not self._gone.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._gone.set()


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits until its ``finally`` has run."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
