"""The gateway process: start, serve, drain, close."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn

from gateway.api.models import ServedNames
from gateway.app import Gateway, make_app
from gateway.edge.admission import Admission
from gateway.edge.auth import Keys
from gateway.edge.connections import Connections, allow_files
from gateway.edge.http1 import Connection
from gateway.edge.limits import IDLE_TIMEOUT_S, MAX_EVENT_BYTES, PING_S
from gateway.edge.listener import Listener, address_of, listen
from gateway.edge.rates import KeyRates, SharedPlaces
from gateway.edge.tls import Handshake, Https
from gateway.edge.websocket import WebSocketConnection
from gateway.grammar import Grammars
from gateway.media.fetch import MediaFetcher
from gateway.media.reader import MediaReader
from gateway.output.answer_forms import AnswerForms
from gateway.output.detokenizer import Vocabulary
from gateway.pipeline import Pipeline
from gateway.processes import PLACES, RATES
from gateway.prompt.request_templates import RequestTemplates
from gateway.startup_check import read_checkpoint
from gateway.workers.discovery import RegisteredWorkers
from gateway.workers.encode import Encoders, describe_encoder
from gateway.workers.encoder_check import ReachabilityCheck
from gateway.workers.generate import describe_llm
from gateway.workers.load import export_load
from gateway.workers.pairing import Pairing
from gateway.workers.pool import Changes, WorkerPool
from opticnerve import addresses
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import GatewayConfig
from opticnerve.errors import CheckpointError
from opticnerve.local.child import READY
from opticnerve.models.registry import make_layout
from opticnerve.process import (
    LAST_WORDS_S,
    Running,
    announce,
    follow_parent,
    handle_signals,
    on_hangup,
    use_one_arena,
)
from opticnerve.registry.entry import Kind
from opticnerve.registry.redis_registry import Registry
from opticnerve.rpc.tls import ChannelTls
from opticnerve.rpc.token import load_token
from opticnerve.telemetry import traces
from opticnerve.telemetry.metrics import export as export_metrics

log = logging.getLogger(__name__)

REGISTERED_WORKERS = 1024  # Open files are reserved for this many workers of a registry.
ACCEPTS_A_TURN = 16  # Connections taken in one turn of the event loop.


def run(settings: GatewayConfig) -> None:
    """Serves until it is stopped. Raises StartupError."""
    allow_files(settings.max_connections, _count_workers(settings))
    quiet_uvicorn()
    use_one_arena()
    follow_parent(settings.parent_pid)
    asyncio.run(serve(settings))


def quiet_uvicorn() -> None:
    """Silences uvicorn's log: it reports clients' faults, and each request has its own line."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not str(record.msg).startswith(("Exception in ASGI", "ASGI callable"))
    )


def _count_workers(settings: GatewayConfig) -> int:
    """The number of workers to reserve open files for: the named ones, and some of the registry."""
    registered = 0 if settings.store.read_registry() is None else REGISTERED_WORKERS
    return len(settings.encoder_addresses) + len(settings.llm_addresses) + registered


async def serve(settings: GatewayConfig) -> None:
    """Serves until a signal stops the gateway and it has drained. SIGHUP reloads the API keys.
    Raises StartupError."""
    keys = Keys.load(settings.api_key_file)
    if settings.shared_directory is not None:
        shared = Path(settings.shared_directory)
        keys.rates, keys.places = KeyRates(shared / RATES), SharedPlaces(shared / PLACES)
    with on_hangup(keys.reread):
        async with open_server(settings, keys) as server:
            with handle_signals(server.running.stop, server.running.cut):
                await server.serve()


@contextlib.asynccontextmanager
async def open_server(settings: GatewayConfig, keys: Keys) -> AsyncIterator[HttpServer]:
    """A gateway on a bound socket, ready to ``serve``; closed on exit. Raises StartupError."""
    https = Https.of(settings.https)
    with listen(settings, keys) as listener:
        async with open_gateway(settings, keys) as gateway:
            yield HttpServer(gateway, listener, https)


