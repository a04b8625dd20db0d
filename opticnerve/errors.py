"""Every error that OpticNerve raises on purpose, in one tree.

    OpticNerveError                 500 INTERNAL
    ├── InvalidRequest              400 INVALID_ARGUMENT      the caller can fix it
    │   ├── InvalidMedia            400 INVALID_ARGUMENT      bytes that are no usable media
    │   │   └── PlanMismatch        400 INVALID_ARGUMENT      decoded media differ from their plan
    │   ├── MediaFetchFailed        400 INVALID_ARGUMENT      a URL that could not be read
    │   ├── ContextLengthExceeded   400 INVALID_ARGUMENT      prompt and output do not fit the model
    │   ├── AnswerTooLarge          400 INVALID_ARGUMENT      longer than the answer limit
    │   ├── UnsupportedFeature      400 UNIMPLEMENTED         known, and not served here
    │   ├── MethodNotAllowed        405 INVALID_ARGUMENT
    │   ├── UnsupportedMediaType    415 INVALID_ARGUMENT      a request body that is not JSON
    │   └── UpgradeRequired         426 INVALID_ARGUMENT      no handshake of a WebSocket
    ├── Unauthenticated             401 UNAUTHENTICATED
    ├── Forbidden                   403 PERMISSION_DENIED
    ├── NotFound                    404 NOT_FOUND
    │   └── ModelNotFound           404 NOT_FOUND
    ├── PayloadTooLarge             413 OUT_OF_RANGE
    ├── PoisonousItem               422 ABORTED               it has crashed two workers
    ├── Overloaded                  429 RESOURCE_EXHAUSTED    carries retry_after_s
    │   └── RateLimited             429 RESOURCE_EXHAUSTED    by what one API key may use
    ├── Cancelled                   499 CANCELLED             the client went away
    ├── Unavailable                 503 UNAVAILABLE           no worker; carries retry_after_s
    │   └── Mispaired               503 FAILED_PRECONDITION   workers of different checkpoints
    ├── DeadlineExceeded            504 DEADLINE_EXCEEDED
    │   └── BodyTimeout             408 DEADLINE_EXCEEDED     a request body that arrives too slowly
    ├── EmbeddingUnavailable        503 DATA_LOSS             no location had usable rows
    │   ├── EmbeddingNotFound
    │   ├── EmbeddingEvicted
    │   └── EmbeddingCorrupt
    ├── StoreError                  500 INTERNAL              a store operation failed
    │   └── StoreFull               500 INTERNAL              tmpfs or budget exhausted
    ├── EngineFailure               500 INTERNAL              a step failed
    │   └── DeviceLost              500 INTERNAL              no step can succeed any more
    └── StartupError                500 INTERNAL              the process cannot start; exits 2
        ├── ConfigError                                       a flag or environment variable
        ├── FamilyError                                       model families that cannot be used
        ├── CheckpointError                                   unsupported, incomplete or damaged
        │   └── UnsupportedCheckpoint
        └── UnusableEngine                                    stale, foreign, damaged or inaccurate

A class knows its HTTP status, its gRPC status *by number* (so that nothing here imports
grpc) and its OpenAI ``type`` and ``code``. Exceptions of other libraries are translated
where they appear, with ``from``; ``opticnerve.rpc.errors`` carries these over the wire.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class OpticNerveError(Exception):
    """Base of all. ``message`` says what happened and what to do, and is safe to show a client.

    ``logged`` replaces it in logs, if it repeats text of the request.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[int] = 13
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        logged: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.logged = message if logged is None else logged
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    def to_openai(self) -> dict[str, Any]:
        """The body of an HTTP error, in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(OpticNerveError):
    http_status = 400
    grpc_status = 3
    type = "invalid_request_error"


class InvalidMedia(InvalidRequest):
    default_code = "invalid_media"


class PlanMismatch(InvalidMedia):
    default_code = "plan_mismatch"


class MediaFetchFailed(InvalidRequest):
    default_code = "media_fetch_failed"


class ContextLengthExceeded(InvalidRequest):
    """Messages begin with ``lead``: clients look for its words to shorten the chat, and proxies to
    try a model with more room."""

    lead: ClassVar[str] = (
        "the prompt is too long: with its answer it is longer than the model's context length"
    )
    default_code = "context_length_exceeded"


class AnswerTooLarge(InvalidRequest):
    default_code = "answer_too_large"


class UnsupportedFeature(InvalidRequest):
    grpc_status = 12
    default_code = "unsupported"


class MethodNotAllowed(InvalidRequest):
    http_status = 405
    default_code = "method_not_allowed"


class UnsupportedMediaType(InvalidRequest):
    http_status = 415
    default_code = "unsupported_media_type"


class UpgradeRequired(InvalidRequest):
    http_status = 426
    default_code = "upgrade_required"


class Unauthenticated(OpticNerveError):
    http_status = 401
    grpc_status = 16
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(OpticNerveError):
    http_status = 403
    grpc_status = 7
    type = "permission_error"


class NotFound(OpticNerveError):
    http_status = 404
    grpc_status = 5
    type = "not_found_error"


class ModelNotFound(NotFound):
    default_code = "model_not_found"


class PayloadTooLarge(OpticNerveError):
    http_status = 413
    grpc_status = 11
    type = "invalid_request_error"
    default_code = "payload_too_large"


class PoisonousItem(OpticNerveError):
    http_status = 422
    grpc_status = 10
    type = "invalid_request_error"
    default_code = "unprocessable_media"


class Overloaded(OpticNerveError):
    http_status = 429
    grpc_status = 8
    type = "rate_limit_error"
    default_code = "overloaded"


class RateLimited(Overloaded):
    """``type`` and ``code`` are OpenAI's."""

    type = "requests"
    default_code = "rate_limit_exceeded"


