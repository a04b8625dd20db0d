"""The cost of a trip through the embedding store, relative to a plain copy of the same bytes.

    python -m bench.store [--rounds N]

One embedding is 1369 x 3584 in bf16, 9.8 MB: a large picture for a 7B model. Each round does every
operation and a memcpy once, in rotating order, on embeddings that the rounds just before did not
touch. A reader's operations come first, then a writer's, since these are two processes. Every
destination is warm (its pages exist and were written just before), for memcpy as for the others.
Figures are medians over the rounds, on one thread, relative to the memcpy of the same rounds.

* ``get + copy rows``: look up, check the header, copy every row into a warm tensor;
* ``get + map``: look up, map without a copy, and then copy every row out of the mapping;
* ``put``: serialise, checksum, write and publish under a new key. The store allocates the next
  file between two puts, as it does while an encoder computes the next picture;
* ``put, no pause``: puts one right after the other, allocation included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from bench import report
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.redis_store import RedisStore
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.owned_directories import create_tier_directory, remove_tier
from tests.redis import PATIENT, RedisServer, find_redis_server

ROWS, COLUMNS = 1369, 3584
DISTINCT = 12  # Embeddings used in turn; more than caches hold.
LIMITS = {"shm get + copy rows": 1.5, "shm put": 4.0}

Times = dict[str, list[float]]


class Bench:
    def __init__(self) -> None:
        self.sources = [torch.randn(ROWS, COLUMNS).bfloat16() for _ in range(DISTINCT)]
        self.warm = torch.empty_like(self.sources[0])
        self.times: Times = defaultdict(list)
        self._keys = 0

    def new_key(self) -> str:
        self._keys += 1
        return f"{self._keys:064x}"

    def measure(self, name: str, operation: Callable[[], object]) -> None:
        self.warm.zero_()
        start = time.perf_counter()
        operation()
        self.times[name].append(time.perf_counter() - start)

    def copy(self, index: int) -> None:
        self.warm.copy_(self.sources[index % DISTINCT])


def measure_shm(bench: Bench, store: ShmStore, rounds: int) -> None:
    keys = []
    for source in bench.sources:
        keys.append(bench.new_key())
        store.put(keys[-1], {"rows": source}, {})
        store.settle()

    def get(index: int) -> None:
        _entry(store, keys[index % DISTINCT]).copy_rows("rows", bench.warm)

    def get_mapped(index: int) -> None:
        bench.warm.copy_(_entry(store, keys[index % DISTINCT]).tensors["rows"])

    for i in range(rounds):
        operations: list[tuple[str, Callable[[], object]]] = [
            ("memcpy", lambda i=i: bench.copy(i)),
            ("shm get + copy rows", lambda i=i: get(i + 4)),
            ("shm get + map", lambda i=i: get_mapped(i + 8)),
        ]
        for j in range(len(operations)):
            bench.measure(*operations[(i + j) % len(operations)])
        get(i)  # Checks that it is what was put.
        assert torch.equal(bench.warm, bench.sources[i % DISTINCT])


def measure_shm_put(bench: Bench, store: ShmStore, rounds: int) -> None:
    for i in range(rounds):
        key = bench.new_key()
        bench.measure("memcpy, writing", lambda i=i: bench.copy(i + 4))
        bench.measure("shm put", lambda i=i, key=key: put(bench, store, key, i))
        store.delete(key)
        store.settle()
    measure_back_to_back(bench, store, rounds)


def measure_back_to_back(bench: Bench, store: ShmStore, rounds: int) -> None:
    for i in range(rounds):
        key = bench.new_key()
        bench.measure("shm put, no pause", lambda i=i, key=key: put(bench, store, key, i))


def measure_memory(bench: Bench, store: MemoryStore, rounds: int) -> None:
    for i in range(rounds):
        key = bench.new_key()
        bench.measure("memory put", lambda i=i, key=key: put(bench, store, key, i))
        bench.measure(
            "memory get + copy rows",
            lambda key=key: _entry(store, key).copy_rows("rows", bench.warm),
        )
        store.delete(key)


def measure_redis(bench: Bench, rounds: int) -> None:
    with RedisServer() as server:
        writer = open_store(f"{server.url}?local=memory://&{PATIENT}")
        reader = open_store(f"{server.url}?local=memory://&{PATIENT}")
        assert isinstance(writer, RedisStore)
        assert isinstance(reader, RedisStore)
        for i in range(rounds):
            key = bench.new_key()
            bench.measure("redis put", lambda i=i, key=key: put(bench, writer, key, i))
            bench.measure(
                "redis get + copy rows",
                lambda key=key: _entry(reader, key).copy_rows("rows", bench.warm),
            )
            reader.delete(key)
            writer.delete(key)
        writer.close()
        reader.close()


def put(bench: Bench, store: ShmStore | MemoryStore | RedisStore, key: str, index: int) -> None:
    store.put(key, {"rows": bench.sources[index % DISTINCT]}, {})


def _entry(store: ShmStore | MemoryStore | RedisStore, key: str):  # type: ignore[no-untyped-def]
    entry = store.get(key)
    assert entry is not None
    return entry


def summarise(times: Times) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, taken in times.items():
        base = statistics.median(times["memcpy, writing" if "put" in name else "memcpy"])
        median = statistics.median(taken)
        rows.append(
            {
                "operation": name,
                "median_ms": round(median * 1e3, 3),
                "times_memcpy": round(median / base, 2),
                "limit": LIMITS.get(name),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    bench = Bench()
    directory = create_tier_directory()
    try:
        store = ShmStore(Path(directory), 2**30)
        measure_shm(bench, store, rounds)
        measure_shm_put(bench, store, rounds)
        store.close()
    finally:
        remove_tier(directory)
    measure_memory(bench, MemoryStore(), rounds // 2)
    if find_redis_server():
        measure_redis(bench, rounds // 4)
    else:
        print("no redis-server on this machine: Redis is not measured")
    rows = summarise(bench.times)
    print(
        report.table(
            ["operation", "median ms", "x memcpy", "limit"],
            [[r["operation"], r["median_ms"], r["times_memcpy"], r["limit"] or "-"] for r in rows],
        )
    )
    size = ROWS * COLUMNS * 2
    print("written to", report.save("store", {"rounds": rounds, "bytes": size, "rows": rows}))


if __name__ == "__main__":
    main()
