"""The tables of metrics in docs/operations.md.

    python -m tests.metric_docs

writes them anew from the modules that declare metrics; a test holds the file to them. The last
column, what to do, is written in the document and kept.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

import encoder_service.metrics
import gateway.metrics
import llm_service.metrics
from llm_service.policy.messages import EngineStats
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.telemetry import metrics as shared

DOCUMENT = Path(__file__).parents[1] / "docs" / "operations.md"
HEAD = "| metric | type | labels | meaning | what to do |\n|---|---|---|---|---|\n"
ROW = re.compile(r"^\| `(opticnerve_\w+)` \|.*\| ([^|]*) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Declared:
    """A metric as it is exported."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    def row(self, advice: str) -> str:
        labels = ", ".join(f"`{label}`" for label in self.labels)
        return f"| `{self.name}` | {self.kind} | {labels} | {self.meaning} | {advice} |\n"


def of_module(module: ModuleType) -> Iterator[Declared]:
    """Those that are created where the module is imported, in the order of its lines."""
    for name, value in vars(module).items():
        if isinstance(value, MetricWrapperBase) and f"\n{name} =" in inspect.getsource(module):
            for metric in value.describe():
                yield _declared(metric, value._labelnames)


def collected(families: Iterable[Any]) -> Iterator[Declared]:
    """Those that are made at each scrape."""
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels}
        yield _declared(family, tuple(sorted(labels)))


def _declared(metric: Any, labels: tuple[str, ...]) -> Declared:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    return Declared(name, metric.type, labels, metric.documentation)


def of_engine() -> Iterator[Declared]:
    stats = EngineStats(prefill_tokens_per_s=1.0)  # Exported once it is known.
    return collected(llm_service.metrics.engine_stats(stats))


def of_stores() -> Iterator[Declared]:
    return collected(shared.store_size(MemoryStore()))


TABLES: dict[str, Callable[[], list[Declared]]] = {
    "every process": lambda: [*of_module(shared)],
    "gateway": lambda: [*of_module(gateway.metrics)],
    "encoder": lambda: [*of_module(encoder_service.metrics)],
    "LLM worker": lambda: [*of_module(llm_service.metrics), *of_engine()],
    "both workers": lambda: [*of_stores()],
}


def with_tables(text: str) -> str:
    """The document with every table between its marks."""
    advice = dict(ROW.findall(text))
    for name, declared in TABLES.items():
        start, end = f"<!-- {name}: python -m tests.metric_docs -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(start)
        rows = "".join(metric.row(advice.get(metric.name, "TODO")) for metric in declared())
        text = before + start + "\n" + HEAD + rows + "\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