@contextlib.asynccontextmanager
async def open_gateway(settings: GatewayConfig, keys: Keys) -> AsyncIterator[Gateway]:
    """The gateway with its pools and pipeline; closed on exit. Raises StartupError."""
    # The parent of several processes has warned.
    token = load_token(settings.rpc_token_file, warns=settings.listen_fd is None)
    tls = ChannelTls.of(settings.calls, settings.certificate)
    checkpoint = Checkpoint.configured(settings.model)
    layout = make_layout(checkpoint)
    renderer, defaults = read_checkpoint(settings, checkpoint, layout)
    if settings.listen_fd is None:  # Otherwise the parent exports them.
        export_metrics(settings.telemetry, settings.listen_host)
    async with contextlib.AsyncExitStack() as stack:
        endpoint = settings.telemetry.otlp_endpoint
        stack.enter_context(traces.exported("gateway", endpoint, secrets.token_hex(16)))
        encoders, llms = await _open_pools(settings, token, tls, stack)
        pairing = Pairing(encoders.pool, llms, _own_pair_id(checkpoint), settings.worker_wait_s)
        stack.callback(asyncio.create_task(pairing.watch_until_ready()).cancel)
        names = ServedNames.of(settings.served_model_name, checkpoint.name, layout.max_positions)
        templates = RequestTemplates(renderer) if settings.allow_request_template else None
        if templates is not None:
            stack.callback(templates.close)
        forms = AnswerForms.find(
            renderer.tokenizer, renderer.template, settings.tool_parser, settings.reasoning_parser
        )
        pipeline = Pipeline(
            renderer=renderer,
            forms=forms,
            grammars=Grammars(forms),
            vocabulary=Vocabulary(renderer.tokenizer),
            media=MediaReader(settings, layout, MediaFetcher(settings)),
            pairing=pairing,
            encoders=encoders,
            llms=llms,
            defaults=defaults,
            request_templates=templates,
            max_logprobs=settings.max_logprobs,
            max_n=settings.max_n,
            worker_wait_s=settings.worker_wait_s,
            share_cache=settings.share_cache,
        )
        yield _gateway(settings, keys, names, pipeline)


async def _open_pools(
    settings: GatewayConfig,
    token: str | None,
    tls: ChannelTls | None,
    stack: contextlib.AsyncExitStack,
) -> tuple[Encoders, WorkerPool]:
    """The encoders, and the pool of LLM workers; both are watched until ``stack`` is closed."""
    registry = _open_registry(settings, token, tls, stack)
    encoders, llms = _workers(settings, token, tls, registry)
    for pool in (encoders.pool, llms):
        await pool.start()
        stack.push_async_callback(pool.close)
    stack.callback(asyncio.create_task(export_load(encoders.pool, llms)).cancel)
    return encoders, llms


def _open_registry(
    settings: GatewayConfig,
    token: str | None,
    tls: ChannelTls | None,
    stack: contextlib.AsyncExitStack,
) -> Registry | None:
    """The registry that workers register in, or None if there is none; ``stack`` closes it. Raises
    ConfigError."""
    url = settings.store.read_registry()
    if url is None:
        return None
    if token is None and tls is None and addresses.is_elsewhere(url):
        log.warning(
            "anyone who can write to the Redis of --registry can have requests sent to an address "
            "of their own: give gateways and workers the same --rpc-token-file, which signs "
            "entries, or certificates (--tls-ca)"
        )
    registry = Registry(url, token)
    stack.push_async_callback(registry.close)
    return registry


