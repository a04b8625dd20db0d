"""``opticnerve gateway [MODEL] flags``, or ``python -m gateway``.

With ``--workers``, the parent stays small: the modules that serve are imported only in the
processes that serve.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Sequence

from gateway import processes
from opticnerve.cli import commands
from opticnerve.config import GatewayConfig
from opticnerve.config.command_line import read_config
from opticnerve.errors import ConfigError
from opticnerve.process import ignore_hangup

log = logging.getLogger("gateway")

DESCRIPTION = "The HTTP front: OpenAI's API in front of encoders and LLM workers."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a gateway until it is stopped; its exit status. Raises StartupError."""
    ignore_hangup()
    arguments = sys.argv[1:] if argv is None else argv
    settings = read_config("gateway", DESCRIPTION, GatewayConfig, arguments)
    if settings.listen_fd is None:
        check_workers(settings)
        if settings.workers > 1:
            asyncio.run(processes.serve(settings, arguments))
            return 0
    importlib.import_module("gateway.service").run(processes.share(settings))
    return 0


def check_workers(settings: GatewayConfig) -> None:
    """Warns if there are no encoders. Raises ConfigError if there are no LLM workers."""
    if settings.store.read_registry() is not None:
        return
    if not settings.llm_addresses:
        raise ConfigError(
            "a gateway needs the addresses of its workers, such as --llm-addresses 127.0.0.1:7002 "
            "--encoder-addresses 127.0.0.1:7001, or the --registry where they register; `opticnerve"
            " up` starts workers and gateway together",
            param="llm_addresses",
        )
    if not settings.encoder_addresses:
        log.warning("no encoders: messages with pictures are refused; see --encoder-addresses")


if __name__ == "__main__":
    sys.exit(commands.run(__name__, sys.argv[1:]))
