"""HTTP as every route uses it: bodies read within bounds, answers and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.api.schemas.base import Strict
from gateway.api.schemas.count import VALUE_BYTES, count_values
from gateway.api.schemas.outline import Outline, draw
from gateway.api.schemas.parsing import Ignored, parse
from gateway.edge.admission import Ticket
from gateway.edge.lanes import off_loop
from opticnerve.errors import (
    BodyTimeout,
    Cancelled,
    InvalidRequest,
    OpticNerveError,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from opticnerve.telemetry import events
from opticnerve.telemetry.logs import printable

OFF_LOOP_BYTES = 2**19  # A larger body, and one of more values, is parsed in a thread.
OFF_LOOP_VALUES = 2**12
WARNINGS = "x-opticnerve-warnings"
MAX_WARNING = 500
PROGRESS_BYTES = 8 * 2**10  # Of a body or an answer within the stall timeout; or its end.
SWITCH = {"true": True, "1": True, "false": False, "0": False}
M = TypeVar("M", bound=Strict)


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """``max_values``: objects, lists and their entries. ``timeout_s``: from head to end.
    ``stall_timeout_s``: for each next ``PROGRESS_BYTES``, or the end."""

    max_bytes: int
    max_values: int
    timeout_s: float
    stall_timeout_s: float
    ignore_unknown: bool = False


class JSONResponse(Response):
    """Compact JSON, UTF-8; not-a-number is a bug, not an answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(
            content, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode()


def error_headers(error: OpticNerveError) -> dict[str, str]:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.http_status == 408:
        headers["connection"] = "close"  # The rest of the body is not waited for.
    return headers


class ErrorResponse(JSONResponse):
    """An error as a whole answer, in OpenAI's shape."""

    def __init__(self, error: OpticNerveError, headers: Mapping[str, str] | None = None) -> None:
        self.error = error
        all_headers = {**error_headers(error), **(headers or {})}
        super().__init__(error.to_openai(), error.http_status, all_headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events.failed(self.error)
        await super().__call__(scope, receive, send)


def typed(error: Exception) -> OpticNerveError:
    """``error`` as a client may see it; the request's line in the log says what it was."""
    if isinstance(error, OpticNerveError):
        events.failed(error)
        return error
    shown = OpticNerveError(
        "internal error; the server's log has the details under this request's id",
        code="internal_error",
    )
    events.failed(shown, cause=error)
    return shown


def read_switch(request: Request, name: str) -> bool:
    """A query parameter that is true or false; false where it is not given. Raises
    InvalidRequest."""
    value = request.query_params.get(name, "false").lower()
    if value not in SWITCH:
        raise InvalidRequest(f"{name}: should be true or false", param=name)
    return SWITCH[value]


async def read_json(
    request: Request, model: type[M], limits: BodyLimits, ticket: Ticket
) -> tuple[M, Ignored]:
    """The request's body as ``model``, and what of it is ignored.

    The ticket holds the body's bytes as they come, enters once all are there, and holds what the
    body's values take besides. Raises InvalidRequest, UnsupportedMediaType, PayloadTooLarge,
    BodyTimeout, Overloaded.
    """
    _check_type(request)
    body = await _arrived(request, limits, ticket.hold)
    ticket.enter()
    long = len(body) > OFF_LOOP_BYTES
    if not long and not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object", code="invalid_json")
    text: bytearray | Outline = body
    if long:
        text = await off_loop(len(body), draw, body, limits.max_values)
    values = text.values if isinstance(text, Outline) else count_values(text, limits.max_values)
    if values > limits.max_values:
        raise _too_many(limits.max_values)
    ticket.hold(values * VALUE_BYTES)
    if long or values > OFF_LOOP_VALUES:
        ignore = limits.ignore_unknown
        return await off_loop(len(body), parse, model, text, ignore_unknown=ignore)
    return parse(model, text, ignore_unknown=limits.ignore_unknown)


def warning_headers(ignored: Ignored, heeded: Collection[str] = ()) -> dict[str, str]:
    """Tells the client what it said in vain, ``heeded`` fields excepted. Names are the client's
    text: a header gets what is printable of them, within bounds."""
    unheeded = [name for name in ignored.unheeded if name not in heeded]
    lists = (("ignored unknown fields", ignored.unknown), ("without effect", unheeded))
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists if names)
    if not told:
        return {}
    told = printable(told, MAX_WARNING).rstrip()  # A header that ends in a space is none.
    events.note(ignored=told)
    return {WARNINGS: told}


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            f"the body's type is {kind[:80]!r}; send JSON as application/json"
        )
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("send the body without a content-encoding")


async def _arrived(request: Request, limits: BodyLimits, hold: Callable[[int], None]) -> bytearray:
    try:
        async with asyncio.timeout(limits.timeout_s), asyncio.timeout(None) as stall:
            return await _read(request, limits, hold, stall)
    except TimeoutError as error:
        if stall.expired():
            raise BodyTimeout(
                f"less than {PROGRESS_BYTES} bytes of the body came in "
                f"{limits.stall_timeout_s:g} s; send it without pauses, or raise --stall-timeout-s"
            ) from error
        raise BodyTimeout(
            f"the body was not there within {limits.timeout_s:g} s; send fewer or smaller "
            "pictures, or their URLs, or raise --body-timeout-s"
        ) from error


async def _read(
    request: Request, limits: BodyLimits, hold: Callable[[int], None], stall: asyncio.Timeout
) -> bytearray:
    """``stall`` is put off as the body comes."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.max_bytes:
        raise _too_large(limits.max_bytes)
    body = bytearray()
    due, clock = 0, asyncio.get_running_loop().time
    while True:
        if len(body) >= due:
            due = len(body) + PROGRESS_BYTES
            stall.reschedule(clock() + limits.stall_timeout_s)
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client went away")
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > limits.max_bytes:
            raise _too_large(limits.max_bytes)
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
        f"the body holds more than {limit} values (objects, lists and their entries); send fewer "
        "messages, parts or fields, or raise --max-request-values",
        code="too_many_values",
    )
