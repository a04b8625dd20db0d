"""The LLM service: loads a checkpoint's language half and serves it over gRPC."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import opticnerve
from llm_service.device.attention import make_backend
from llm_service.engine import build
from llm_service.engine.client import EngineClient, ProcessEngineClient, ThreadEngineClient
from llm_service.metrics import engine_stats
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import FailedEvent, GenerateRequest
from llm_service.rows.fetcher import Fetcher
from llm_service.rows.store_rows import OVERFLOW_BYTES, StoreRows
from llm_service.wire.servicer import SERVICE, LLMServicer, Loaded
from opticnerve import addresses
from opticnerve.addresses import Hosts
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.fingerprint import language_fingerprint
from opticnerve.checkpoints.loader import resolve_device, resolve_dtype
from opticnerve.config import LLMConfig
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import local_tier, open_worker_store
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import Store
from opticnerve.errors import ConfigError, EngineFailure, StartupError
from opticnerve.generation.values import Sampling
from opticnerve.models.family import Layout
from opticnerve.models.registry import make_layout
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc.server import Server, serving
from opticnerve.rpc.tls import ChannelTls
from opticnerve.rpc.token import load_token
from opticnerve.telemetry.metrics import collected
from opticnerve.tensors.dtypes import dtype_name

log = logging.getLogger(__name__)

WARM_UP_TOKENS = 32


def open_worker(settings: LLMConfig) -> AbstractAsyncContextManager[LLMServicer]:
    """A serving LLM worker, closed when the context ends. Raises StartupError."""

    async def load(servicer: LLMServicer, stack: AsyncExitStack) -> None:
        checkpoint = await asyncio.to_thread(Checkpoint.configured, settings.model, "llm")
        checkpoint.read_ahead()
        layout = make_layout(checkpoint)
        seal = Seal.load(settings.store.store_key_file)
        store = await asyncio.to_thread(open_worker_store, settings.store, seal, stack)
        overflow = MemoryStore(OVERFLOW_BYTES) if settings.engine == "thread" else None
        rows = StoreRows(local_tier(store), overflow)
        stack.callback(rows.close)
        fetcher = Fetcher(
            store,
            rows,
            layout.hidden_size,
            levels=layout.deepstack_levels,
            token=load_token(settings.rpc.rpc_token_file),
            tls=ChannelTls.of(settings.calls, settings.rpc.certificate),
            encoders=_callable_encoders(settings),
            seal=seal,
        )
        stack.push_async_callback(fetcher.close)
        engine = _open_engine(settings, store, rows)
        stack.push_async_callback(engine.close)
        await _start(engine)
        stack.enter_context(collected(lambda: engine_stats(engine.stats)))
        servicer.loaded = Loaded(
            engine,
            fetcher,
            layout,
            settings.max_logprobs,
            await asyncio.to_thread(
                _describe, settings, checkpoint, layout, engine.config, store.tier_id
            ),
            settings.embedding_wait_ms,
        )
        watcher = asyncio.create_task(_watch(engine, servicer.server))
        stack.callback(watcher.cancel)

    return serving(settings, SERVICE, _register, load)


def _register(server: Server) -> LLMServicer:
    servicer = LLMServicer(server)
    llm_pb2_grpc.add_LLMServicer_to_server(servicer, server.grpc)
    return servicer


def _open_engine(settings: LLMConfig, store: Store, rows: StoreRows) -> EngineClient:
    """The engine, in a thread or a process, not started."""
    if settings.engine == "process":
        if not store.tier_id:
            raise ConfigError(
                "--engine process needs a store that processes share: shm:// or redis://",
                param="store",
            )
        return ProcessEngineClient(
            "llm_service.engine.build:build_in_process", settings, rows.note_damaged
        )
    return ThreadEngineClient(lambda given, emit: build.build(given, rows, emit), settings)


async def _watch(engine: EngineClient, server: Server) -> None:
    """Stops the worker when its engine dies."""
    error = await engine.wait_dead()
    log.critical("the engine is lost; stopping: %s", error.message)
    await server.give_up()


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
        sampling=Sampling(max_tokens=2),
        skip_prefix_cache=True,
    )
    with engine.submit(request) as stream:
        async for event in stream:
            if isinstance(event, FailedEvent):
                raise StartupError(f"the warm-up failed: {event.error}") from event.error


def _callable_encoders(settings: LLMConfig) -> Hosts | None:
    """The hosts of --fetch-from and loopback. None: any host, since callers are known."""
    rpc, named = settings.rpc, settings.fetch_from
    if rpc.knows_callers and not named:
        return None
    local = addresses.LOOPBACK if addresses.is_loopback(rpc.host) else ()
    if not (local or named):
        log.warning(
            "embeddings are read from the store only, not fetched from encoders: set "
            "--rpc-token-file or --tls-client-ca, or list the encoders in --fetch-from"
        )
    return Hosts((*local, *named))


def _describe(
    settings: LLMConfig,
    checkpoint: Checkpoint,
    layout: Layout,
    engine: EngineConfig,
    shm_tier_id: str,
) -> pb.DescribeLLMResponse:
    """The part of Describe's answer that does not change."""
    device = resolve_device(settings.model.device)
    dtype = resolve_dtype(settings.model.dtype, checkpoint, device)
    return pb.DescribeLLMResponse(
        fingerprint=language_fingerprint(checkpoint, dtype),
        pair_id=checkpoint.pair_id,
        family=checkpoint.family,
        attention=make_backend(settings.attention).name,
        device=str(device),
        dtype=dtype_name(dtype),
        hidden_size=layout.hidden_size,
        shm_tier_id=shm_tier_id,
        eos_token_ids=checkpoint.eos_token_ids,
        vocab_size=engine.vocab_size,
        version=opticnerve.__version__,
        limits=pb.LLMLimits(
            max_model_len=engine.max_tokens,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_logprobs=settings.max_logprobs,
            num_kv_blocks=engine.num_blocks,
            block_size=engine.block_size,
            max_waiting=engine.max_waiting,
            prefix_cache_tokens=engine.prefix_cache_tokens,
        ),
    )
