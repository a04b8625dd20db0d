"""The ASGI layers around every request, outermost first: ``RequestScope``, (CORS), ``Errors``,
``PageGuard``, ``Authentication``, ``Cancellation``. The server has no lifespan: every scope is an
HTTP request's, or a WebSocket's, from its handshake to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics
from gateway.api import sse
from gateway.api.anthropic.errors import is_anthropic
from gateway.api.http import send_error, typed
from gateway.edge.auth import ANONYMOUS, Keys, needs_key, offered_key
from gateway.edge.connections import holder_of
from opticnerve import addresses
from opticnerve.errors import Forbidden, Unauthenticated, UnsupportedMediaType
from opticnerve.process import LAST_WORDS_S, Running
from opticnerve.telemetry import logs, traces
from opticnerve.telemetry.logs import printable
from opticnerve.telemetry.metrics import count_error

log = logging.getLogger(__name__)

_WHOLE_URL = re.compile(r"https?://[^/]+(/.*)?", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]*)?")
MAX_METHOD_CHARACTERS = 20  # Longest method in the log.
MAX_PATH_CHARACTERS = 100  # Longest path in the log, for a path without a route.
MAX_SHOWN = 80  # Characters of a header that an error message quotes.
INTERNAL_ERROR = 1011  # Code of a WebSocket's close frame.
CLIENT_LEFT = "cut by the client"
# Logged at debug level; never counted as in flight.
PROBE_PATHS = frozenset({"/live", "/ready", "/health", "/metrics"})
WEBSOCKET = "WEBSOCKET"  # Method of a WebSocket's requests in the log.
# The ASGI messages that begin an answer, with the status of those that carry none.
STATUSES = {"http.response.start": 0, "websocket.http.response.start": 0, "websocket.accept": 101}
ANY = "*"
BROWSER_HEADERS = ("origin", "sec-fetch-site", "sec-fetch-mode")


def request_id(scope: Scope) -> str:
    """The caller's x-request-id without unsafe characters, or a new id."""
    given = Headers(scope=scope).get("x-request-id", "")
    return logs.safe_id(given) or f"req-{uuid.uuid4().hex}"


@dataclass(slots=True)
class Served:
    """What the log line and the metrics report of one request. ``route``: its path as the API
    declares it, such as ``/v1/models/{name}``, without the client's text; empty for an unknown
    path."""

    method: str
    path: str
    route: str = ""
    status: int = 0  # 0: the client left before there was an answer.
    caller: str = ""


@contextlib.contextmanager
def logged(served: Served, identity: str, what: str = "request") -> Iterator[Served]:
    """Surrounds one request, served by this task: counts it and writes its log line, whose message
    is ``what``. The context's body completes ``served``."""
    event = logs.begin_event(identity)
    counted = what == "request" and served.path not in PROBE_PATHS
    if counted:
        metrics.REQUESTS_IN_FLIGHT.inc()
    try:
        yield served
    except Exception as error:
        typed(error)  # For the log line.
        raise
    finally:
        if counted:
            metrics.REQUESTS_IN_FLIGHT.dec()
        status = served.status or 499
        place = served.route or "other"
        metrics.REQUESTS.labels(place, str(status)).inc()
        if event.error is not None:
            count_error(place, event.error)
            traces.current().fail(event.error)
        event.write(
            log,
            logging.DEBUG if served.path in PROBE_PATHS else logging.INFO,
            what,
            method=served.method[:MAX_METHOD_CHARACTERS],
            path=served.route or served.path[:MAX_PATH_CHARACTERS],
            status=status,
            key=served.caller,
        )


class RequestScope:
    """Gives a request its id, normalises its path, counts it and writes its log line. A WebSocket
    has one line for its whole life; each of its responses has its own line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_socket = scope["type"] == "websocket"
        method = WEBSOCKET if is_socket else scope["method"]
        scope = {**scope, "path": _normalised(scope["path"])}
        if method == "HEAD":  # Routes see a GET; the server drops the body.
            scope["method"] = "GET"
        state = scope.setdefault("state", {})
        identity = state["request_id"] = request_id(scope)
        state["method"] = method
        served = Served(method, scope["path"])

        async def watched(message: Message) -> None:
            if message["type"] in STATUSES:
                served.status = message.get("status") or STATUSES[message["type"]]
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identity
                if is_anthropic(scope["path"]):
                    headers["request-id"] = identity
                headers.update(state["limits"]() if "limits" in state else {})
            await send(message)

        with (
            _traced(served, scope),
            logged(served, identity, "session" if is_socket else "request"),
        ):
            try:
                await self.app(scope, receive, watched)
            finally:
                served.route, served.caller = _route(scope), str(state.get("caller", ""))


@contextlib.contextmanager
def _traced(served: Served, scope: Scope) -> Iterator[None]:
    """The span of one request; none for probes. It joins the caller's trace, or begins one."""
    if served.path in PROBE_PATHS:
        yield
        return
    method = served.method[:MAX_METHOD_CHARACTERS]
    with traces.serving(method, Headers(scope=scope).items()) as span:
        try:
            yield
        finally:
            span.rename(f"{method} {served.route}".rstrip())
            standard = {
                "http.request.method": method,
                "http.route": served.route or None,
                "http.response.status_code": served.status or None,
            }
            identity = scope["state"]["request_id"]
            span.set(standard, request_id=identity, key=served.caller or None)


