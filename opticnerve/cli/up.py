"""``opticnerve up``: turns flags into commands, and runs the supervisor.

Every flag of the services is a flag here; each child gets those that it knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opticnerve import addresses, config, flags
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.cli.child import Child
from opticnerve.cli.supervisor import Service, Supervisor, child_environment
from opticnerve.embeddings.tier import create_tier_directory, remove_tier, sweep_dead_tiers
from opticnerve.errors import StartupError, StoreError
from opticnerve.extras import require_extra
from opticnerve.options import PREFIX, build, options
from opticnerve.process import follow_parent, handle_signals, ignore_hangup, on_hangup
from opticnerve.secret import make_secret, read_secret

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Starts encoders, LLM workers and the gateway on this machine; every other flag is handed to "
    "the services that know it. --host, --port and --metrics-port are the gateway's; workers "
    "listen on loopback, and have metrics at --metrics-host and ports that they print."
)
# What `up` itself decides for its children: no flags of its own.
DECIDED = {"encoder_addresses", "llm_addresses", "advertise", "insecure", "fetch_from"}
CLOSE_S = 5.0  # That a child gets to end after its drain.
STAGES = 3  # Gateway, LLM workers, encoders stop one after another.
# Names that belong to the gateway when given to `up`; internal services listen on loopback.
GATEWAY_ONLY = {"host", "port", "advertise", "metrics_port"}
# Options that name files of secrets, which `up` makes where it is given none, and whose they are.
SECRETS: dict[str, type] = {
    "rpc_token_file": config.GatewayConfig,
    "store_key_file": config.StoreConfig,
}


def parser() -> flags.Parser:
    classes = (config.UpConfig, config.GatewayConfig, config.EncoderConfig, config.LLMConfig)
    return flags.service_parser("up", DESCRIPTION, classes, without=DECIDED)


def main(argv: Sequence[str]) -> int:
    ignore_hangup()
    given = vars(parser().parse_args(argv))
    config.check_environment()
    config.begin_logs(build(config.GatewayConfig, given).telemetry)
    flags.warn_of_passwords(config.StoreConfig, given)
    return asyncio.run(run(given))


async def run(given: dict[str, Any]) -> int:
    """Runs the stack until a signal, or its own parent's end (status 0). SIGHUP is the gateway's.
    Raises StartupError when it must give up."""
    settings = build(config.UpConfig, given)
    gateway = build(config.GatewayConfig, given)
    stop_timeout_s = gateway.shutdown_delay_s + gateway.drain_timeout_s + CLOSE_S
    follow_parent(gateway.parent_pid, grace_s=STAGES * stop_timeout_s)
    _check_early(gateway, settings.encoders + settings.llms)
    with contextlib.ExitStack() as files:
        store = files.enter_context(_store(build(config.StoreConfig, given)))
        secrets = _secrets(given, files.enter_context(_run_directory()))
        given = {**given, **secrets, "store": store, "parent_pid": os.getpid()}
        commands = Commands(settings, given)
        supervisor = Supervisor(
            commands.workers(),
            commands.gateway,
            start_timeout_s=settings.start_timeout_s,
            stop_timeout_s=stop_timeout_s,
            max_restarts=settings.max_restarts,
        )

        def stop() -> None:
            supervisor.stop()
            log.info(_farewell(gateway, ready=bool(supervisor.url)))

        def cut() -> None:
            supervisor.hurry()
            log.info("ending what still runs")

        def at_once() -> None:
            supervisor.kill()
            files.close()

        with handle_signals(stop, cut, at_once), on_hangup(supervisor.hang_up):
            async with supervisor:  # Inside: the signals still count while the children stop.
                await supervisor.run()
    return 0


def _farewell(gateway: config.GatewayConfig, *, ready: bool) -> str:
    if not ready:
        return "stopping before it was ready"
    delay = gateway.shutdown_delay_s
    taken = f"requests are taken for {delay:g} s more (--shutdown-delay-s), then " if delay else ""
    return (
        f"stopping: {taken}requests that run get up to {gateway.drain_timeout_s:g} s to end "
        "(--drain-timeout-s); Ctrl-C again ends them now"
    )


def _check_early(gateway: config.GatewayConfig, workers: int) -> None:
    """What would fail in every worker once it has loaded torch, or in the gateway, which starts
    last: told once, and before anything starts. Raises StartupError."""
    require_extra("worker", "up")
    host, shown = gateway.listen_host, gateway.telemetry
    addresses.check_free(host, gateway.port)
    if shown.metrics_host or shown.metrics_port >= 0:  # Workers have metrics in any case.
        port = max(0, shown.metrics_port)
        addresses.check_free(shown.metrics_host or host, port, "--metrics-port")
    source = gateway.model
    checkpoint = Checkpoint.open(source.model, source.revision, source.download_dir)
    checkpoint.check()
    importlib.import_module("gateway.preflight").check(gateway, checkpoint, workers)


@contextlib.contextmanager
def _store(settings: config.StoreConfig) -> Iterator[str]:
    """``--store`` of the workers; for a bare ``shm://`` a directory of our own, removed at the
    end. Raises ConfigError for a file that cannot be read."""
    scheme, _, rest = settings.read_url().partition("://")
    directory, _, query = rest.partition("?")
    sweep_dead_tiers()
    if scheme != "shm" or directory:
        yield settings.store
        return
    tier = create_tier_directory()
    try:
        yield f"shm://{tier}" + (f"?{query}" if query else "")
    finally:
        remove_tier(Path(tier))


@contextlib.contextmanager
def _run_directory() -> Iterator[Path]:
    """A directory of this stack's own for small files, removed at its end, or by the next one. Not
    on the tmpfs that embeddings may fill. Raises StartupError."""
    base = Path(tempfile.gettempdir())
    sweep_dead_tiers(base)
    try:
        directory = create_tier_directory(base)
    except StoreError as error:
        raise StartupError(error.message) from error
    try:
        yield directory
    finally:
        remove_tier(directory)


def _secrets(given: dict[str, Any], directory: Path) -> dict[str, str]:
    """The file of each of ``SECRETS``: the one that the user names, once it has been read, or a new
    one in ``directory``. Raises StartupError."""
    files = {}
    for option, cls in SECRETS.items():
        named: str | None = getattr(build(cls, given), option)
        if named is not None:
            read_secret(named, option)
        files[option] = named or str(make_secret(directory, option))
    store = build(config.StoreConfig, given)
    if store.store_key_file is None and not store.read_url().startswith(("shm:", "memory:")):
        log.info(
            "embeddings in Redis are signed under a secret that ends with this stack: to find them "
            "there again, or to share them, give stacks the same --store-key-file"
        )
    return files


class Commands:
    """The command line and environment of each child."""

    def __init__(self, settings: config.UpConfig, given: dict[str, Any]) -> None:
        self._settings = settings
        self._given = given
        if settings.encoders < 1 or settings.llms < 1:
            raise StartupError("--encoders and --llms must be at least 1")
        self._threads = build(config.ModelConfig, given).threads

    def workers(self) -> list[Service]:
        return [
            *self._pool("encoder", 0, config.EncoderConfig, self._settings.encoders),
            *self._pool("llm", 1, config.LLMConfig, self._settings.llms),
        ]

    def gateway(self, encoders: list[str], llms: list[str]) -> Service:
        given = {
            **self._given,
            "encoder_addresses": tuple(encoders),
            "llm_addresses": tuple(llms),
        }
        port = build(config.GatewayConfig, given).port
        base = [
            sys.executable,
            "-m",
            "gateway",
            *_arguments(config.GatewayConfig, given, skip={"port"}),
        ]
        child = Child("gateway", [*base, "--port", str(port)], child_environment(1, (), 0))
        return Service(child, 2, base)

    def _pool(self, name: str, stage: int, cls: type, count: int) -> Iterator[Service]:
        devices = getattr(self._settings, f"{name}_devices")
        module = {"encoder": "encoder_service", "llm": "llm_service"}[name]
        threads = self._threads or share_of_cores(count)
        arguments = _arguments(cls, {**self._given, "threads": threads}, skip=GATEWAY_ONLY)
        passwords = _passwords(cls, self._given)
        own = ["--host", "127.0.0.1", "--metrics-port", "0"]  # The port is in the child's log.
        base = [sys.executable, "-m", module, *arguments, *own]
        for index in range(count):
            environment = child_environment(threads, devices, index)
            for option in GATEWAY_ONLY:
                environment.pop(PREFIX + option.upper(), None)
            environment.update(passwords)
            label = name if count == 1 else f"{name}-{index}"
            yield Service(Child(label, [*base, "--port", "0"], environment), stage, base)


def share_of_cores(workers: int) -> int:
    """CPU threads of each of a pool's ``workers``.

    Each pool divides all cores, although there are two: a request is encoded first and decoded
    then, so one alone would leave half of the machine idle. Where both pools are busy, two threads
    a core take turns, which costs little while threads that wait do not spin.
    """
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _passwords(cls: type, given: dict[str, Any]) -> dict[str, str]:
    """Those of the given flags that have a password, as variables: every user of the machine
    reads command lines."""
    found = [item for item in options(cls) if item.has_password(given.get(item.name))]
    return {item.variable: given[item.name] for item in found}


def _arguments(cls: type, given: dict[str, Any], skip: set[str]) -> list[str]:
    """Those of the given flags that a service knows, as its command line; none with a
    password."""
    arguments: list[str] = []
    for item in options(cls):
        value = given.get(item.name)
        if value is None or item.name in skip or item.has_password(value):
            continue
        if item.name == "model":
            arguments.insert(0, str(value))
        else:
            arguments += item.to_arguments(value)
    return arguments
