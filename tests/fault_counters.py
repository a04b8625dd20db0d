"""Which counters of faults have changed: each fault shows in exactly one of a process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY

PREFIX = "opticnerve_"
# docs/operations.md says which fault shows in which of them.
COUNTERS = frozenset(
    PREFIX + name
    for name in (
        "batches_split",
        "embeddings_refused",
        "errors",
        "failovers",
        "reencodes",
        "registry_failures",
        "retries",
        "store_failures",
    )
)

Counts = dict[tuple[str, ...], int]
Faults = Callable[..., Counts]


def counts() -> Counts:
    """By (counter, values of its labels in the order of the labels' names)."""
    return {
        (family.name.removeprefix(PREFIX), *(value for _, value in sorted(sample.labels.items()))):
        int(sample.value)
        for family in REGISTRY.collect()
        if family.name in COUNTERS
        for sample in family.samples
        if sample.name.endswith("_total")
    }  # fmt: skip


def watch() -> Faults:
    """A function that returns what has been counted since. With ``calls=False``, without the errors
    of gRPC calls: those of scripted workers, which share the process of a gateway under test."""
    before = counts()

    def since(*, calls: bool = True) -> Counts:
        new = {name: number - before.get(name, 0) for name, number in counts().items()}
        return {
            name: number
            for name, number in new.items()
            if number and (calls or name[0] != "errors" or not name[2][:1].isupper())
        }

    return since
