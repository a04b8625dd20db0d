"""The LLM process: start, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import SimpleNamespace
from typing import cast

from llm_service import metrics
from llm_service.device.attention import make_backend
from llm_service.engine import build
from llm_service.engine.client import EngineClient, ProcessEngineClient, ThreadEngineClient
from llm_service.policy.sequence import FailedEvent, GenerateRequest, SamplingParams
from llm_service.rows.fetcher import Fetcher
from llm_service.rows.store_rows import OVERFLOW_BYTES, Notes, StoreRows, local_tier
from llm_service.wire.messages import Bounds
from llm_service.wire.servicer import SERVICE, Identity, LLMServicer, Loaded
from opticnerve import addresses
from opticnerve.addresses import Hosts
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.fingerprint import language_fingerprint
from opticnerve.checkpoints.loader import resolve_device, resolve_dtype
from opticnerve.config import LLMConfig
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.seal import Seal
from opticnerve.embeddings.store import Store
from opticnerve.errors import ConfigError, EngineFailure, StartupError, StoreError
from opticnerve.models.family import Language, Layout
from opticnerve.models.registry import make_layout
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc.server import Server
from opticnerve.rpc.token import load_token
from opticnerve.tensors.dtypes import dtype_name

log = logging.getLogger(__name__)

WARM_UP_TOKENS = 32


class Service:
    """One LLM process."""

    def __init__(self, settings: LLMConfig) -> None:
        self._settings = settings
        self._status = 0

    async def run(self) -> int:
        """Startup, serve, shutdown; the exit status. 1: the device or the engine was lost."""
        async with Server(self._settings.rpc, SERVICE) as server:
            servicer = LLMServicer(server)
            llm_pb2_grpc.add_LLMServicer_to_server(servicer, server.grpc)
            await server.start()
            async with contextlib.AsyncExitStack() as stack:
                servicer.loaded = await self.load(stack)
                watcher = asyncio.create_task(self._watch(servicer.loaded.engine, server))
                stack.callback(watcher.cancel)
                await server.ready()
                await server.serve()
        return self._status

    async def load(self, stack: contextlib.AsyncExitStack) -> Loaded:
        """All that takes long; ``stack`` closes what it opens. Raises StartupError."""
        settings = self._settings
        shown = settings.telemetry
        if shown.metrics_port >= 0:
            where = shown.metrics_host or settings.rpc.host
            log.info("metrics at %s", metrics.serve(shown.metrics_port, where))
        checkpoint = await asyncio.to_thread(_open_checkpoint, settings)
        checkpoint.read_ahead()
        layout = make_layout(checkpoint)
        seal = Seal.load(settings.store.store_key_file)
        store = await asyncio.to_thread(_open_store, settings, seal)
        stack.callback(store.close)
        overflow = MemoryStore(OVERFLOW_BYTES) if settings.engine == "thread" else None
        notes = Notes()
        fetcher = Fetcher(
            store,
            overflow,
            layout.hidden_size,
            notes,
            levels=layout.deepstack_levels,
            token=load_token(settings.rpc.rpc_token_file),
            encoders=_callable_encoders(settings),
            seal=seal,
        )
        stack.push_async_callback(fetcher.close)
        engine = self._client(store, overflow, notes, stack)
        stack.push_async_callback(engine.close)
        await _start(engine)
        stack.enter_context(metrics.reading(lambda: metrics.of_engine(engine.stats)))
        stack.enter_context(metrics.reading(lambda: metrics.of_store(store)))
        bounds = Bounds(engine.config, layout, settings.max_logprobs)
        identity = await asyncio.to_thread(_identity, settings, checkpoint, layout, store)
        return Loaded(engine, fetcher, notes, bounds, identity, settings.embedding_wait_ms)

    def _client(
        self,
        store: Store,
        overflow: MemoryStore | None,
        notes: Notes,
        stack: contextlib.AsyncExitStack,
    ) -> EngineClient:
        settings = self._settings
        if settings.engine == "process":
            if not store.tier_id:
                raise ConfigError(
                    "--engine process needs a store that processes share: shm:// or redis://",
                    param="store",
                )
            return ProcessEngineClient(
                "llm_service.engine.build:build_in_process", settings, notes.add
            )
        rows = StoreRows(local_tier(store), overflow, notes.add)
        stack.callback(rows.close)
        return ThreadEngineClient(lambda given, emit: build.build(given, rows, emit), settings)

    async def _watch(self, engine: EngineClient, server: Server) -> None:
        """When the engine dies: no more work, and an exit for the supervisor to restart."""
        error = await engine.wait_dead()
        log.critical("the engine is lost; stopping: %s", error.message)
        self._status = 1
        await server.not_ready()
        server.stop()


async def _start(engine: EngineClient) -> None:
    """Builds the engine and runs it once. Raises StartupError."""
    try:
        await engine.start()
    except EngineFailure as error:
        raise StartupError(f"the engine did not start: {error.message}") from error
    length = min(WARM_UP_TOKENS, engine.config.max_tokens - 2)
    request = GenerateRequest(
        "warm-up",
        tuple(index % max(1, engine.config.vocab_size) for index in range(length)),
        sampling=SamplingParams(max_tokens=2),
        skip_prefix_cache=True,
    )
    with engine.submit(request) as stream:
        async for event in stream:
            if isinstance(event, FailedEvent):
                raise StartupError(f"the warm-up failed: {event.error}") from event.error


def _open_checkpoint(settings: LLMConfig) -> Checkpoint:
    model = settings.model
    return Checkpoint.open(model.model, model.revision, model.download_dir, side="llm")


def _callable_encoders(settings: LLMConfig) -> Hosts | None:
    """See --fetch-from. None: those that callers name, who have shown the token."""
    rpc, named = settings.rpc, settings.fetch_from
    if rpc.rpc_token_file is not None and not named:
        return None
    local = addresses.LOOPBACK if addresses.is_loopback(rpc.host) else ()
    if not (local or named):
        log.warning(
            "embeddings come from the store alone, and from no encoder directly: without "
            "--rpc-token-file those have to be named in --fetch-from"
        )
    return Hosts((*local, *named))


def _open_store(settings: LLMConfig, seal: Seal | None) -> Store:
    try:
        return open_store(settings.store.read_url(), ttl_s=settings.store.store_ttl_s, seal=seal)
    except StoreError as error:
        raise StartupError(error.message) from error


def _identity(
    settings: LLMConfig, checkpoint: Checkpoint, layout: Layout, store: Store
) -> Identity:
    device = resolve_device(settings.model.device)
    dtype = resolve_dtype(settings.model.dtype, checkpoint, device)
    return Identity(
        fingerprint=language_fingerprint(checkpoint, cast(Language, SimpleNamespace(dtype=dtype))),
        pair_id=checkpoint.pair_id,
        family=checkpoint.family,
        attention=make_backend(settings.attention).name,
        device=str(device),
        dtype=dtype_name(dtype),
        hidden_size=layout.hidden_size,
        shm_tier_id=store.tier_id,
        eos_token_ids=checkpoint.eos_token_ids,
    )
