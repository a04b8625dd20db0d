"""The output of a run: tables for the terminal, and a JSON document with every request."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from opticnerve import __version__
from opticnerve.benchmark.figures import LoadFigures, Slo
from opticnerve.benchmark.load import LoadRun, Record
from opticnerve.benchmark.tables import machine, table

BUSY = 0.8  # Above this share of a core, the client itself may limit the figures.
LATE_S = 0.05  # Above this 99th percentile, the client did not keep the rate.
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True)
class LoadResult:
    """One run: its settings and its results."""

    label: str
    settings: Mapping[str, Any]  # Those that differ between runs.
    run: LoadRun
    figures: LoadFigures
    complete: bool  # False: interrupted.

    @property
    def cpu_share(self) -> float:
        """The share of one core that this process used."""
        return self.run.cpu_s / self.figures.seconds if self.figures.seconds else 0.0

    def document(self) -> dict[str, Any]:
        records = sorted(self.run.records, key=lambda record: record.answer.due)
        return {
            "label": self.label,
            **self.settings,
            "complete": self.complete,
            "client_cpu_share": round(self.cpu_share, 3),
            "turns_not_asked": self.run.dropped,
            "figures": self.figures.document(),
            "notes": warnings(self),
            "requests": [request_document(record, self.run.began) for record in records],
        }


def request_document(record: Record, began: float) -> dict[str, Any]:
    """One request as JSON; times in seconds from the run's beginning."""
    answer = record.answer
    shown = {
        "dialogue": record.dialogue,
        "turn": record.turn + 1,
        "measured": record.measured,
        "pictures": record.asking.pictures,
        "pictures_again": record.asking.again,
        "due_s": round(answer.due - began, 6),
        "sent_s": round(answer.sent - began, 6),
        "ended_s": round(answer.ended - began, 6),
        "text_s": [round(at - began, 6) for at in answer.times],
        "outcome": answer.outcome,
        "status": answer.status,
        "code": answer.code,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "output_tokens": answer.output_tokens,
    }
    return shown if answer.timings is None else {**shown, "timings": answer.timings}


def document(
    name: str, argv: Sequence[str], results: Sequence[LoadResult], more: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a command measured, as JSON. ``more``: the settings that its runs share."""
    return {
        "command": shlex.join(["opticnerve", *name.split(), *argv]),
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "client": machine(),
        **more,
        "runs": [result.document() for result in results],
    }


# ---- as text


def text(result: LoadResult, slo: Slo | None) -> str:
    """One run's figures, for people."""
    found = result.figures
    counts = ", ".join(f"{count} {name}" for name, count in found.outcomes.items())
    lines = [f"{result.label}: {found.requests} requests in {found.seconds:.1f} s: {counts}"]
    lines += [f"  {count} x {error}" for error, count in found.errors.items()]
    if found.latencies:
        lines += ["", latencies(found), ""]
        lines += rates(found, slo)
    return "\n".join([*lines, *(f"note: {each}" for each in warnings(result))])


def latencies(found: LoadFigures) -> str:
    shown = {**found.latencies}
    shown |= {f"TTFT of turn {turn + 1}": spread for turn, spread in found.by_turn.items()}
    rows = []
    for name, spread in shown.items():
        values = spread.milliseconds()
        rows.append([name, *(f"{values[column]:,.1f}" for column in COLUMNS)])
    return table(["ms", *COLUMNS], rows)


def rates(found: LoadFigures, slo: Slo | None) -> list[str]:
    lines = [
        f"{found.requests_per_s:.2f} requests/s, {found.output_tokens_per_s:,.1f} output tokens/s, "
        f"{found.prompt_tokens_per_s:,.1f} prompt tokens/s"
    ]
    if found.goodput is not None:
        lines.append(
            f"goodput {found.goodput:.2f} requests/s: {found.good} of {found.requests} within {slo}"
        )
    if found.cached_tokens is not None:
        share = found.cached_tokens / max(1, found.prompt_tokens)
        lines.append(f"{share:.0%} of {found.prompt_tokens:,} prompt tokens were cached")
    if found.pictures:
        share = found.pictures_again / found.pictures
        lines.append(f"{found.pictures} pictures, {share:.0%} of them shown before")
    return lines


def warnings(result: LoadResult) -> list[str]:
    """Why the figures may not be the server's."""
    found, lines = result.figures, []
    if not result.complete:
        lines.append(f"interrupted: {result.run.unfinished} requests were under way")
    if result.run.exhausted:
        lines.append("every prepared request was sent before the time was over: raise --requests")
    if result.run.dropped:
        lines.append(f"{result.run.dropped} later turns were not asked: one before had no answer")
    if found.without_usage:
        lines.append(
            f"{found.without_usage} of {found.outcomes['answered']} answers came without usage, "
            "although stream_options asks for it: their tokens are not counted, and they have no "
            "TPOT, which an SLO takes for kept"
        )
    late = found.latencies.get("sent late by")
    if late and late.percentiles[99] > LATE_S:
        lines.append(
            f"the client did not keep the rate: p99 was sent {late.percentiles[99] * 1000:.0f} ms "
            "late; latencies count from when a request was due"
        )
    if result.cpu_share > BUSY:
        lines.append(
            f"the client used {result.cpu_share:.0%} of a core, and may be what was measured: "
            "share the load between several"
        )
    return lines


def summary(results: Sequence[LoadResult]) -> str:
    """A row for each of several runs."""
    rows = []
    for result in results:
        found = result.figures
        row = [result.label, f"{found.requests_per_s:.2f}", f"{found.output_tokens_per_s:,.1f}"]
        for name, rank in (("TTFT", 50), ("TTFT", 99), ("TPOT", 50), ("TPOT", 99), ("E2E", 50)):
            spread = found.latencies.get(name)
            row.append(f"{spread.percentiles[rank] * 1000:,.1f}" if spread else "-")
        good = "-" if found.goodput is None else f"{found.goodput:.2f}"
        rows.append([*row, good, str(found.requests - found.outcomes["answered"])])
    names = ["TTFT p50, ms", "TTFT p99", "TPOT p50, ms", "TPOT p99", "E2E p50"]
    header = ["run", "requests/s", "output tokens/s", *names, "goodput", "failed"]
    return table(header, rows)
