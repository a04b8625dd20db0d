"""Plots, as PNG or SVG, or as one HTML page that holds the SVG and the figures as text."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opticnerve.errors import StartupError
from opticnerve.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from opticnerve.benchmark.report import LoadResult

ENDINGS = (".html", ".png", ".svg")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>body {{ font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 75em }}
svg {{ width: 100%; height: auto }} pre {{ overflow-x: auto }}</style>
<h1>{title}</h1>
{svg}
<pre>{text}</pre>
</html>
"""


def plot_path(text: str) -> Path:
    """The file for a plot. Raises ValueError for an unknown ending, and StartupError if matplotlib
    is not installed."""
    path = Path(text)
    if path.suffix not in ENDINGS:
        raise ValueError(f"expected a file that ends in {', '.join(ENDINGS)}, got {text!r}")
    require_extra("plot", "--plot")
    return path


def new_figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure without a window, and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [each for row in axes for each in row]


def save(figure: Figure, path: Path, title: str, text: str) -> None:
    """Raises StartupError for a file that cannot be written."""
    try:
        if path.suffix != ".html":
            figure.savefig(path)
            return
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
        svg = drawn.getvalue()
        page = PAGE.format(
            title=html.escape(title), svg=svg[svg.index("<svg") :], text=html.escape(text)
        )
        path.write_text(page)
    except OSError as error:
        raise StartupError(f"--plot: cannot write {path}: {error}") from error


def load_plot(results: Sequence[LoadResult]) -> Figure:
    """Distributions of TTFT, TPOT and the time to the end, and TTFT over the run."""
    figure, (ttft, tpot, e2e, over) = new_figure(2, 2)
    for result in results:
        kept = [each.answer for each in result.run.records if each.measured]
        answers = [answer for answer in kept if answer.outcome == "answered"]
        began, first = result.run.began, [answer for answer in answers if answer.times]
        _distribution(ttft, [answer.ttft for answer in answers], result.label)
        _distribution(tpot, [answer.tpot for answer in answers], result.label)
        _distribution(e2e, [answer.e2e for answer in answers], result.label)
        ms = [(answer.times[0] - answer.due) * 1000 for answer in first]
        over.plot([a.due - began for a in first], ms, ".", label=result.label)
    for axes, name in ((ttft, "TTFT"), (tpot, "time per output token"), (e2e, "time to the end")):
        axes.set(title=name, xlabel="ms", ylabel="share of requests", ylim=(0, 1))
    over.set(title="TTFT over the run", xlabel="s from the beginning", ylabel="ms")
    over.legend()
    return figure


def _distribution(axes: Axes, seconds: Sequence[float | None], label: str) -> None:
    values = [value * 1000 for value in seconds if value is not None]
    if values:
        axes.ecdf(values, label=label)