class Errors:
    """Turns an error that leaves the application into an answer.

    If the answer has begun: a stream ends with the error as an event of its API, an open WebSocket
    gets a close frame, and any other answer's connection is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = streaming = False

        async def watched(message: Message) -> None:
            nonlocal begun, streaming
            if message["type"] in STATUSES:
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
            elif scope["type"] == "websocket":
                with contextlib.suppress(OSError):  # The client has left.
                    await send({"type": "websocket.close", "code": INTERNAL_ERROR})
            else:
                raise


async def _end_stream(send: Send, data: bytes) -> None:
    """Sends the error as an event, if the client still reads. The response is not finished, so that
    uvicorn closes the connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await send({"type": "http.response.body", "body": data})


def _normalised(path: str) -> str:
    """The path without trailing slashes. Also removes scheme and host: clients of a proxy send the
    whole URL in the request line."""
    found = _WHOLE_URL.fullmatch(path)
    path = (found[1] or "/") if found else path
    return path.rstrip("/") or path[:1]


def _route(scope: Scope) -> str:
    """The path as its route declares it, without the client's text; empty without a route."""
    route: Any = scope.get("route")
    return str(route.path) if route else ""


class Authentication:
    """Checks the API key. Sets the request's state: ``caller``, the ``Caller``; ``holder``, the
    name that the request counts for in every bound; ``limits``, a function that makes the headers
    with what is left of the caller's rate."""

    def __init__(self, app: ASGIApp, keys: Keys, *, public_models: bool) -> None:
        self.app = app
        self.keys = keys
        self.public_models = public_models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Unauthenticated."""
        try:
            headers = Headers(scope=scope)
            api_key = headers.get("x-api-key") or offered_key(scope)
            caller = self.keys.identify(headers.get("authorization"), api_key)
        except Unauthenticated:
            if needs_key(scope["path"], public_models=self.public_models):
                raise
            caller = ANONYMOUS
        key = None if caller is ANONYMOUS else caller.name
        scope["state"]["caller"] = caller
        scope["state"]["holder"] = holder_of(scope.get("client"), key)
        if caller.rate is not None:
            scope["state"]["limits"] = lambda: self.keys.rate_headers(caller)
        await self.app(scope, receive, send)


class PageGuard:
    """Refuses requests from web pages that this server does not serve.

    Any page can make its visitor's browser open a WebSocket to any address, and read what comes, so
    a WebSocket's Origin, if any, must be this server's or one of ``origins``. ``local``: the
    gateway has no keys and listens on loopback alone. Then any page could also send requests, under
    a host name of its own (DNS rebinding) or across origins, so the Host must be a name of this
    machine or one of ``hosts``, and every request's Origin is checked. Programs pass: they send
    this machine's name as Host, and no Origin. ``*`` in ``hosts`` or ``origins`` allows any.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], origins: Collection[str], *, local: bool
    ) -> None:
        self.app = app
        self.hosts = {host.strip("[]").lower() for host in hosts}
        self.origins = set(origins)
        self.local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Forbidden and UnsupportedMediaType."""
        if self.local or scope["type"] == "websocket":
            self._check(scope)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.local and host and not self._is_ours(host):
            raise Forbidden(
                f"this server has no keys and is for this machine alone, and the request is for "
                f"the host {printable(host, MAX_SHOWN)!r}; call it as localhost, or see "
                "--allowed-hosts and --api-key-file",
                code="host_not_allowed",
            )
        if origin is not None and not self._is_allowed(origin, host):
            why = "has no keys and is for this machine alone" if self.local else "is not for it"
            raise Forbidden(
                f"the request is from a page of {printable(origin, MAX_SHOWN)!r}, and this server "
                f"{why}; see --cors-origins{' and --api-key-file' if self.local else ''}",
                code="origin_not_allowed",
            )
        # A page needs no preflight request to send a body without a type, or with one that is not
        # JSON's.
        from_browser = any(name in headers for name in BROWSER_HEADERS)
        typeless = not headers.get("content-type", "").strip()
        if scope.get("method") == "POST" and from_browser and typeless:
            raise UnsupportedMediaType("the body has no type; send JSON as application/json")

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = found[1].strip("[]").rstrip(".") if found else ""
        return ANY in self.hosts or addresses.is_loopback(name) or name in self.hosts

    def _is_allowed(self, origin: str, host: str) -> bool:
        own = (f"http://{host}", f"https://{host}")
        return origin in self.origins or ANY in self.origins or origin.lower() in own


class Cancellation:
    """Cancels a request, streaming or not, at any stage when its client disconnects. A request that
    still runs when the gateway's drain is over is cancelled too, and raises Unavailable.

    Once the body is read, only this layer receives from the client; the application's ``receive``
    then returns when the client disconnects. A WebSocket's application reads from its client all
    the time, and handles a disconnect itself.
    """

    def __init__(self, app: ASGIApp, running: Running) -> None:
        self.app = app
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
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
    """The ASGI messages of one request, in both directions. ``answered``: the answer is
    complete."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.answered = False
        self._receive = receive
        self._send = send
        self._read = asyncio.Event()  # Set once the whole body is read.
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
            self.answered = True  # Set before sending: a disconnect from here on cancels nothing.
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
