"""HTTP for all routes: bodies are read within bounds, and errors are answered in the shape of the
API that the path belongs to."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict

from gateway.api import sse
from gateway.api.anthropic.errors import is_anthropic, to_anthropic
from gateway.api.schemas.base import Body
from gateway.api.schemas.long_json import Outline, count_values, split_long_strings
from gateway.api.schemas.parsing import Ignored, parse
from gateway.edge.admission import Ticket
from gateway.edge.limits import PROGRESS_BYTES, VALUE_BYTES
from gateway.edge.threads import off_loop
from opticnerve.config import GatewayConfig
from opticnerve.errors import (
    BodyTimeout,
    Cancelled,
    InvalidRequest,
    OpticNerveError,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from opticnerve.telemetry import logs

REF = "#/components/schemas/{model}"
OFF_LOOP_BYTES = 2**19  # Larger bodies, and those with more values, are parsed in a thread.
OFF_LOOP_VALUES = 2**12
B = TypeVar("B", bound=Body)
T = TypeVar("T")


class ErrorDetail(TypedDict):
    message: Annotated[str, Field(description="What happened, and what to do.")]
    type: Annotated[str, Field(examples=["invalid_request_error"])]
    param: Annotated[
        str | None,
        Field(
            description="The path of the field at fault.",
            examples=["messages[0].content[1].image_url.url"],
        ),
    ]
    code: Annotated[str | None, Field(examples=["invalid_media"])]


class ErrorAnswer(TypedDict):
    """Why a request failed. A stream that fails after its first event sends this as an event."""

    error: ErrorDetail


def content(media_type: str, shape: Any) -> dict[str, Any]:
    """A response's content for the OpenAPI document; ``describe`` moves its schemas there."""
    schema = TypeAdapter(shape).json_schema(mode="serialization", ref_template=REF)
    return {"content": {media_type: {"schema": schema}}}


def errors_of(shape: Any) -> dict[int | str, dict[str, Any]]:
    """The responses of routes whose errors have this shape."""
    error = content("application/json", shape)
    client = "The request is at fault, or (429) there are too many requests."
    server = "The server is at fault, or (503) no worker is available."
    return {"4XX": {"description": client, **error}, "5XX": {"description": server, **error}}


def error_body(error: OpticNerveError, scope: Scope) -> Mapping[str, Any]:
    """The body of an error. Its shape depends on the path alone, because the layers around the
    routes refuse requests too."""
    if is_anthropic(scope["path"]):
        return to_anthropic(error, scope["state"]["request_id"])
    return error.to_openai()


class JSONResponse(Response):
    """Compact JSON in UTF-8. Raises ValueError for NaN and infinities, which JSON does not have."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return sse.dumps(content)


def error_headers(error: OpticNerveError) -> dict[str, str]:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.http_status == 426:
        headers |= {"upgrade": "websocket", "sec-websocket-version": "13"}
    if error.http_status == 408:
        headers["connection"] = "close"  # The rest of the body is not read.
    return headers


async def send_error(
    error: OpticNerveError, scope: Scope, receive: Receive, send: Send, **headers: str
) -> None:
    """Answers a request with an error."""
    logs.failed(error)
    body, all_headers = error_body(error, scope), {**error_headers(error), **headers}
    await JSONResponse(body, error.http_status, all_headers)(scope, receive, send)


def typed(error: Exception) -> OpticNerveError:
    """The typed error that clients see for ``error``. The log line has the exception itself."""
    if isinstance(error, OpticNerveError):
        logs.failed(error)
        return error
    shown = OpticNerveError(
        "internal error; the server's log has the details under this request's id",
        code="internal_error",
    )
    logs.failed(shown, cause=error)
    return shown


async def read_body(
    request: Request, model: type[B], config: GatewayConfig, ticket: Ticket
) -> tuple[B, Ignored]:
    """The request's body as ``model``, and the fields in it that are ignored.

    The ticket counts the body's bytes as they arrive, the request once the body is complete, and
    then the memory of the body's values. Raises InvalidRequest, UnsupportedMediaType,
    PayloadTooLarge, BodyTimeout, Overloaded.
    """
    _check_type(request)
    body = await _receive_body(request, config, ticket.hold_bytes)
    ticket.count_request()
    ignore = config.ignore_unknown_fields
    read = functools.partial(parse, model, ignore_unknown=ignore)
    return await read_json(body, read, config, ticket.hold_bytes)


async def read_json(
    body: bytearray,
    read: Callable[[bytearray | Outline], T],
    config: GatewayConfig,
    hold: Callable[[int], None],
) -> T:
    """Applies ``read`` to a body of JSON, after ``hold`` has counted the memory of its values; in a
    thread if it is long. Raises InvalidRequest, PayloadTooLarge, and the errors of both."""
    most = config.max_request_values
    long = len(body) > OFF_LOOP_BYTES
    if not long and not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object", code="invalid_json")
    text: bytearray | Outline = body
    if long:
        text = await off_loop(len(body), split_long_strings, body, most)
    values = text.values if isinstance(text, Outline) else count_values(text, most)
    if values > most:
        raise _too_many(most)
    hold(values * VALUE_BYTES)
    if long or values > OFF_LOOP_VALUES:
        return await off_loop(len(body), read, text)
    return read(text)


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            f"the body's type is {kind[:80]!r}; send JSON as application/json"
        )
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("send the body without a content-encoding")


async def _receive_body(
    request: Request, config: GatewayConfig, hold: Callable[[int], None]
) -> bytearray:
    try:
        async with asyncio.timeout(config.body_timeout_s), asyncio.timeout(None) as stall:
            return await _read(request, config, hold, stall)
    except TimeoutError as error:
        if stall.expired():
            raise BodyTimeout(
                f"less than {PROGRESS_BYTES} bytes of the body arrived in "
                f"{config.stall_timeout_s:g} s; send it without pauses, or raise --stall-timeout-s"
            ) from error
        raise BodyTimeout(
            f"the body did not arrive within {config.body_timeout_s:g} s; send fewer or smaller "
            "pictures, or their URLs, or raise --body-timeout-s"
        ) from error


async def _read(
    request: Request, config: GatewayConfig, hold: Callable[[int], None], stall: asyncio.Timeout
) -> bytearray:
    """``stall`` is rescheduled whenever PROGRESS_BYTES have arrived."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > config.max_request_bytes:
        raise _too_large(config.max_request_bytes)
    body = bytearray()
    due, clock = 0, asyncio.get_running_loop().time
    while True:
        if len(body) >= due:
            due = len(body) + PROGRESS_BYTES
            stall.reschedule(clock() + config.stall_timeout_s)
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client disconnected")
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > config.max_request_bytes:
            raise _too_large(config.max_request_bytes)
        hold(len(chunk))
        body += chunk
        if not message.get("more_body", False):
            return body


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body is larger than {limit} bytes; send fewer or smaller pictures, or their URLs"
    )


def _too_many(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"there are more than {limit} values (objects, lists and their entries); send fewer "
        "messages, parts or fields, or raise --max-request-values",
        code="too_many_values",
    )
