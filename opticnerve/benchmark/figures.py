"""The figures of a run: latencies, rates, goodput, errors. Computed exactly from all values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.load import Record

RANKS = (50, 90, 95, 99)
UNITS = {"ms": 0.001, "s": 1.0}
LIMITED = ("ttft", "tpot", "e2e")


def percentile(values: Sequence[float], rank: float) -> float:
    """The percentile ``rank`` (0 to 100) of the values, interpolated linearly between two
    values."""
    return float(np.percentile(values, rank))


@dataclass(frozen=True)
class Spread:
    """The distribution of some durations, in seconds."""

    count: int
    mean: float
    percentiles: dict[int, float]
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The values' distribution; None if there are none."""
        if not values:
            return None
        ranked = {rank: percentile(values, rank) for rank in RANKS}
        return cls(len(values), float(np.mean(values)), ranked, max(values))

    def milliseconds(self) -> dict[str, float]:
        ranked = {f"p{rank}": value for rank, value in self.percentiles.items()}
        seconds = {"mean": self.mean, **ranked, "max": self.most}
        return {name: round(value * 1000, 3) for name, value in seconds.items()}

    def document(self) -> dict[str, float]:
        return {"count": self.count, **self.milliseconds()}


@dataclass(frozen=True)
class Slo:
    """The limits of a good answer, in seconds: of TTFT, TPOT and end-to-end time."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From ``ttft=500ms,tpot=50ms,e2e=5s``. Raises ValueError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().lower().partition("=")
            unit = next((unit for unit in UNITS if value.endswith(unit)), "")
            if name not in LIMITED or not unit:
                raise ValueError(
                    f"expected ttft=500ms,tpot=50ms,e2e=5s or some of them, got {text!r}"
                )
            limits[name] = float(value.removesuffix(unit)) * UNITS[unit]
        return cls(limits)

    def met(self, answer: Answer) -> bool:
        """Whether the answer is complete and within the limits. A figure that it lacks is
        within."""
        values = ((getattr(answer, name), limit) for name, limit in self.limits.items())
        within = all(value is None or value <= limit for value, limit in values)
        return answer.outcome == "answered" and within

    def __str__(self) -> str:
        return ", ".join(f"{name} {limit * 1000:g} ms" for name, limit in self.limits.items())


@dataclass(frozen=True)
class LoadFigures:
    """The figures of the measured requests. Latencies are of answered requests, in seconds. Rates
    cover the time from when the first request was due to the end of the last."""

    requests: int
    outcomes: dict[str, int]  # Answered, refused, lost.
    errors: dict[str, int]  # By status and code.
    seconds: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None  # Prompt tokens; None: not reported.
    without_usage: int  # Answered requests whose tokens the server has not counted.
    pictures: int
    pictures_again: int
    good: int | None  # Requests within the SLO; None: no SLO.
    latencies: dict[str, Spread]
    by_turn: dict[int, Spread]  # TTFT, in dialogues of several turns.

    @property
    def goodput(self) -> float | None:
        """Requests within the SLO, per second."""
        return None if self.good is None or not self.seconds else self.good / self.seconds

    def document(self) -> dict[str, Any]:
        """As JSON, latencies in milliseconds."""
        shown = dict(vars(self))
        shown["goodput_per_s"] = self.goodput
        shown["latencies"] = {name: each.document() for name, each in self.latencies.items()}
        shown["by_turn"] = {turn + 1: each.document() for turn, each in self.by_turn.items()}
        return shown


def load_figures(records: Iterable[Record], slo: Slo | None = None) -> LoadFigures:
    kept = [record for record in records if record.measured]
    answers = [record.answer for record in kept]
    whole = [answer for answer in answers if answer.outcome == "answered"]
    outcomes = Counter(answer.outcome for answer in answers)
    errors = Counter(_error(answer) for answer in answers if answer.outcome != "answered")
    seconds = max(a.ended for a in answers) - min(a.due for a in answers) if answers else 0.0
    per_s = 1 / seconds if seconds else 0.0
    cached = [a.cached_tokens for a in whole if a.cached_tokens is not None]
    prompt, output = sum(a.prompt_tokens for a in whole), sum(a.output_tokens for a in whole)
    return LoadFigures(
        requests=len(answers),
        outcomes={name: outcomes[name] for name in ("answered", "refused", "lost")},
        errors=dict(sorted(errors.items())),
        seconds=seconds,
        requests_per_s=len(whole) * per_s,
        prompt_tokens_per_s=prompt * per_s,
        output_tokens_per_s=output * per_s,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=sum(cached) if cached else None,
        without_usage=sum(not answer.has_usage for answer in whole),
        pictures=sum(record.asking.pictures for record in kept),
        pictures_again=sum(record.asking.again for record in kept),
        good=None if slo is None else sum(map(slo.met, answers)),
        latencies=_latencies(whole),
        by_turn=_by_turn(kept),
    )


def _error(answer: Answer) -> str:
    """``429 overloaded``; ``cut off`` where neither a status nor a code says why it ended."""
    return f"{answer.status or ''} {answer.code or 'cut off'}".strip()


def _latencies(answers: Sequence[Answer]) -> dict[str, Spread]:
    found = {
        "TTFT": [a.ttft for a in answers if a.ttft is not None],
        "TPOT": [a.tpot for a in answers if a.tpot is not None],
        "ITL": [gap for a in answers for gap in a.gaps],
        "E2E": [a.e2e for a in answers],
    }
    if any(a.scheduled is not None for a in answers):
        found["TTFT from sending"] = [a.times[0] - a.sent for a in answers if a.times]
        found["sent late by"] = [max(0.0, a.sent - a.due) for a in answers]
    spreads = ((name, Spread.of(values)) for name, values in found.items())
    return {name: spread for name, spread in spreads if spread}


def _by_turn(records: Sequence[Record]) -> dict[int, Spread]:
    turns: dict[int, list[float]] = {}
    for record in records:
        if record.answer.outcome == "answered" and record.answer.ttft is not None:
            turns.setdefault(record.turn, []).append(record.answer.ttft)
    spreads = ((turn, Spread.of(values)) for turn, values in sorted(turns.items()))
    return {turn: spread for turn, spread in spreads if spread} if len(turns) > 1 else {}
