"""The output of every benchmark: a table, and a JSON file with the command that made it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opticnerve.benchmark import tables
from opticnerve.benchmark.tables import table

__all__ = ["RESULTS", "machine", "save", "table"]

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: Mapping[str, Any], file: str | Path | None = None) -> Path:
    """Writes ``bench/results/<file or name>.json``, or ``<file>.json`` for an absolute path: the
    command, the machine, the date and the results. Returns the path."""
    path = RESULTS / f"{file or name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = shlex.join(sys.argv[1:])
    document = {
        "command": f"python -m bench.{name} {arguments}".strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        **results,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def machine() -> dict[str, Any]:
    """The machine's properties that a reader needs to compare figures."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**tables.machine(), "torch": torch.__version__, "device": device}
