"""``opticnerve up``: turns flags into commands, and runs the supervisor.

Every flag of the services is a flag here; each child gets those that it knows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deploy.child import Child
from deploy.supervisor import Service, Supervisor, child_environment
from opticnerve import config
from opticnerve.embeddings.tier import create_tier_directory, remove_tier, sweep_dead_tiers
from opticnerve.errors import StartupError
from opticnerve.rpc.server import handle_signals

# What `up` itself decides for its children.
DECIDED = {"parent_pid", "encoder_addresses", "llm_addresses"}
# Names that belong to the gateway when given to `up`; internal services listen on loopback.
GATEWAY_ONLY = {"host", "port", "advertise", "metrics_port"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="opticnerve up",
        description="Starts encoders, LLM workers and the gateway on this machine.",
    )
    for cls in (config.UpConfig, config.GatewayConfig, config.EncoderConfig, config.LLMConfig):
        config.add_arguments(made, cls)
    return made


def main(argv: Sequence[str]) -> int:
    given = vars(parser().parse_args(argv))
    for name in DECIDED:
        if given.get(name) is not None:
            raise StartupError(f"--{name.replace('_', '-')} is decided by `up`; leave it out")
    config.check_environment()
    return asyncio.run(run(given))


async def run(given: dict[str, Any]) -> int:
    """Runs the stack until a signal (status 0) or until it must give up (status 1)."""
    settings = config.build(config.UpConfig, given)
    gateway = config.build(config.GatewayConfig, given)
    with contextlib.ExitStack() as files:
        store = files.enter_context(_store(gateway.store.store))
        given = {**given, "store": store, "parent_pid": os.getpid()}
        commands = Commands(settings, given)
        supervisor = Supervisor(
            commands.workers(),
            commands.gateway,
            start_timeout_s=settings.start_timeout_s,
            stop_timeout_s=gateway.drain_timeout_s + 5,
            max_restarts=settings.max_restarts,
        )

        def at_once() -> None:
            supervisor.kill()
            files.close()

        with handle_signals(supervisor.stop, on_second=at_once):
            async with supervisor:  # Inside: the signals still count while the children stop.
                await supervisor.run()
    return 0


@contextlib.contextmanager
def _store(url: str) -> Iterator[str]:
    """The store's URL; for a bare ``shm://`` a directory of our own, removed at the end."""
    sweep_dead_tiers()
    scheme, _, rest = url.partition("://")
    directory, _, query = rest.partition("?")
    if scheme != "shm" or directory:
        yield url
        return
    tier = create_tier_directory()
    try:
        yield f"shm://{tier}" + (f"?{query}" if query else "")
    finally:
        remove_tier(Path(tier))


class Commands:
    """The command line and environment of each child."""

    def __init__(self, settings: config.UpConfig, given: dict[str, Any]) -> None:
        self._settings = settings
        self._given = given
        children = settings.encoders + settings.llms
        if settings.encoders < 1 or settings.llms < 1:
            raise StartupError("--encoders and --llms must be at least 1")
        threads = config.build(config.ModelConfig, given).threads
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // children)

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
        port = config.build(config.GatewayConfig, given).port
        flags = _flags(config.GatewayConfig, given, skip={"port"})
        base = [sys.executable, "-m", "gateway", *flags]
        child = Child("gateway", [*base, "--port", str(port)], child_environment(1, (), 0))
        return Service(child, 2, base)

    def _pool(self, name: str, stage: int, cls: type, count: int) -> Iterator[Service]:
        devices = getattr(self._settings, f"{name}_devices")
        module = {"encoder": "encoder_service", "llm": "llm_service"}[name]
        flags = _flags(cls, {**self._given, "threads": self._threads}, skip=GATEWAY_ONLY)
        base = [sys.executable, "-m", module, *flags, "--host", "127.0.0.1"]
        for index in range(count):
            environment = child_environment(self._threads, devices, index)
            for option in GATEWAY_ONLY:
                environment.pop(config.PREFIX + option.upper(), None)
            label = name if count == 1 else f"{name}-{index}"
            yield Service(Child(label, [*base, "--port", "0"], environment), stage, base)


def _flags(cls: type, given: dict[str, Any], skip: set[str]) -> list[str]:
    """Those of the given flags that a service knows, as its command line."""
    flags: list[str] = []
    for item in config.options(cls):
        value = given.get(item.name)
        if value is None or item.name in skip:
            continue
        if item.name == "model":
            flags.insert(0, str(value))
        else:
            flags += item.to_arguments(value)
    return flags
