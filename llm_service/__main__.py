"""``opticnerve llm [MODEL] flags``, or ``python -m llm_service``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opticnerve.cli.commands import run
from opticnerve.cli.worker import run_worker
from opticnerve.config import LLMConfig

DESCRIPTION = "An LLM decoder: token ids and embeddings in, token ids out."


def main(argv: Sequence[str] | None = None) -> int:
    return run_worker("llm", DESCRIPTION, LLMConfig, "llm_service.service", argv)


if __name__ == "__main__":
    sys.exit(run(__name__, sys.argv[1:]))
