"""OpticNerveError to gRPC status and back, with class and fields.

Generic clients read the status; our callers raise the same class again, from the ``ErrorDetail`` in
the trailing metadata ``opticnerve-error-bin``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc

from opticnerve import errors
from opticnerve.errors import OpticNerveError
from opticnerve.pb import embedding_pb2, llm_pb2
from opticnerve.telemetry.logs import failed

METADATA_KEY = "opticnerve-error-bin"
MAX_MESSAGE = 1000  # Characters. gRPC ends a call with too large metadata without any status.

STATUS_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

# For a status without details: from a proxy, a dead peer or an unknown method.
CLASS_BY_STATUS: dict[grpc.StatusCode, type[OpticNerveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedFeature,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.OUT_OF_RANGE: errors.PayloadTooLarge,
    grpc.StatusCode.ABORTED: errors.PoisonousItem,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Mispaired,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: errors.EmbeddingUnavailable,
}


def to_detail(error: OpticNerveError) -> embedding_pb2.ErrorDetail:
    return embedding_pb2.ErrorDetail(
        kind=type(error).__name__,
        message=error.message[:MAX_MESSAGE],
        param=error.param or "",
        code=error.code or "",
        retry_after_s=error.retry_after_s or 0.0,
    )


def from_detail(detail: embedding_pb2.ErrorDetail) -> OpticNerveError:
    """The error that ``detail`` describes; an unknown kind becomes the base class."""
    cls = errors.by_name().get(detail.kind, OpticNerveError)
    return cls(
        detail.message,
        param=detail.param or None,
        code=detail.code or None,
        retry_after_s=detail.retry_after_s or None,
    )


def from_failure(message: llm_pb2.EmbeddingFailed) -> OpticNerveError:
    """The error that a caller reports for an item whose embedding it could not get."""
    if message.HasField("detail"):
        return from_detail(message.detail)
    status = STATUS_BY_NUMBER.get(message.status, grpc.StatusCode.UNKNOWN)
    cls = CLASS_BY_STATUS.get(status, OpticNerveError)
    return cls("the picture could not be encoded", param=message.key)


def from_rpc(error: grpc.RpcError) -> OpticNerveError:
    """The typed error behind a failed call; raise it ``from`` the RpcError."""
    metadata: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in metadata or ():
        if key == METADATA_KEY:
            return from_detail(embedding_pb2.ErrorDetail.FromString(value))
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or code.name
    return CLASS_BY_STATUS.get(code, OpticNerveError)(details)


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Within the context, a call that fails raises the typed error behind it."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends a call with ``error``. Other exceptions than OpticNerveError are logged, and shown as an
    internal error."""
    cause = None if isinstance(error, OpticNerveError) else error
    if not isinstance(error, OpticNerveError):
        error = OpticNerveError("internal error; the service's log has the details")
    failed(error, cause)
    metadata = ((METADATA_KEY, to_detail(error).SerializeToString()),)
    status = STATUS_BY_NUMBER[error.grpc_status]
    await context.abort(status, error.message[:MAX_MESSAGE], metadata)
    raise AssertionError("context.abort returned")
