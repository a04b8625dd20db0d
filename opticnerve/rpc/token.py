"""The token of calls between our processes (``--rpc-token-file``). Channels send it, and servers
require it, as ``authorization: Bearer TOKEN``. It authenticates callers, encrypts nothing, and is
never logged."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc

from opticnerve.errors import Unauthenticated
from opticnerve.rpc.errors import abort
from opticnerve.secret import read_secret
from opticnerve.telemetry import metrics

OPTION = "rpc_token_file"
HEADER = "authorization"
# Probes of the standard health check have no token.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]


def load_token(path: str | Path | None, *, warns: bool = True) -> str | None:
    """The token in the file of ``--rpc-token-file``; None without one. ``warns``: see
    ``read_secret``. Raises ConfigError."""
    return None if path is None else read_secret(str(path), OPTION, warns=warns)


class TokenGuard(grpc.aio.ServerInterceptor):
    """Refuses every call that does not carry ``token``, before it reads a message of the call."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        if handler_call_details.method in OPEN_METHODS:
            return await continuation(handler_call_details)
        given = list(_tokens(handler_call_details.invocation_metadata))
        if any(hmac.compare_digest(self._token, each) for each in given):
            return await continuation(handler_call_details)
        return _refusal("another one" if given else "none")


class TokenChannel(grpc.aio.Channel):
    """A channel whose calls carry ``token``; it owns ``channel``.

    It is not an interceptor, because then a write to a call returns before gRPC has taken the
    message, and callers could not tell what was delivered when a connection breaks.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = ((HEADER, f"Bearer {token}"),)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *method: Any, **kind: Any) -> Any:
        return self._carrying(self._channel.unary_unary(*method, **kind))

    def unary_stream(self, *method: Any, **kind: Any) -> Any:
        return self._carrying(self._channel.unary_stream(*method, **kind))

    def stream_unary(self, *method: Any, **kind: Any) -> Any:
        return self._carrying(self._channel.stream_unary(*method, **kind))

    def stream_stream(self, *method: Any, **kind: Any) -> Any:
        return self._carrying(self._channel.stream_stream(*method, **kind))

    def _carrying(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, with the token added to the metadata of its calls."""

        def call(*args: Any, metadata: Iterable[tuple[str, str]] = (), **kwargs: Any) -> Any:
            return method(*args, metadata=(*self._metadata, *(metadata or ())), **kwargs)

        return call


def _tokens(metadata: Iterable[tuple[str, str | bytes]]) -> Iterable[bytes]:
    """The bearer tokens in a call's metadata."""
    for name, value in metadata:
        if name == HEADER:
            text = value if isinstance(value, str) else value.decode("latin-1")
            scheme, _, token = text.partition(" ")
            if scheme.lower() == "bearer":
                yield token.strip().encode("utf-8", "replace")


def _refusal(carried: str) -> Handler:
    """A handler for any method. As a handler of streams it runs when the call begins, without
    waiting for a message."""
    error = Unauthenticated(
        f"this process takes only calls with the token of its --rpc-token-file, and this one has "
        f"{carried}; give the caller the same file",
        code="invalid_rpc_token",
    )

    async def refuse(messages: AsyncIterator[bytes], context: Any) -> None:
        metrics.count_error("any", error)
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
