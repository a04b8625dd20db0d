"""The health and metrics of a gateway and its workers at one moment, and the change between two."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, str, Labels]
"""A sample's source (a URL), its name, and its labels."""

START = "process_start_time_seconds"
BUCKET = "le"


def read_samples(source: str, text: str) -> dict[Series, float]:
    """The samples in an answer of ``/metrics``, in Prometheus' text format. Raises ValueError."""
    found = [each for family in text_string_to_metric_families(text) for each in family.samples]
    for sample in found:
        if sample.name.endswith("_bucket"):
            float(sample.labels.get(BUCKET, "none"))  # A histogram bucket's upper bound.
    return {
        (source, sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for sample in found
    }


def is_health(value: Any) -> bool:
    """Whether an answer of ``/health`` is a gateway's: it has a status and, if shown, the pools."""
    if not isinstance(value, dict) or not isinstance(value.get("status"), str):
        return False
    if not isinstance(value.get("missing", []), list):
        return False
    pools = [value.get("encoders"), value.get("llms")]
    return pools == [None, None] or all(map(_is_pool, pools))


def _is_pool(value: Any) -> bool:
    workers = value.get("workers") if isinstance(value, dict) else None
    return isinstance(workers, list) and all(
        isinstance(each, dict) and {"address", "state"} <= each.keys() for each in workers
    )


@dataclass(frozen=True)
class Snapshot:
    """``health``: the answer of ``/health``. ``silent``: why a source gave no samples, by its URL.
    ``at``: seconds since 1970."""

    health: Mapping[str, Any]
    samples: Mapping[Series, float] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return sum(_having(self.samples, name, labels).values())

    def start(self) -> Snapshot:
        """An empty snapshot of the moment when the first of the processes started."""
        began = [value for (_, name, _), value in self.samples.items() if name == START]
        return Snapshot({}, at=min(began, default=self.at))


@dataclass(frozen=True)
class Change:
    """The change between two snapshots. A counter that fell is taken to have restarted from 0 with
    its process."""

    before: Snapshot
    now: Snapshot

    @property
    def seconds(self) -> float:
        return self.now.at - self.before.at

    def rate(self, name: str, **labels: str) -> float:
        """How much a counter grew per second."""
        return self.growth(name, **labels) / self.seconds if self.seconds > 0 else 0.0

    def growth(self, name: str, **labels: str) -> float:
        return sum(self._grown(name, labels).values())

    def by(
        self, name: str, label: str, without: tuple[str, Collection[str]] = ("", ())
    ) -> dict[str, float]:
        """How much a counter grew, by the values of one of its labels. ``without``: a label, and
        its values that are left out."""
        grown: dict[str, float] = defaultdict(float)
        for (_, _, labels), value in self._grown(name, {}).items():
            told = dict(labels)
            if told.get(without[0]) not in without[1]:
                grown[told.get(label, "")] += value
        return dict(sorted(grown.items()))

    def mean(self, name: str, **labels: str) -> float | None:
        """The mean of a histogram's observations; None if there are none."""
        count = self.growth(f"{name}_count", **labels)
        return self.growth(f"{name}_sum", **labels) / count if count else None

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """The value below which a ``share`` of a histogram's observations lie, interpolated
        linearly within a bucket, as Prometheus' ``histogram_quantile`` does; at most the last
        bound. None if there are no observations."""
        buckets: dict[float, float] = defaultdict(float)
        for (_, _, found), value in self._grown(f"{name}_bucket", labels).items():
            buckets[float(dict(found)[BUCKET])] += value
        return _quantile(sorted(buckets.items()), share)

    def _grown(self, name: str, labels: Mapping[str, str]) -> dict[Series, float]:
        before = self.before.samples
        return {
            series: value if value < before.get(series, 0.0) else value - before.get(series, 0.0)
            for series, value in _having(self.now.samples, name, labels).items()
        }


def _having(
    samples: Mapping[Series, float], name: str, labels: Mapping[str, str]
) -> dict[Series, float]:
    wanted = set(labels.items())
    return {
        series: value
        for series, value in samples.items()
        if series[1] == name and wanted <= set(series[2])
    }


def _quantile(buckets: Iterable[tuple[float, float]], share: float) -> float | None:
    """``buckets``: upper bounds, ascending, with the number of observations up to each."""
    cumulative = list(buckets)
    if not cumulative or not cumulative[-1][1]:
        return None
    rank = share * cumulative[-1][1]
    for (low, below), (high, count) in _pairs(cumulative):
        if count < rank:
            continue
        if math.isinf(high):
            return low
        return low + (high - low) * (rank - below) / (count - below) if count > below else high
    return None


def _pairs(
    cumulative: list[tuple[float, float]],
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    return zip([(0.0, 0.0), *cumulative], cumulative, strict=False)
