"""The life of an encoder's or LLM worker's process: start, load, serve, drain, close.

A service registers its servicer and loads what the calls need; the rest is the same for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import ClassVar, Generic, TypeVar

from opticnerve.config import EncoderConfig, LLMConfig, StoreConfig
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.seal import Seal
from opticnerve.embeddings.store import Store
from opticnerve.errors import StartupError, StoreError, Unavailable
from opticnerve.rpc.server import Server
from opticnerve.telemetry import metrics

L = TypeVar("L")  # What a worker loads.
S = TypeVar("S")  # Its servicer.

OpenStore = Callable[[StoreConfig, Seal | None, AsyncExitStack], Store]


class WorkerServicer(Generic[L]):
    """The calls of a worker, which raise Unavailable until ``loaded`` is set."""

    worker: ClassVar[str]  # In error messages: "the encoder".

    def __init__(self, server: Server) -> None:
        self.server = server
        self.loaded: L | None = None

    def require_loaded(self) -> L:
        if self.loaded is None:
            raise Unavailable(f"{self.worker} is loading its checkpoint", retry_after_s=1.0)
        return self.loaded


@contextlib.asynccontextmanager
async def serving(
    settings: EncoderConfig | LLMConfig,
    service: str,
    register: Callable[[Server], S],
    load: Callable[[S, AsyncExitStack], Awaitable[None]],
) -> AsyncIterator[S]:
    """The servicer of a worker that is loaded and SERVING; everything is closed at the end.

    ``register`` adds the servicer to the server, whose calls it answers while ``load`` runs.
    ``load`` gives ``loaded`` to the servicer, and what has to be closed to the stack. Raises
    StartupError.
    """
    async with Server(settings.rpc, service) as server, AsyncExitStack() as stack:
        servicer = register(server)
        await server.start()
        metrics.export(settings.telemetry, settings.rpc.host)
        await load(servicer, stack)
        await server.ready()
        yield servicer


def open_worker_store(config: StoreConfig, seal: Seal | None, stack: AsyncExitStack) -> Store:
    """The store of a worker, with its size among the metrics; ``stack`` closes it. Raises
    StartupError."""
    try:
        store = open_store(config.read_url(), ttl_s=config.store_ttl_s, seal=seal)
    except StoreError as error:
        raise StartupError(error.message) from error
    stack.callback(store.close)
    stack.enter_context(metrics.collected(lambda: metrics.store_size(store)))
    return store
