"""The engine's rows over a store: leases, loading, damage, what outlives its file."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llm_service.rows.store_rows import StoreRows
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import EmbeddingEvicted

KEY, OTHER = "a" * 64, "b" * 64
VALUE = torch.arange(32.0).reshape(4, 8)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ShmStore]:
    opened = ShmStore(tmp_path / "tier", 10**6)
    yield opened
    opened.close()


@pytest.fixture
def rows(store: ShmStore) -> Iterator[StoreRows]:
    opened = StoreRows(store)
    yield opened
    opened.close()


def test_rows_are_ready_when_they_are_loaded(store: ShmStore, rows: StoreRows) -> None:
    assert not rows.ready(KEY)
    rows.acquire(KEY, 128)
    assert not rows.load(KEY) and not rows.ready(KEY)
    with pytest.raises(EmbeddingEvicted) as caught:
        rows.get(KEY)
    assert caught.value.param == KEY
    store.put(KEY, {"rows": VALUE}, {})
    assert rows.present([KEY, OTHER]) == {KEY}
    assert rows.load(KEY) and rows.ready(KEY)
    assert torch.equal(rows.get(KEY)["rows"], VALUE)


def test_rows_without_a_lease_are_not_kept(store: ShmStore, rows: StoreRows) -> None:
    store.put(KEY, {"rows": VALUE}, {})
    assert rows.load(KEY) and not rows.ready(KEY)
    rows.acquire(KEY, 128)
    assert not rows.ready(KEY)


def test_leased_rows_outlive_their_file(store: ShmStore, rows: StoreRows) -> None:
    store.put(KEY, {"rows": VALUE}, {})
    rows.acquire(KEY, 128)
    assert rows.load(KEY) and rows.ready(KEY)
    store.delete(KEY)
    assert rows.ready(KEY) and rows.load(KEY)
    assert torch.equal(rows.get(KEY)["rows"], VALUE)
    rows.release(KEY)
    assert not rows.ready(KEY) and not rows.load(KEY)


def test_a_lease_pins_its_rows_in_the_tier_until_it_ends(store: ShmStore) -> None:
    rows, before = StoreRows(store), store.leasable_bytes()
    rows.acquire(KEY, 1000)
    rows.acquire(OTHER, 500)
    rows.release(OTHER)
    wait_until(lambda: store.leasable_bytes() == before - 1000)
    rows.close()
    assert store.leasable_bytes() == before


def test_leases_fill_the_budget_and_come_back(store: ShmStore) -> None:
    rows = StoreRows(store)
    rows.acquire(KEY, 900_000)
    assert not rows.can_acquire(200_000)
    rows.acquire(OTHER, 200_000)  # Beyond the budget: it goes on, without a lease.
    store.put(OTHER, {"rows": VALUE}, {})
    assert rows.load(OTHER) and rows.ready(OTHER)
    rows.close()
    assert rows.can_acquire(900_000)


def test_leases_of_other_processes_count(store: ShmStore, rows: StoreRows) -> None:
    other = ShmStore(store.directory, store.capacity)
    with other.lease(OTHER, 900_000):
        rows.acquire(KEY, 1000)
        wait_until(lambda: not rows.can_acquire(200_000))
    wait_until(lambda: rows.can_acquire(200_000))
    other.close()


@pytest.mark.parametrize("offset", [10, -4])
def test_damaged_rows_are_not_ready_and_noted(
    store: ShmStore, rows: StoreRows, offset: int
) -> None:
    store.put(KEY, {"rows": VALUE}, {})
    path = store.directory / f"{KEY}.safetensors"
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset > 0 else os.SEEK_END)
        file.write(b"\xff")
    rows.acquire(KEY, 128)
    assert not rows.load(KEY) and not rows.ready(KEY)
    assert not path.exists()
    assert rows.take_damaged(KEY)
    assert not rows.take_damaged(KEY)


def test_rows_that_are_not_finite_are_not_ready(store: ShmStore, rows: StoreRows) -> None:
    store.put(KEY, {"rows": VALUE / 0}, {})
    rows.acquire(KEY, 128)
    assert not rows.load(KEY) and not rows.ready(KEY)
    assert store.contains([KEY]) == set() and rows.take_damaged(KEY)


def test_rows_that_cannot_be_mapped_are_not_ready(
    store: ShmStore, rows: StoreRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    store.put(KEY, {"rows": VALUE}, {})
    rows.acquire(KEY, 128)
    with monkeypatch.context() as patch:
        patch.setattr("opticnerve.embeddings.shm_store.mmap.mmap", exhausted)
        assert not rows.load(KEY) and not rows.ready(KEY)
    assert rows.load(KEY) and rows.ready(KEY)


def test_what_the_tier_does_not_take_comes_from_the_overflow(store: ShmStore) -> None:
    overflow = MemoryStore()
    rows = StoreRows(store, overflow)
    overflow.put(KEY, {"rows": VALUE}, {})
    rows.acquire(KEY, 128)
    assert rows.load(KEY)
    assert torch.equal(rows.get(KEY)["rows"], VALUE)
    rows.release(KEY)
    assert overflow.stored_bytes() == 0
    rows.close()
