"""Errors in the shape of Anthropic's API."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from opticnerve.errors import OpticNerveError

PATH = "/v1/messages"
PATHS = re.compile(r"(/v1){0,2}/messages(/.*)?", re.DOTALL)
"""The paths below PATH, and those that a client with a wrong base URL calls."""

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's error types by HTTP status; others are invalid_request_error or api_error."""


class AnthropicErrorDetails(TypedDict):
    error_code: Annotated[str | None, Field(examples=["invalid_media"])]
    param: Annotated[
        str | None,
        Field(
            description="The path of the field at fault.",
            examples=["messages[0].content[1].source.data"],
        ),
    ]


class AnthropicErrorBody(TypedDict):
    type: Annotated[str, Field(examples=["invalid_request_error"])]
    message: Annotated[str, Field(description="What happened, and what to do.")]
    details: NotRequired[AnthropicErrorDetails]


class AnthropicError(TypedDict):
    """Why a request failed. A stream that fails after its first event sends this as an event."""

    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


def is_anthropic(path: str) -> bool:
    """Whether answers on this path are in the shape of Anthropic's API."""
    return PATHS.fullmatch(path) is not None


def anthropic_type(status: int) -> str:
    """The error's type by its HTTP status."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def to_anthropic(error: OpticNerveError, request_id: str) -> AnthropicError:
    kind = anthropic_type(error.http_status)
    body: AnthropicErrorBody = {"type": kind, "message": error.message}
    if error.code is not None or error.param is not None:
        body["details"] = {"error_code": error.code, "param": error.param}
    return {"type": "error", "error": body, "request_id": request_id}
