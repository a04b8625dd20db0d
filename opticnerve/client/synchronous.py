"""Clients for code without an event loop; all of them run their calls on one shared loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from anyio.from_thread import BlockingPortal, BlockingPortalProvider

from opticnerve.client.encoder import AsyncEncoderClient
from opticnerve.client.llm import AsyncLLMClient
from opticnerve.embeddings.store import Store
from opticnerve.models.family import Layout
from opticnerve.rpc.tls import ChannelTls

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", AsyncEncoderClient, AsyncLLMClient)

# One loop and thread for all clients of the process, since gRPC requires one loop. It ends with the
# last client.
_portals = BlockingPortalProvider()


class SynchronousClient(Generic[C]):
    """Runs an asynchronous client. Close it, or use it as a context manager."""

    def __init__(self, make: Callable[[], C]) -> None:
        """``make`` is called on the loop, since gRPC's channels belong to the loop they are made
        on."""
        with contextlib.ExitStack() as stack:
            self._portal = stack.enter_context(_portals)
            self.asynchronous: C = self._portal.call(make)
            stack.callback(lambda: run_on(self._portal, self.asynchronous.close))
            self._closing = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closing twice is fine."""
        self._closing.close()


def run_on(portal: BlockingPortal, call: Callable[[], Awaitable[R]]) -> R:
    """Runs a call to its end on the portal's loop. Interrupting the waiting thread cancels it."""
    future = portal.start_task_soon(call)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def blocking(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[SynchronousClient[C], P], R]:
    """A method of an asynchronous client as a method of the synchronous one."""

    @functools.wraps(method)
    def call(client: SynchronousClient[C], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run_on(client._portal, lambda: method(client.asynchronous, *args, **kwargs))

    return call


def iterating(
    method: Callable[Concatenate[C, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[SynchronousClient[C], P], Generator[R, None, None]]:
    """The same for an asynchronous generator; leaving the iteration early closes it."""

    @functools.wraps(method)
    def iterate(
        client: SynchronousClient[C], /, *args: P.args, **kwargs: P.kwargs
    ) -> Generator[R, None, None]:
        source = method(client.asynchronous, *args, **kwargs)
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield run_on(client._portal, source.__anext__)
        finally:
            run_on(client._portal, source.aclose)

    return iterate


class EncoderClient(SynchronousClient[AsyncEncoderClient]):
    """See ``AsyncEncoderClient``."""

    def __init__(
        self,
        address: str,
        model: str | Path | Layout | None = None,
        *,
        timeout_s: float = 120.0,
        rpc_token_file: str | Path | None = None,
        tls: ChannelTls | None = None,
    ) -> None:
        super().__init__(
            lambda: AsyncEncoderClient(
                address, model, timeout_s=timeout_s, rpc_token_file=rpc_token_file, tls=tls
            )
        )

    describe = blocking(AsyncEncoderClient.describe)
    layout = blocking(AsyncEncoderClient.layout)
    encode = blocking(AsyncEncoderClient.encode)
    fetch = blocking(AsyncEncoderClient.fetch)


class LLMClient(SynchronousClient[AsyncLLMClient]):
    """See ``AsyncLLMClient``. The caller closes ``encoder`` and ``store``."""

    def __init__(
        self,
        address: str,
        *,
        encoder: EncoderClient | None = None,
        store: Store | None = None,
        timeout_s: float = 600.0,
        rpc_token_file: str | Path | None = None,
        tls: ChannelTls | None = None,
    ) -> None:
        super().__init__(
            lambda: AsyncLLMClient(
                address,
                encoder=encoder.asynchronous if encoder else None,
                store=store,
                timeout_s=timeout_s,
                rpc_token_file=rpc_token_file,
                tls=tls,
            )
        )

    describe = blocking(AsyncLLMClient.describe)
    generate = blocking(AsyncLLMClient.generate)
    stream = iterating(AsyncLLMClient.stream)
