"""``opticnerve gateway --workers N``: one port, served by several processes.

A parent binds the port and keeps N gateways running, which inherit the listening socket. Whichever
process accepts a connection first serves it, so a busy process gets fewer; connections that wait to
be accepted survive the end of a process. Each gateway has an equal share of the bounds on
connections, requests and bytes, and its own view of the workers. They share metrics and, for each
API key, the use of its rate and its requests in flight. Any of them can answer any request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from gateway.edge.auth import Keys
from gateway.edge.listener import listen
from gateway.edge.tls import Https
from opticnerve.config import GatewayConfig
from opticnerve.errors import ConfigError
from opticnerve.local.child import READY, Child, Role
from opticnerve.local.keeper import Keeper, run_all
from opticnerve.owned_directories import owned_directory, sweep_dead_tiers
from opticnerve.process import announce, follow_parent, handle_signals, on_hangup
from opticnerve.secret import read_secret
from opticnerve.telemetry.metrics import DIRECTORY, export, sum_of_processes

START_TIMEOUT_S = 600.0  # Time for a process to begin to listen.
MAX_RESTARTS = 5  # After more crashes of one process within a minute, all stop.
CLOSE_S = 5.0  # Time for a process to exit after its drain.
# Names within the directory that the processes share.
METRICS, RATES, PLACES = "metrics", "rates", "places"
DIVIDED = (
    "max_connections",
    "max_connections_per_address",
    "max_concurrent_requests",
    "max_requests_per_key",
    "max_realtime_sessions",
    "max_bytes_in_flight",
)


def share(settings: GatewayConfig) -> GatewayConfig:
    """The settings of one process, with its share of each bound in DIVIDED. A bound of 0 means
    unbounded, and stays 0. Raises ConfigError if a process's share is too small for one request."""
    workers = settings.workers
    values: dict[str, int] = {name: getattr(settings, name) for name in DIVIDED}
    shares: dict[str, Any] = {
        name: max(1, value // workers) if value else 0 for name, value in values.items()
    }
    if shares["max_bytes_in_flight"] < settings.max_request_bytes <= settings.max_bytes_in_flight:
        raise ConfigError(
            f"--workers {workers} leaves each process {shares['max_bytes_in_flight']} bytes of "
            "--max-bytes-in-flight, and one request may have more: raise it to at least "
            f"{workers * settings.max_request_bytes}, or lower --max-request-bytes",
            param="max_bytes_in_flight",
        )
    return dataclasses.replace(settings, **shares)


class GatewayProcesses(Keeper):
    """Owns the processes of one gateway."""

    def __init__(
        self,
        settings: GatewayConfig,
        arguments: Sequence[str],
        listener: socket.socket,
        shared: Path,
    ) -> None:
        """``arguments``: the gateway's command line. ``shared``: the directory of their shared
        counts."""
        command = [
            *(sys.executable, "-m", "gateway", *arguments),
            *("--parent-pid", str(os.getpid()), "--listen-fd", str(listener.fileno())),
            *("--shared-directory", str(shared)),
        ]
        metrics = shared / METRICS
        environment = {**os.environ, DIRECTORY: str(metrics), "PYTHONUNBUFFERED": "1"}
        super().__init__(
            [
                Child(
                    f"gateway-{index}",
                    Role.GATEWAY,
                    command,
                    environment,
                    settings.port,
                    files=[listener.fileno()],
                )
                for index in range(settings.workers)
            ],
            start_timeout_s=START_TIMEOUT_S,
            stop_timeout_s=stop_timeout_s(settings),
            max_restarts=MAX_RESTARTS,
            # Its counters stay; its gauges are removed.
            after_crash=lambda child: mark_process_dead(child.pid, str(metrics)),  # type: ignore[no-untyped-call]
        )

    async def start_and_watch(self) -> None:
        await run_all(self.start(child) for child in self.children)
        announce(f"listening {self.children[0].address}")
        ready = asyncio.create_task(self._say_ready())
        try:
            await run_all(self.watch(child) for child in self.children)
        finally:
            ready.cancel()

    async def _say_ready(self) -> None:
        await asyncio.gather(*(child.ready() for child in self.children))
        announce(READY)

    async def until_started(self, child: Child) -> None:
        await child.listening()


def stop_timeout_s(settings: GatewayConfig) -> float:
    return settings.shutdown_delay_s + settings.drain_timeout_s + CLOSE_S


async def serve(settings: GatewayConfig, arguments: Sequence[str]) -> None:
    """Keeps the processes running until a signal: the first lets running requests finish, a second
    ends them, a third kills the processes. SIGHUP makes each process reload the API keys.
    ``arguments``: the gateway's command line. Raises StartupError if a process cannot start or
    keeps crashing. Settings are checked here first, so that an error is reported once, not by each
    process."""
    share(settings)
    Https.of(settings.https)
    keys = Keys.load(settings.api_key_file)
    if settings.rpc_token_file is not None:
        read_secret(settings.rpc_token_file, "rpc_token_file")  # Warns where each would.
    follow_parent(settings.parent_pid, grace_s=2 * stop_timeout_s(settings))
    temporary = Path(tempfile.gettempdir())
    sweep_dead_tiers(temporary)
    with contextlib.ExitStack() as files:
        listener = files.enter_context(listen(settings, keys))
        shared = files.enter_context(owned_directory(temporary))
        (shared / METRICS).mkdir(mode=0o700)
        export(settings.telemetry, settings.listen_host, sum_of_processes(shared / METRICS))
        keeper = GatewayProcesses(settings, arguments, listener, shared)

        def kill() -> None:
            keeper.kill()
            files.close()

        with handle_signals(keeper.stop, keeper.hurry, kill), on_hangup(keeper.hang_up):
            async with keeper:  # Inside the handlers: signals still count while processes stop.
                try:
                    await keeper.run()
                finally:
                    listener.close()  # So that nobody listens once the processes drain.
