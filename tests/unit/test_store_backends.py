"""What every local backend keeps to, and URLs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import open_store, parse_size
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import ConfigError, EmbeddingCorrupt, InvalidRequest, StoreFull
from tests.stores import KIB, MIB, Local, fetched, key, rows


@pytest.fixture(params=["memory", "shm"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Local]:
    opened: Local = MemoryStore(MIB) if request.param == "memory" else ShmStore(tmp_path / "t", MIB)
    yield opened
    opened.close()


def test_put_get_contains_delete(store: Local) -> None:
    assert store.get(key(1)) is None
    assert store.read_bytes(key(1)) is None
    store.put(key(1), rows(1), {"family": "x"})
    assert store.contains([key(1), key(2)]) == {key(1)}
    entry = fetched(store, 1)
    assert torch.equal(entry.tensors["rows"], rows(1)["rows"])
    assert entry.meta["family"] == "x"
    store.delete(key(1))
    store.delete(key(1))
    assert store.get(key(1)) is None
    assert store.stored_bytes() == 0


def test_the_first_writer_wins(store: Local) -> None:
    store.put(key(1), rows(1), {})
    store.put(key(1), rows(2), {})
    other = MemoryStore()
    other.put(key(1), rows(3), {})
    data = other.read_bytes(key(1))
    assert data is not None
    store.put_bytes(key(1), data)
    assert fetched(store, 1).tensors["rows"][0, 0] == 1


def test_bytes_go_from_one_store_to_another(store: Local) -> None:
    other = MemoryStore()
    other.put(key(1), rows(7), {"a": "b"})
    data = other.read_bytes(key(1))
    assert data is not None
    store.put_bytes(key(1), data)
    assert store.read_bytes(key(1)) == data
    assert fetched(store, 1).tensors["rows"][0, 0] == 7
    with pytest.raises(EmbeddingCorrupt):
        store.put_bytes(key(2), data[:-1])
    assert store.contains([key(2)]) == set()


def test_entries_are_private_and_warn_of_nothing(store: Local) -> None:
    store.put(key(1), rows(1), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = fetched(store, 1).tensors["rows"]
        mine.fill_(9)
    assert fetched(store, 1).tensors["rows"][0, 0] == 1


def test_rows_are_copied_out(store: Local) -> None:
    value = torch.arange(20 * 512.0).reshape(20, 512).bfloat16()
    store.put(key(1), {"a": rows(1)["rows"], "rows": value}, {})
    out = torch.empty(3, 512).bfloat16()
    fetched(store, 1).copy_rows("rows", out, 5)
    assert torch.equal(out, value[5:8])
    wide = torch.empty(3, 512)
    fetched(store, 1).copy_rows("rows", wide, 17)
    assert torch.equal(wide, value[17:].float())
    strided = torch.empty(512, 3).bfloat16().t()
    fetched(store, 1).copy_rows("rows", strided)
    assert torch.equal(strided, value[:3])
    for bad, start in ((out, 18), (out, -1), (torch.empty(3, 4), 0)):
        with pytest.raises(ValueError, match="do not fill"):
            fetched(store, 1).copy_rows("rows", bad, start)
    with pytest.raises(KeyError):
        fetched(store, 1).copy_rows("none", out)


def test_the_least_recently_used_goes_first(store: Local) -> None:
    for number in range(6):
        store.put(key(number), rows(number, 128), {})
    fetched(store, 0)
    for number in range(6, 9):
        store.put(key(number), rows(number, 128), {})
    here = store.contains(map(key, range(9)))
    assert key(0) in here
    assert key(8) in here
    assert key(1) not in here
    assert store.stored_bytes() <= MIB


def test_what_exceeds_the_capacity_is_refused_and_evicts_nothing(store: Local) -> None:
    store.put(key(1), rows(1), {})
    with pytest.raises(StoreFull):
        store.put(key(2), rows(2, 1100), {})
    assert store.contains([key(1)]) == {key(1)}


def test_a_lease_keeps_its_key(store: Local) -> None:
    store.put(key(0), rows(0, 256), {})
    with store.lease(key(0), 256 * KIB), store.lease(key(0), 256 * KIB):
        for number in range(1, 12):
            store.put(key(number), rows(number, 256), {})
        assert store.contains([key(0)]) == {key(0)}
    for number in range(12, 16):
        store.put(key(number), rows(number, 256), {})
    assert store.contains([key(0)]) == set()


def test_leases_count_before_their_rows_come(store: Local) -> None:
    assert store.leasable_bytes() >= MIB
    with store.lease(key(0), 900 * KIB):
        assert store.leasable_bytes() < 200 * KIB
        assert store.leasable_bytes() >= 100 * KIB
        with pytest.raises(StoreFull), store.lease(key(1), 200 * KIB):
            pass
        with pytest.raises(StoreFull):
            store.put(key(2), rows(2, 256), {})
        store.put(key(0), rows(0, 800), {})  # The room was kept for this one.
        assert store.contains([key(0)]) == {key(0)}
    assert store.leasable_bytes() >= MIB
    store.put(key(2), rows(2, 256), {})
    assert store.contains([key(2)]) == {key(2)}


@pytest.mark.parametrize("bad", ["", "ab", "../" + "a" * 61, "A" * 64, "g" * 64, "a" * 63 + "\n"])
def test_keys_are_digests(store: Local, bad: str) -> None:
    for call in (store.get, store.read_bytes, store.delete):
        with pytest.raises(InvalidRequest):
            call(bad)
    with pytest.raises(InvalidRequest):
        store.put(bad, rows(1), {})
    with pytest.raises(InvalidRequest):
        store.lease(bad, 1)
    with pytest.raises(InvalidRequest):
        store.contains([bad])


def test_many_threads(store: Local) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(30):
                number = (seed + step * 7) % 12
                store.put(key(number), rows(number, 64), {})
                entry = store.get(key(number))
                if entry is not None:
                    assert bool((entry.tensors["rows"] == number).all())
                if step % 5 == 0:
                    store.delete(key(number))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.stored_bytes() <= MIB


# ---- URLs


def test_urls(tmp_path: Path) -> None:
    store = open_store(f"shm://{tmp_path}/tier?capacity=64MiB")
    assert isinstance(store, ShmStore)
    assert store.capacity == 64 * MIB
    assert len(store.tier_id) == 32
    other = open_store(f"shm://{tmp_path}/tier")
    assert other.tier_id == store.tier_id
    other.close()
    store.close()
    assert (tmp_path / "tier").exists()
    memory = open_store("memory://?capacity=1000")
    assert isinstance(memory, MemoryStore)
    assert memory.capacity == 1000
    assert memory.tier_id == ""


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis://[bad",
        "file:///tmp/x",
        "shm://host/dir",
        "shm:///d?size=3",
        "shm:///d?capacity=x",
        "memory:///x",
        "redis://localhost:99999/0?local=memory://",
        "redis://localhost?local=redis://x",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("1k", 1024), ("2GiB", 2**31), ("1.5M", 1572864), ("3 MB", 3_000_000), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
