"""The engine's rows over a store: leases, loading, damage, what outlives its file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm_service.policy.rows import RowsNote
from llm_service.rows.store_rows import Notes, StoreRows
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import EmbeddingEvicted

KEY, OTHER = "a" * 64, "b" * 64
VALUE = torch.arange(32.0).reshape(4, 8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ShmStore]:
    opened = ShmStore(tmp_path / "tier", 10**6)
    yield opened
    opened.close()


def test_rows_are_ready_when_they_are_here(store: ShmStore) -> None:
    rows = StoreRows(store)
    assert not rows.ready(KEY)
    rows.acquire(KEY, 128)
    assert not rows.ready(KEY)
    with pytest.raises(EmbeddingEvicted) as caught:
        rows.get(KEY)
    assert caught.value.param == KEY
    store.put(KEY, {"rows": VALUE}, {})
    assert rows.ready(KEY)
    assert torch.equal(rows.get(KEY)["rows"], VALUE)
    rows.release(KEY)


def test_leased_rows_outlive_their_file(store: ShmStore) -> None:
    rows = StoreRows(store)
    store.put(KEY, {"rows": VALUE}, {})
    rows.acquire(KEY, 128)
    assert rows.ready(KEY)
    store.delete(KEY)
    assert rows.ready(KEY)
    assert torch.equal(rows.get(KEY)["rows"], VALUE)
    rows.release(KEY)
    assert not rows.ready(KEY)


def test_leases_fill_the_budget_and_come_back(store: ShmStore) -> None:
    rows = StoreRows(store)
    rows.acquire(KEY, 900_000)
    assert not rows.can_acquire(200_000)
    rows.acquire(OTHER, 200_000)  # Beyond the budget: it goes on, without a lease.
    store.put(OTHER, {"rows": VALUE}, {})
    assert rows.ready(OTHER)
    rows.close()
    assert rows.can_acquire(900_000)


@pytest.mark.parametrize("offset", [10, -4])
def test_damaged_rows_are_not_ready_and_noted(store: ShmStore, offset: int) -> None:
    notes = Notes()
    rows = StoreRows(store, tell=notes.add)
    store.put(KEY, {"rows": VALUE}, {})
    path = store.directory / f"{KEY}.safetensors"
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset > 0 else os.SEEK_END)
        file.write(b"\xff")
    rows.acquire(KEY, 128)
    assert not rows.ready(KEY)
    assert not path.exists()
    assert notes.take_corrupt(KEY)
    assert not notes.take_corrupt(KEY)
    rows.release(KEY)


def test_rows_that_are_not_finite_are_not_ready(store: ShmStore) -> None:
    notes = Notes()
    rows = StoreRows(store, tell=notes.add)
    store.put(KEY, {"rows": VALUE / 0}, {})
    rows.acquire(KEY, 128)
    assert not rows.ready(KEY)
    assert store.contains([KEY]) == set() and notes.take_corrupt(KEY)
    rows.release(KEY)


def test_rows_that_cannot_be_mapped_are_not_ready(
    store: ShmStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    rows = StoreRows(store)
    store.put(KEY, {"rows": VALUE}, {})
    rows.acquire(KEY, 128)
    with monkeypatch.context() as patch:
        patch.setattr("opticnerve.embeddings.shm_store.mmap.mmap", exhausted)
        assert not rows.ready(KEY)
    assert rows.ready(KEY)
    rows.release(KEY)


def test_what_the_tier_does_not_take_comes_from_the_overflow(store: ShmStore) -> None:
    overflow = MemoryStore()
    rows = StoreRows(store, overflow)
    overflow.put(KEY, {"rows": VALUE}, {})
    rows.acquire(KEY, 128)
    assert torch.equal(rows.get(KEY)["rows"], VALUE)
    rows.release(KEY)
    assert overflow.stored_bytes() == 0


def test_notes_tell_seconds_of_late_loads_only() -> None:
    notes = Notes()
    notes.add(RowsNote(KEY, 0.5))
    assert notes.seconds(KEY, 0.0) == 0.5
    assert notes.seconds(KEY, float("inf")) == 0.0
    assert notes.seconds(OTHER, 0.0) == 0.0