class Cancelled(OpticNerveError):
    http_status = 499
    grpc_status = 1
    default_code = "cancelled"


class Unavailable(OpticNerveError):
    http_status = 503
    grpc_status = 14
    default_code = "unavailable"


class Mispaired(Unavailable):
    grpc_status = 9
    default_code = "mispaired_workers"


class DeadlineExceeded(OpticNerveError):
    http_status = 504
    grpc_status = 4
    type = "timeout_error"
    default_code = "deadline_exceeded"


class BodyTimeout(DeadlineExceeded):
    http_status = 408
    default_code = "body_timeout"


class EmbeddingUnavailable(OpticNerveError):
    """Rows that a consumer needs cannot be had; ``needed_reason`` names llm.proto's enum value."""

    http_status = 503
    grpc_status = 15
    default_code = "embedding_unavailable"
    needed_reason: ClassVar[str] = "NOT_FOUND"


class EmbeddingNotFound(EmbeddingUnavailable):
    pass


class EmbeddingEvicted(EmbeddingUnavailable):
    needed_reason = "EVICTED"


class EmbeddingCorrupt(EmbeddingUnavailable):
    needed_reason = "CORRUPT"


class StoreError(OpticNerveError):
    default_code = "store_error"


class StoreFull(StoreError):
    default_code = "store_full"


class EngineFailure(OpticNerveError):
    default_code = "engine_failure"


class DeviceLost(EngineFailure):
    """The accelerator is gone: the worker reports NOT_SERVING and exits to be restarted."""

    default_code = "device_lost"


LOST_TEXTS = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch")


def device_is_lost(error: Exception) -> bool:
    """Whether torch raised ``error`` because the device is gone. Only the text tells: libraries
    such as cuBLAS raise a plain RuntimeError then, and also when memory runs out."""
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and "ALLOC_FAILED" not in text
        and any(part in text for part in LOST_TEXTS)
    )


class StartupError(OpticNerveError):
    """Raised before a process serves; the CLI prints the message alone and exits with status 2."""

    default_code = "startup_failed"


class ConfigError(StartupError):
    pass


class FamilyError(StartupError):
    """A model family is broken, or several claim one model_type."""


class CheckpointError(StartupError):
    pass


class UnsupportedCheckpoint(CheckpointError):
    pass


class UnusableEngine(StartupError):
    """A tower's engine (``opticnerve engine``) that cannot be served."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``, did you mean X?`` for the known name nearest to ``given``; empty if none is near."""
    near = difflib.get_close_matches(given, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def from_openai(
    body: Any, http_status: int | None = None, retry_after_s: float | None = None
) -> OpticNerveError:
    """The error that the body of an HTTP answer describes, from this or any other server.

    Its class is the most general one with the body's code, or else with ``http_status`` (None for
    an event in a stream, which has no status).
    """
    told = body.get("error") if isinstance(body, dict) else None
    told = told if isinstance(told, dict) else {}
    code, param = told.get("code"), told.get("param")
    able = [cls for cls in by_name().values() if http_status in (None, cls.http_status)]
    cls = min(
        able or [OpticNerveError],
        key=lambda cls: (cls.default_code != code, len(cls.__mro__), cls.grpc_status),
    )
    return cls(
        str(told.get("message") or f"the answer is an error, status {http_status}"),
        param=None if param is None else str(param),
        code=None if code is None else str(code),
        retry_after_s=retry_after_s,
    )


def by_name() -> dict[str, type[OpticNerveError]]:
    """Every class of this file by its name, with which the other end of an RPC raises it again.

    Subclasses defined in other modules are left out: they never cross the wire.
    """
    found: dict[str, type[OpticNerveError]] = {}
    todo: list[type[OpticNerveError]] = [OpticNerveError]
    while todo:
        cls = todo.pop()
        if cls.__module__ == __name__:
            found[cls.__name__] = cls
        todo.extend(cls.__subclasses__())
    return found
