"""``opticnerve encoder [MODEL] flags``, or ``python -m encoder_service``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opticnerve.cli.commands import run
from opticnerve.cli.worker import run_worker
from opticnerve.config import EncoderConfig

DESCRIPTION = "A vision encoder: pictures in, embeddings out."


def main(argv: Sequence[str] | None = None) -> int:
    return run_worker("encoder", DESCRIPTION, EncoderConfig, "encoder_service.service", argv)


if __name__ == "__main__":
    sys.exit(run(__name__, sys.argv[1:]))
