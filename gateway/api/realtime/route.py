"""``WS /v1/realtime``: a session over a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gateway.api.realtime.session import PATH, Client, ClientLeft, Session, stopping
from gateway.api.realtime.writer import ServerEvent
from gateway.api.routing import Call, make_router
from gateway.api.sse import dumps
from gateway.edge.admission import Ticket
from gateway.edge.limits import EVENTS_PER_S, MAX_SESSION_S, SESSION_IDLE_S
from gateway.edge.middleware import CLIENT_LEFT
from gateway.edge.threads import off_loop_above
from opticnerve.errors import (
    DeadlineExceeded,
    OpticNerveError,
    UnsupportedFeature,
    UpgradeRequired,
)
from opticnerve.process import Running
from opticnerve.telemetry import logs

if TYPE_CHECKING:
    from gateway.app import Gateway

SUBPROTOCOL = "realtime"  # Browsers offer this with their key, and expect it back.
NORMAL, GOING_AWAY = 1000, 1001  # Codes of close frames.
BURST_S = 1.0  # Seconds' worth of events that may come at once without being paced.
OFF_LOOP_CHARACTERS = 2**18  # A longer event is encoded in a thread.

DESCRIPTION = """\
OpenAI's realtime events, with text and pictures; audio is refused with an `error` event. A client
sends `session.update`, `conversation.item.create`, `conversation.item.delete`,
`conversation.item.retrieve`, `response.create` and `response.cancel`. Items are messages, function
calls and their outputs, in the form of the Responses API; events show an item without the bytes of
its pictures. Beside OpenAI's settings, a session and a response take the sampling fields of the
other APIs, such as `temperature`.

The conversation is on the connection alone, and is not truncated: delete items that are no longer
needed. Each `response.create` is one request under all limits. What is wrong with it once it has
begun, such as a picture that cannot be read, is the error of its `response.done`.

`model` in the query is optional. Browsers offer their key as the subprotocol
`openai-insecure-api-key.KEY`, beside `realtime`; their page's origin must be this server's or one
of `--cors-origins`. Ephemeral keys and WebRTC are not served. A request that is no handshake gets a
426.
"""

router = make_router("generation")


@router.get(
    PATH,
    summary="Open a realtime session: the handshake of a WebSocket",
    description=DESCRIPTION,
    status_code=101,
    response_class=Response,
    response_description="The connection is a WebSocket.",
)
async def describe_session(call: Call) -> Response:
    raise UpgradeRequired(
        f"{PATH} is a WebSocket: open it with version 13 of the protocol, for example with "
        "openai's client.realtime.connect"
    )


@router.websocket(PATH)
async def open_session(socket: WebSocket) -> None:
    """Raises ModelNotFound, UnsupportedFeature, Overloaded and Unavailable before the handshake is
    answered."""
    gateway: Gateway = socket.app.state.gateway
    model = _model(socket, gateway)
    if gateway.running.closed.is_set():
        raise stopping()
    state = socket.scope["state"]
    client = Client(state["caller"], state["holder"], state["request_id"])
    with gateway.admission.open_session(client.holder) as ticket:
        state["hold"] = ticket.hold_bytes  # See gateway.edge.websocket.
        offered = socket.scope["subprotocols"]
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        session = Session(gateway, client, ticket, model, functools.partial(_send, socket))
        try:
            await _serve(socket, session, ticket, gateway.running)
        except ClientLeft:
            logs.note(ended=CLIENT_LEFT)
        finally:
            del state["hold"]


def _model(socket: WebSocket, gateway: Gateway) -> str:
    asked = socket.query_params.get("model")
    names = gateway.names.permitted(socket.scope["state"]["caller"])
    names.check(asked)
    logs.note(model=asked)
    for name in ("call_id", "intent"):
        if name in socket.query_params:
            raise UnsupportedFeature(
                f"{name}: not supported by this server, which takes text and pictures; leave it "
                "out",
                param=name,
            )
    return asked or names.root


async def _serve(socket: WebSocket, session: Session, ticket: Ticket, running: Running) -> None:
    """Serves until the client leaves, or the session must end; then the client gets an error.
    Raises ClientLeft."""
    await session.open()
    tasks = [
        asyncio.create_task(_read(socket, session, ticket)),
        asyncio.create_task(_drain(session, running)),
    ]
    try:
        async with asyncio.timeout(MAX_SESSION_S):
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ending = next(iter(done)).result()
    except TimeoutError:
        ending = _over(f"a session lasts {MAX_SESSION_S:g} s at most", "session_expired")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await session.close()
    if ending is not None:
        await session.tell(ending)
        with contextlib.suppress(WebSocketDisconnect):
            await socket.close(GOING_AWAY, ending.code)


async def _read(socket: WebSocket, session: Session, ticket: Ticket) -> OpticNerveError | None:
    """Passes the client's events to the session, at a bounded rate. Returns None when the client
    leaves, or an error after a long time without events."""
    clock, due = asyncio.get_running_loop().time, 0.0
    while True:
        try:
            async with asyncio.timeout(SESSION_IDLE_S):
                message = await socket.receive()
        except TimeoutError:
            if session.busy:
                continue
            return _over(f"nothing has happened for {SESSION_IDLE_S:g} s", "session_idle")
        if message["type"] == "websocket.disconnect":
            logs.note(closed=message["code"])
            return None
        text = message["bytes"]
        num_bytes = len(text)
        try:
            await session.take(text)
        finally:
            del message, text  # Frees them: the next message may be long in coming.
            ticket.free_bytes(num_bytes)
        due = max(due, clock() - BURST_S) + 1 / EVENTS_PER_S
        if due > clock():
            await asyncio.sleep(due - clock())


async def _drain(session: Session, running: Running) -> OpticNerveError:
    """Waits until the gateway is stopping and the session's responses have ended; returns the
    session's error."""
    await running.closed.wait()
    await session.drain()
    return stopping()


def _over(why: str, code: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{why}; open a new one", code=code)


async def _send(socket: WebSocket, event: ServerEvent) -> None:
    """Raises ClientLeft."""
    text = await off_loop_above(OFF_LOOP_CHARACTERS, _characters(event), _encoded, event)
    if socket.application_state is not WebSocketState.CONNECTED:
        raise ClientLeft
    try:
        await socket.send_text(text)
    except WebSocketDisconnect as error:
        raise ClientLeft from error


def _encoded(event: ServerEvent) -> str:
    return dumps(event).decode()


def _characters(value: Any) -> int:
    """The approximate number of characters in an event, counting its longer strings only."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0
