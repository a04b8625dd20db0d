"""Telling a worker that was lost from a worker that answered with an error."""

from __future__ import annotations

import grpc

from gateway.edge.deadline import expired
from opticnerve.errors import DeviceLost, OpticNerveError, Unavailable
from opticnerve.rpc.errors import METADATA_KEY, from_rpc

_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,  # Of our token, since a moment ago: no fault of our caller's.
)


class WorkerLost(Unavailable):
    """The call ended without an answer: the worker died, drains, was never reached, or takes no
    calls of ours.

    ``delivered``: it had our request when its connection broke, so the request may be the cause.
    """

    def __init__(self, message: str, *, delivered: bool) -> None:
        super().__init__(message, retry_after_s=5.0)
        self.delivered = delivered


def lost_or_typed(error: grpc.RpcError, *, delivered: bool) -> OpticNerveError:
    """What a failed call means; raise it ``from`` the RpcError."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return from_rpc(error)
    metadata = error.trailing_metadata() or ()
    typed = any(key == METADATA_KEY for key, _ in metadata)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not typed:
        return expired()
    if error.code() not in _BROKEN:
        answer = from_rpc(error)
        if isinstance(answer, DeviceLost):  # It will exit and be started again.
            return WorkerLost(answer.message, delivered=True)
        return answer
    return WorkerLost(
        "the connection to a worker was lost; retry later", delivered=delivered and not typed
    )
