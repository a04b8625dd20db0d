"""A picture of a soak: how requests ended, what every service held, and when what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.soak.faults import Fault
from bench.soak.samples import Samples

COLORS = {"right": "tab:green", "left": "tab:gray", "excused": "tab:orange", "wrong": "tab:red"}
BINS = 90
HELD = {"memory, MB": "memory, MB", "files": "open files", "sockets": "sockets"}


def draw(
    path: Path,
    ended: Sequence[tuple[float, str]],
    samples: Samples,
    faults: Sequence[Fault],
    began: float,
) -> None:
    """Writes an image. ``ended``: when each request ended, in seconds, and the word for it."""
    figure = Figure(figsize=(11, 12), layout="constrained")
    axes: Any = figure.subplots(3 + len(HELD), sharex=True)
    last = max((at for at, _ in ended), default=1.0)
    step = last / BINS
    bottom = [0.0] * (BINS + 1)
    for word, color in COLORS.items():
        counts = Counter(int(at / step) for at, found in ended if found == word)
        heights = [counts[index] / step for index in range(BINS + 1)]
        edges = [index * step for index in range(BINS + 1)]
        axes[0].bar(edges, heights, step, bottom, align="edge", color=color, label=word)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes[0].set_ylabel("requests/s")
    for fault in faults:
        here = (fault.began - began, min(fault.ended - began, last))
        axes[1].plot(here, [fault.kind] * 2, color="tab:blue", linewidth=5, solid_capstyle="butt")
    axes[1].tick_params("y", labelsize="x-small")
    for row, (what, label) in zip(axes[2:], HELD.items(), strict=False):
        for name, points in sorted(samples.series.items()):
            if name.endswith(f" {what}") and name != "tier files":
                row.plot(*zip(*points, strict=True), label=name.partition(" ")[0], linewidth=0.8)
        row.set_ylabel(label)
    for name in ("tier files", "Redis keys"):
        axes[-1].plot(*zip(*samples.series[name], strict=True), label=name, linewidth=0.8)
    axes[-1].set_ylabel("embeddings")
    axes[-1].set_xlabel("seconds; shaded: a fault, until everything serves again")
    for row in axes:
        if row is not axes[1]:
            row.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for fault in faults:
            row.axvspan(fault.began - began, min(fault.ended - began, last), alpha=0.08)
    figure.savefig(path, dpi=90)