def _workers(
    settings: GatewayConfig, token: str | None, tls: ChannelTls | None, registry: Registry | None
) -> tuple[Encoders, WorkerPool]:
    """The encoders, and the pool of LLM workers."""
    changes = Changes()

    def registered(kind: Kind) -> RegisteredWorkers | None:
        return None if registry is None else RegisteredWorkers(registry, kind)

    llms = WorkerPool(
        "LLM",
        settings.llm_addresses,
        describe_llm,
        changes,
        token,
        tls=tls,
        registered=registered("llm"),
    )
    pool = WorkerPool(
        "encoder",
        settings.encoder_addresses,
        describe_encoder,
        changes,
        token,
        ReachabilityCheck(llms, tls),
        tls,
        registered=registered("encoder"),
    )
    encoders = Encoders(
        pool, settings.encode_timeout_s, settings.worker_wait_s, settings.max_encode_wait_s
    )
    return encoders, llms


def _gateway(
    settings: GatewayConfig, keys: Keys, names: ServedNames, pipeline: Pipeline
) -> Gateway:
    """The gateway with its limits on connections, requests and bytes."""
    connections = Connections(
        settings.max_connections, settings.max_connections_per_address, settings.stall_timeout_s
    )
    admission = Admission(
        settings.max_concurrent_requests,
        settings.max_bytes_in_flight,
        settings.max_requests_per_key,
        holders=lambda: len(keys.callers) or connections.holders,
        max_sessions=min(settings.max_realtime_sessions, settings.max_connections // 2),
        rates=keys.rates,
        places=keys.places,
    )
    running = Running("the gateway", log, settings.drain_timeout_s, settings.shutdown_delay_s)
    return Gateway(settings, keys, connections, admission, names, pipeline, running)


def _own_pair_id(checkpoint: Checkpoint) -> asyncio.Future[str | None]:
    """The checkpoint's pair id, or None if its weights are not here. Computed in a daemon thread:
    reading all weights may take minutes, and must not delay the process's exit."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[str | None] = loop.create_future()

    def read() -> None:
        own: str | None = None
        try:
            own = checkpoint.pair_id
        except CheckpointError:
            log.info("no weights here: workers are paired with each other, not with this gateway")
        with contextlib.suppress(RuntimeError):  # The event loop has been closed.
            loop.call_soon_threadsafe(found.set_result, own)

    threading.Thread(target=read, name="pair-id", daemon=True).start()
    return found


class HttpServer(uvicorn.Server):
    """uvicorn on ``listener``, stopped by ``running`` instead of its own signal handlers."""

    def __init__(self, gateway: Gateway, listener: Listener, https: Https | None = None) -> None:
        settings = gateway.config
        first = partial(Handshake, https=https) if https else Connection
        super().__init__(
            uvicorn.Config(
                make_app(gateway),
                http=cast("type[asyncio.Protocol]", partial(first, gateway.connections)),
                ws=WebSocketConnection,
                ws_max_size=MAX_EVENT_BYTES,
                ws_ping_interval=PING_S,
                ws_ping_timeout=PING_S,
                ws_per_message_deflate=False,  # A small message could expand to a large one.
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # One at a time where other processes accept from the same socket.
                backlog=ACCEPTS_A_TURN if settings.listen_fd is None else 1,
                timeout_keep_alive=math.ceil(IDLE_TIMEOUT_S),
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s + 2 * LAST_WORDS_S),
            )
        )
        self.gateway = gateway
        self.address = address_of(listener, settings.https.scheme)
        self.running = gateway.running
        self.running.on_cut = self._cut_off_clients
        self._listener = listener
        self._said_ready = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until ``running`` is stopped; returns when drained."""
        await super().serve([self._listener])
        self.running.drained()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        announce(f"listening {self.address}")  # `opticnerve up` reads this and READY.

    async def on_tick(self, counter: int) -> bool:
        if self.gateway.pipeline.pairing.has_been_ready and not self._said_ready:
            self._said_ready = True
            announce(READY)
        return await super().on_tick(counter) or self.running.closed.is_set()

    def _cut_off_clients(self) -> None:
        """Aborts the connections of clients that do not read the error that ends their request."""
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._abort_connections)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
