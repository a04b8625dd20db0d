"""Whatever bytes stand under a key: nothing but typed errors comes of them, and they go."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings

from llm_service.rows.fetcher import Fetcher
from llm_service.rows.store_rows import StoreRows
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import EmbeddingCorrupt, InvalidRequest
from tests.damage import UNFIT, UNREADABLE, values
from tests.stores import MIB, Local, key

pytestmark = pytest.mark.slow

GOOD = {"rows": torch.arange(32.0).reshape(4, 8)}
HUGE = UNREADABLE["no rows beyond torch"]


@pytest.fixture(scope="module", params=["memory", "shm"])
def store(request: pytest.FixtureRequest) -> Iterator[Local]:
    with tempfile.TemporaryDirectory() as directory:
        opened: Local = (
            MemoryStore(MIB)
            if request.param == "memory"
            else ShmStore(Path(directory) / "tier", MIB)
        )
        yield opened
        opened.close()


def plant(store: Local, data: bytes) -> None:
    """Puts bytes under ``key(1)`` behind the store's back, as another program may."""
    store.delete(key(1))
    if isinstance(store, ShmStore):
        (store.directory / f"{key(1)}.safetensors").write_bytes(data)
    else:
        store._files[key(1)] = data
        store._stored += len(data)


def ref(location: Location) -> EmbeddingRef:
    return EmbeddingRef(key(1), "f" * 64, codec.specs_of(GOOD), 4, location)


@settings(max_examples=300, deadline=None)
@given(values())
@example(HUGE)
def test_reading_bytes_raises_nothing_else(data: bytes) -> None:
    try:
        tensors, meta = codec.from_bytes(data)
        codec.verify(tensors, meta)
    except EmbeddingCorrupt:
        return
    for name in (*tensors, *meta):
        name.encode()


@settings(max_examples=100, deadline=None)
@given(data=values())
@example(data=HUGE)
def test_a_store_gives_whole_tensors_or_deletes(store: Local, data: bytes) -> None:
    plant(store, data)
    try:
        entry = store.get(key(1))
    except EmbeddingCorrupt:
        assert store.contains([key(1)]) == set() and store.get(key(1)) is None
    else:
        assert entry is not None and entry.tensors


@settings(max_examples=100, deadline=None)
@given(data=values())
@example(data=HUGE)
def test_the_engine_has_whole_finite_rows_or_none(store: Local, data: bytes) -> None:
    plant(store, data)
    rows = StoreRows(store)
    if rows.present([key(1)]):
        rows.acquire(key(1), 128)
        if rows.load(key(1)):
            assert rows.ready(key(1)) and codec.is_finite(rows.get(key(1)))
        else:
            assert store.contains([key(1)]) == set() and rows.take_damaged(key(1))
    rows.close()


@settings(max_examples=50, deadline=None)
@given(data=values())
@example(data=HUGE)
def test_the_fetcher_brings_nothing_but_rows_that_fit(store: Local, data: bytes) -> None:
    async def main() -> None:
        fetcher = Fetcher(store, StoreRows(store), 8)
        try:
            plant(store, data)  # Good rows come beside it, and take its place.
            good = ref(Location(inline=codec.to_bytes(GOOD, {})))
            with fetcher.hold_own([key(1)]):
                await fetcher.ensure(good)
                store.delete(key(1))
                try:
                    await fetcher.ensure(ref(Location(inline=data or b"\0")))
                except (EmbeddingCorrupt, InvalidRequest):
                    assert store.contains([key(1)]) == set()
                    await fetcher.ensure(good)
                entry = store.get(key(1))
                assert entry is not None and entry.tensors["rows"].shape == (4, 8)
        finally:
            await fetcher.close()
        assert store.contains([key(1)]) == set()

    asyncio.run(main())


@pytest.mark.parametrize("data", UNFIT.values(), ids=UNFIT.keys())
def test_rows_of_another_shape_are_damage_too(store: Local, data: bytes) -> None:
    async def main() -> None:
        fetcher = Fetcher(store, StoreRows(store), 8)
        try:
            plant(store, data)
            with pytest.raises(EmbeddingCorrupt):
                await fetcher.ensure(ref(Location()))
            assert store.contains([key(1)]) == set()
        finally:
            await fetcher.close()

    asyncio.run(main())


def test_rows_that_did_not_fit_their_use_are_read_anew(store: Local) -> None:
    plant(store, UNFIT["another width"])
    rows = StoreRows(store)
    rows.acquire(key(1), 128)
    assert rows.load(key(1)) and rows.ready(key(1))
    rows.discard(key(1))
    assert not rows.ready(key(1)) and not rows.load(key(1))
    assert store.contains([key(1)]) == set()
    assert rows.take_damaged(key(1))
    store.put(key(1), GOOD, {})
    assert (
        rows.load(key(1))
        and rows.ready(key(1))
        and torch.equal(rows.get(key(1))["rows"], GOOD["rows"])
    )
    rows.close()


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file_is_corrupt_and_waits_for_nobody(tmp_path: Path, kind: str) -> None:
    store = ShmStore(tmp_path / "tier", MIB)
    path = store.directory / f"{key(1)}.safetensors"
    for read in (store.get, store.read_bytes):
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir(exist_ok=True)
        with pytest.raises(EmbeddingCorrupt):
            read(key(1))
    assert path.exists() == (kind == "directory")
    store.close()


def test_a_file_that_is_cut_before_it_is_mapped_is_corrupt(tmp_path: Path) -> None:
    store = ShmStore(tmp_path / "tier", MIB)
    store.put(key(1), GOOD, {})
    entry = store.get(key(1))
    assert entry is not None
    os.truncate(store.directory / f"{key(1)}.safetensors", 10)
    with pytest.raises(EmbeddingCorrupt):
        _ = entry.tensors
    store.close()
