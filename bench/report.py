"""What every benchmark prints and keeps: a table, and a JSON file with the command that made it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns: numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(cells[0]), rule + "|", *(line(row) for row in cells[1:])])


def _is_number(text: str) -> bool:
    return text.strip("x-≤ ").replace(".", "", 1).replace(",", "").isdigit() or text in ("", "-")


def save(name: str, results: Mapping[str, Any], file: str | Path | None = None) -> Path:
    """Writes ``bench/results/<file or name>.json``: the command, the machine, the date, results.
    A ``file`` that is an absolute path goes there."""
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
    """What a reader needs to know to compare figures."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
