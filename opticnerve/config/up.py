"""``opticnerve up``: its own options, and those that it passes on to the services."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from opticnerve.config.encoder import EncoderConfig
from opticnerve.config.gateway import GatewayConfig
from opticnerve.config.llm import LLMConfig
from opticnerve.config.options import Group, Option, option, options

_processes = partial(option, group=Group.PROCESSES)

# Options of the services that `up` sets itself; they are no flags of `up`.
DECIDED = {"encoder_addresses", "llm_addresses", "advertise", "insecure", "fetch_from"}


@dataclass(frozen=True)
class UpConfig:
    """Settings of ``up`` itself."""

    encoders: int = _processes(1, "encoder processes", minimum=1)
    llms: int = _processes(1, "LLM processes", minimum=1)
    encoder_devices: tuple[str, ...] = _processes(
        (), "CUDA devices of the encoders, assigned in turn, such as 0,1", metavar="N,..."
    )
    llm_devices: tuple[str, ...] = _processes(
        (), "CUDA devices of the LLM workers, assigned in turn, such as 2,3", metavar="N,..."
    )
    start_timeout_s: float = _processes(600.0, "time for a process to become healthy")
    max_restarts: int = _processes(
        5, "crashes of one process within a minute after which `up` stops"
    )


def up_options() -> list[Option]:
    """Every option of ``up``: its own, and every option of the services once. The gateway's take
    precedence, so ``--host`` and ``--port`` are the gateway's."""
    by_name: dict[str, Option] = {}
    for cls in (UpConfig, GatewayConfig, EncoderConfig, LLMConfig):
        for item in options(cls):
            if item.name not in DECIDED:
                by_name.setdefault(item.name, item)
    return list(by_name.values())
