"""``opticnerve up``: passes its flags on to the services and runs the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opticnerve import addresses
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import (
    EncoderConfig,
    GatewayConfig,
    LLMConfig,
    ModelConfig,
    StoreConfig,
    UpConfig,
)
from opticnerve.config.command_line import (
    check_environment,
    service_parser,
    start_logs,
    warn_of_passwords,
)
from opticnerve.config.options import PREFIX, build, options, to_command_line, without_service_links
from opticnerve.config.shared import NO_REGISTRY
from opticnerve.config.up import up_options
from opticnerve.extras import require_extra
from opticnerve.local.child import Child, Role
from opticnerve.local.supervisor import Supervisor
from opticnerve.owned_directories import (
    base_directory,
    owned_directory,
    sweep_dead_tiers,
)
from opticnerve.process import follow_parent, handle_signals, ignore_hangup, on_hangup
from opticnerve.rpc.tls import ChannelTls
from opticnerve.secret import make_secret, read_secret

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Starts encoders, LLM workers and the gateway on this machine; every other flag is handed to "
    "the services that know it. --host, --port and --metrics-port are the gateway's; workers "
    "listen on loopback, and have metrics at --metrics-host and ports that they print."
)
CLOSE_S = 5.0  # Time for a child to exit after its drain.
# Given to `up`, these go to the gateway alone: workers listen on loopback, at free ports.
GATEWAY_ONLY = ("host", "port", "advertise", "metrics_port")


def main(argv: Sequence[str]) -> int:
    ignore_hangup()
    known = up_options()
    given = vars(service_parser("up", DESCRIPTION, known).parse_args(argv))
    check_environment()
    start_logs(build(GatewayConfig, given).telemetry)
    warn_of_passwords(known, given)
    return asyncio.run(run(given))


async def run(given: dict[str, Any]) -> int:
    """Runs the stack until a signal, or until its own parent ends; returns status 0. SIGHUP is
    passed on to the gateway. Raises StartupError if a child cannot start, or keeps crashing."""
    settings, gateway = build(UpConfig, given), build(GatewayConfig, given)
    store = build(StoreConfig, given)
    tls = ChannelTls.of(gateway.calls, gateway.certificate)
    stop_timeout_s = gateway.shutdown_delay_s + gateway.drain_timeout_s + CLOSE_S
    follow_parent(gateway.parent_pid, grace_s=len(Role) * stop_timeout_s)
    check_early(gateway, settings.encoders + settings.llms)
    temporary = Path(tempfile.gettempdir())  # Not /dev/shm, which embeddings may fill.
    for base in (base_directory(), temporary):
        sweep_dead_tiers(base)
    with contextlib.ExitStack() as files:
        url = files.enter_context(_store_url(store))
        secrets = _secret_files(gateway, store, files.enter_context(owned_directory(temporary)))
        commands = Commands(settings, {**given, **secrets, "store": url, "parent_pid": os.getpid()})
        supervisor = Supervisor(
            commands.workers(),
            commands.gateway,
            start_timeout_s=settings.start_timeout_s,
            stop_timeout_s=stop_timeout_s,
            max_restarts=settings.max_restarts,
            tls=tls,
        )
        await _supervise(supervisor, gateway, files)
    return 0


async def _supervise(
    supervisor: Supervisor, gateway: GatewayConfig, files: contextlib.ExitStack
) -> None:
    """Runs the children until a signal: the first lets running work finish, the second ends
    it, the third kills them and removes ``files``."""

    def stop() -> None:
        supervisor.stop()
        log.info(_stop_message(gateway, ready=bool(supervisor.url)))

    def cut() -> None:
        supervisor.hurry()
        log.info("ending what still runs")

    def kill() -> None:
        supervisor.kill()
        files.close()

    with handle_signals(stop, cut, kill), on_hangup(supervisor.hang_up):
        async with supervisor:  # Inside the handlers: signals still count while children stop.
            await supervisor.run()


def _stop_message(gateway: GatewayConfig, *, ready: bool) -> str:
    if not ready:
        return "stopping before it was ready"
    delay = gateway.shutdown_delay_s
    taken = f"requests are taken for {delay:g} s more (--shutdown-delay-s), then " if delay else ""
    return (
        f"stopping: {taken}requests that run get up to {gateway.drain_timeout_s:g} s to end "
        "(--drain-timeout-s); Ctrl-C again ends them now"
    )


def check_early(gateway: GatewayConfig, workers: int) -> None:
    """Checks the configuration before any process starts. Otherwise errors would appear only after
    a worker has loaded torch, or in the gateway, which starts last. Raises StartupError."""
    require_extra("worker", "up")
    host, metrics = gateway.listen_host, gateway.telemetry
    addresses.check_free(host, gateway.port)
    if metrics.metrics_host or metrics.metrics_port >= 0:  # True for workers in any case.
        port = max(0, metrics.metrics_port)
        addresses.check_free(metrics.metrics_host or host, port, "--metrics-port")
    checkpoint = Checkpoint.configured(gateway.model)
    checkpoint.check()
    importlib.import_module("gateway.startup_check").check(gateway, checkpoint, workers)


@contextlib.contextmanager
def _store_url(settings: StoreConfig) -> Iterator[str]:
    """The value of ``--store`` for the workers. ``shm://`` without a directory gets a new one,
    which is removed at the end. Raises StartupError."""
    scheme, _, rest = settings.read_url().partition("://")
    directory, _, query = rest.partition("?")
    if scheme != "shm" or directory:
        yield settings.store
        return
    with owned_directory(base_directory()) as tier:
        yield f"shm://{tier}" + (f"?{query}" if query else "")


def _secret_files(gateway: GatewayConfig, store: StoreConfig, directory: Path) -> dict[str, str]:
    """The files of secrets, by option: the user's file, after checking that it can be read, or a
    new one in ``directory``. Raises StartupError."""
    named = {"rpc_token_file": gateway.rpc_token_file, "store_key_file": store.store_key_file}
    for option, path in named.items():
        if path is not None:
            read_secret(path, option)
    if store.store_key_file is None and not store.read_url().startswith(("shm:", "memory:")):
        log.info(
            "embeddings in Redis are signed under a secret that ends with this stack: to find them "
            "there again, or to share them, give stacks the same --store-key-file"
        )
    return {option: path or str(make_secret(directory, option)) for option, path in named.items()}


class Commands:
    """Makes the children: the command line and the environment of each."""

    def __init__(self, settings: UpConfig, given: Mapping[str, Any]) -> None:
        self._settings = settings
        self._given = given
        self._threads = build(ModelConfig, given).threads

    def workers(self) -> list[Child]:
        settings = self._settings
        return [
            *self._pool(Role.ENCODER, EncoderConfig, settings.encoders, settings.encoder_devices),
            *self._pool(Role.LLM, LLMConfig, settings.llms, settings.llm_devices),
        ]

    def gateway(self, encoders: Sequence[str], llms: Sequence[str]) -> Child:
        found = {"encoder_addresses": encoders, "llm_addresses": llms}
        registry = build(GatewayConfig, self._given).store.registry or NO_REGISTRY
        given = {**self._given, **found, "registry": registry, "port": None}
        arguments, variables = to_command_line(options(GatewayConfig), given)
        command = [sys.executable, "-m", "gateway", *arguments]
        port = build(GatewayConfig, self._given).port
        environment = {**child_environment(1), **variables}
        return Child("gateway", Role.GATEWAY, command, environment, port)

    def _pool(self, role: Role, cls: type, count: int, devices: Sequence[str]) -> Iterator[Child]:
        threads = self._threads or share_of_cores(count)
        fixed = dict.fromkeys(GATEWAY_ONLY) | {
            "host": "127.0.0.1",
            "metrics_port": 0,
            "registry": NO_REGISTRY,  # No other gateway can reach them.
        }
        arguments, variables = to_command_line(
            options(cls), {**self._given, **fixed, "threads": threads}
        )
        name = role.name.lower()
        command = [sys.executable, "-m", f"{name}_service", *arguments]
        for index in range(count):
            device = devices[index % len(devices)] if devices else None
            environment = child_environment(threads, device)
            for option in GATEWAY_ONLY:
                environment.pop(PREFIX + option.upper(), None)
            label = name if count == 1 else f"{name}-{index}"
            yield Child(label, role, command, {**environment, **variables})


def share_of_cores(workers: int) -> int:
    """CPU threads of each of a pool's ``workers``.

    Each of the two pools divides all cores among its workers. A request is first encoded and then
    decoded, so if the pools shared the cores, half of the machine would be idle for a single
    request. When both pools are busy, two threads share a core, which costs little because waiting
    threads do not spin.
    """
    return max(1, len(os.sched_getaffinity(0)) // workers)


def child_environment(threads: int, device: str | None = None) -> dict[str, str]:
    """This process's environment without Kubernetes service links, with a child's CPU threads and
    device."""
    environment = without_service_links(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["MKL_NUM_THREADS"] = str(threads)
    environment["PYTHONUNBUFFERED"] = "1"
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    return environment
