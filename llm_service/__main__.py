"""``opticnerve llm [MODEL] flags``, or ``python -m llm_service``.

What is wrong with the command line or the checkpoint is told here, before the service is
imported: torch takes seconds.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from opticnerve import flags
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.cli import commands as cli
from opticnerve.config import LLMConfig
from opticnerve.lifecycle import follow_parent, ignore_hangup

DESCRIPTION = "An LLM decoder: token ids and embeddings in, token ids out."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an LLM worker until it is stopped; its exit status. Raises StartupError."""
    ignore_hangup()
    settings = flags.read("llm", DESCRIPTION, LLMConfig, argv)
    follow_parent(settings.rpc.parent_pid)
    source = settings.model
    Checkpoint.open(source.model, source.revision, source.download_dir, side="llm").check()

    from llm_service.service import Service

    return asyncio.run(Service(settings).run())


if __name__ == "__main__":
    sys.exit(cli.run(__name__, sys.argv[1:]))
