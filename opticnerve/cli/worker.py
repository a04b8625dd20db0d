"""The command of an encoder and of an LLM worker.

A wrong command line or checkpoint is reported before the service is imported: importing torch takes
seconds.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import EncoderConfig, LLMConfig
from opticnerve.config.command_line import read_config
from opticnerve.extras import require_extra
from opticnerve.process import follow_parent, ignore_hangup

C = TypeVar("C", EncoderConfig, LLMConfig)


def run_worker(
    command: Literal["encoder", "llm"],
    description: str,
    config: type[C],
    module: str,
    argv: Sequence[str] | None,
) -> int:
    """Runs the worker that the module's ``open_worker(settings)`` opens, until it is stopped.
    Returns its exit status: 1 if its device or engine was lost. Raises StartupError."""
    ignore_hangup()
    settings = read_config(command, description, config, argv)
    require_extra("worker", "an encoder" if command == "encoder" else "an LLM worker")
    settings.store.registry_of_worker(settings.rpc)  # Raises for a registry that it cannot join.
    follow_parent(settings.rpc.parent_pid)
    Checkpoint.configured(settings.model, command).check()
    return asyncio.run(_serve(importlib.import_module(module).open_worker, settings))


async def _serve(open_worker: Any, settings: EncoderConfig | LLMConfig) -> int:
    async with open_worker(settings) as servicer:
        return int(await servicer.server.serve())
