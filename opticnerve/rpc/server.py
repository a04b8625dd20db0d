"""A gRPC server's life: start, load, serve, drain, close. The same for encoders and LLM workers.

With ``--rpc-token-file``, every call except health checks must carry the token. With
``--tls-certificate`` the port speaks only TLS, also for health and reflection. Health
(``grpc.health.v1``) is NOT_SERVING until ``ready()`` and again while draining. SIGTERM and SIGINT
drain: health goes NOT_SERVING, new calls are refused, running calls get ``drain_timeout_s`` and
then end with Unavailable; a second signal ends them now (``opticnerve.process``). Before
``ready()`` there is nothing to drain: what was opened is closed, and the process ends. A worker
with a registry (``opticnerve.registry``) is listed there from its start until it is drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

import opticnerve
from opticnerve import addresses
from opticnerve.certificates import PemFiles
from opticnerve.config import EncoderConfig, LLMConfig, RpcConfig
from opticnerve.errors import ConfigError
from opticnerve.process import LAST_WORDS_S, Running, handle_signals
from opticnerve.registry.entry import State, WorkerEntry
from opticnerve.registry.membership import joined
from opticnerve.registry.redis_registry import Registry
from opticnerve.rpc.calls import Calls, WorkerServicer
from opticnerve.rpc.convert import numbers_of
from opticnerve.rpc.tls import server_credentials
from opticnerve.rpc.token import TokenGuard, load_token
from opticnerve.telemetry import metrics, traces

S = TypeVar("S", bound=WorkerServicer[Any])

log = logging.getLogger(__name__)

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", 8 * 2**20),
    ("grpc.max_send_message_length", 8 * 2**20),
    ("grpc.so_reuseport", 0),  # A port that is taken is an error, not a silent share.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]

# The longest that a failed start waits for health checks under way: cancelling a call before its
# handler has begun leaves a traceback in gRPC's log.
CLOSE_GRACE_S = 0.5


class Server:
    """One service on one port; ``serving`` takes it to SERVING.

    ``async with Server(config, "opticnerve.v1.LLM") as server:`` add the servicer to
    ``server.grpc``, then ``await server.start()``, load, ``await server.ready()`` and
    ``await server.serve()``, which returns after the drain. Calls that may take long work inside
    ``server.running.work()``.
    """

    def __init__(self, config: RpcConfig, service: str) -> None:
        """Raises ConfigError for a token or certificates that cannot be read."""
        self.config = config
        self.service = service
        token = load_token(config.rpc_token_file)
        guards = () if token is None else (TokenGuard(token),)  # First: refusals write no line.
        self._tls = _tls_files(config)
        self._calls = Calls()
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[*guards, self._calls])
        self.instance_id = secrets.token_hex(16)  # Unique to this process.
        self.port = 0
        self.status = 0  # The process's exit status.
        self.state: State = "starting"
        self.on_state: Callable[[], object] = lambda: None  # Called when ``state`` has changed.
        self.running = Running("the worker", log, config.drain_timeout_s)
        self.running.on_cut = self._end_calls
        self._health = health_aio.HealthServicer()
        self._signals = contextlib.ExitStack()
        self._starting: asyncio.Task[Any] | None = None  # A signal before ``ready`` cancels it.
        self._abandoned = False
        self._cutting: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port at which other services reach this one."""
        if self.config.advertise:
            return self.config.advertise
        host = self.config.host
        return addresses.host_port("127.0.0.1" if addresses.is_wildcard(host) else host, self.port)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._signals.close()
        await self.grpc.stop(grace=CLOSE_GRACE_S)
        if self._abandoned:
            _exit()  # A thread may still load weights, and cannot be interrupted.

    async def start(self) -> None:
        """Binds and listens, NOT_SERVING. Raises ConfigError if the address cannot be bound."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        if self.config.reflection:
            names = (self.service, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self.grpc)
        await self._set_health(serving=False)
        addresses.check_free(self.config.host, self.config.port)  # gRPC would give no reason.
        try:
            where = addresses.host_port(self.config.host, self.config.port)
            if self._tls is None:
                self.port = self.grpc.add_insecure_port(where)
            else:
                self.port = self.grpc.add_secure_port(where, server_credentials(self._tls))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {where}: see --host, --port") from error
        self._calls.worker = self.address
        await self.grpc.start()
        self._starting = asyncio.current_task()
        self._signals.enter_context(handle_signals(self._on_signal, self._on_second))
        print(f"listening {self.address}", flush=True)  # `opticnerve up` reads this line.
        self._warn_of_exposure()

    def _warn_of_exposure(self) -> None:
        host = self.config.host
        local = addresses.is_loopback(host)
        if not local and not self.config.knows_callers:
            log.warning(
                "listening on %s without --rpc-token-file or --tls-client-ca: whoever reaches the "
                "port may use this worker (--insecure)",
                host,
            )
        if not local and self._tls is None:
            log.warning(
                "listening on %s without --tls-certificate: whoever can read the network sees "
                "prompts, pictures, answers and the token",
                host,
            )
        if addresses.is_wildcard(host) and not self.config.advertise:
            log.warning(
                "listening on every interface, but advertised as %s, which only this machine can "
                "reach; for callers on other machines set --advertise HOST:PORT, such as %s",
                self.address,
                addresses.host_port(socket.gethostname(), self.port),
            )

    async def ready(self) -> None:
        """To be called once weights are loaded and warm. Health becomes SERVING, and from now on a
        signal drains."""
        self._starting = None
        if not self.running.draining:
            self._set_state("serving")
            await self._set_health(serving=True)
        log.info("ready at %s", self.address)

    async def give_up(self) -> None:
        """To be called when the service cannot work any more, such as when its device is lost.
        Health becomes NOT_SERVING, and the process exits with status 1, upon which a supervisor
        restarts it."""
        self.status = 1
        await self._set_health(serving=False)
        self.running.stop()

    async def serve(self) -> int:
        """Serves until a signal, or ``running.stop()``; returns the exit status when drained."""
        await self.running.closed.wait()
        self._set_state("draining")
        await self._set_health(serving=False)
        await self.grpc.stop(grace=self.config.drain_timeout_s + LAST_WORDS_S)
        self.running.drained()
        return self.status

    def _set_state(self, state: State) -> None:
        self.state = state
        self.on_state()

    def _end_calls(self) -> None:
        self._cutting = asyncio.create_task(self.grpc.stop(grace=LAST_WORDS_S))

    def _on_signal(self) -> None:
        if self._starting is None:
            self.running.stop()
            return
        log.info("stopping before it was ready")
        self._abandoned = True
        self._starting.cancel()
        asyncio.get_running_loop().call_later(LAST_WORDS_S, _exit)

    def _on_second(self) -> None:
        if self._abandoned:
            _exit()
        self.running.cut()

    async def _set_health(self, *, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", self.service, self.instance_id):
            await self._health.set(name, status)


@contextlib.asynccontextmanager
async def serving(
    settings: EncoderConfig | LLMConfig,
    service: str,
    register: Callable[[Server], S],
    load: Callable[[S, contextlib.AsyncExitStack], Awaitable[None]],
) -> AsyncIterator[S]:
    """The servicer of a worker that is loaded and SERVING; everything is closed at the end.

    ``register`` adds the servicer to the server; it answers calls already while ``load`` runs.
    ``load`` sets the servicer's ``loaded``, and enters what has to be closed on the stack. Raises
    StartupError.
    """
    registry = _registry(settings)
    async with Server(settings.rpc, service) as server, contextlib.AsyncExitStack() as stack:
        servicer = register(server)
        await server.start()
        metrics.export(settings.telemetry, settings.rpc.host)
        endpoint, name = settings.telemetry.otlp_endpoint, service.rpartition(".")[2].lower()
        stack.enter_context(traces.exported(name, endpoint, server.instance_id))
        if registry is not None:
            describe = partial(_entry, servicer)
            server.on_state = await stack.enter_async_context(joined(registry, describe))
        await load(servicer, stack)
        await server.ready()
        yield servicer


def _registry(settings: EncoderConfig | LLMConfig) -> Registry | None:
    """The registry that the worker joins, if there is one. Raises ConfigError."""
    url = settings.store.registry_of_worker(settings.rpc)
    return None if url is None else Registry(url, load_token(settings.rpc.rpc_token_file))


def _entry(servicer: WorkerServicer[Any]) -> WorkerEntry:
    """The worker's present entry in the registry."""
    server = servicer.server
    entry = WorkerEntry(
        instance_id=server.instance_id,
        kind=servicer.kind,
        address=server.address,
        state=server.state,
        version=opticnerve.__version__,
    )
    if servicer.loaded is None:
        return entry
    answer = servicer.describe()
    load = numbers_of(answer.load)
    load.pop("draining")
    described = {"pair_id": answer.pair_id, "fingerprint": answer.fingerprint}
    return entry.model_copy(
        update={**described, "capacity": numbers_of(answer.limits), "load": load}
    )


def _tls_files(config: RpcConfig) -> PemFiles | None:
    """The files of the worker's own certificate and its callers' authorities; None without TLS.
    Raises ConfigError."""
    own = config.certificate
    if own.tls_certificate is None:
        return None
    return PemFiles(own.tls_certificate, own.tls_key, config.tls_client_ca)


def _exit() -> NoReturn:
    """Ends the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
