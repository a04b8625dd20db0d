"""What every local backend keeps to, and what is shm's own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opticnerve.embeddings import ledger, shm
from opticnerve.embeddings.memory import MemoryStore
from opticnerve.embeddings.open import open_store, parse_size
from opticnerve.embeddings.shm import ShmStore
from opticnerve.embeddings.store import Entry
from opticnerve.embeddings.tier import is_locked
from opticnerve.errors import ConfigError, EmbeddingCorrupt, InvalidRequest, StoreError, StoreFull

KIB = 1024
MIB = 2**20
Local = ShmStore | MemoryStore


def key(number: int) -> str:
    return f"{number:064x}"


def rows(number: int, kib: int = 16) -> dict[str, torch.Tensor]:
    return {"rows": torch.full((kib, 512), float(number)).bfloat16()}  # 1 KiB a row.


def fetched(store: Local, number: int) -> Entry:
    entry = store.get(key(number))
    assert entry is not None
    return entry


@pytest.fixture(params=["memory", "shm"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Local]:
    opened: Local = MemoryStore(MIB) if request.param == "memory" else ShmStore(tmp_path / "t", MIB)
    yield opened
    opened.close()


@pytest.fixture
def shm_store(tmp_path: Path) -> Iterator[ShmStore]:
    opened = ShmStore(tmp_path / "tier", MIB)
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
    assert store.can_lease(MIB)
    with store.lease(key(0), 900 * KIB):
        assert not store.can_lease(200 * KIB)
        assert store.can_lease(100 * KIB)
        with pytest.raises(StoreFull), store.lease(key(1), 200 * KIB):
            pass
        with pytest.raises(StoreFull):
            store.put(key(2), rows(2, 256), {})
        store.put(key(0), rows(0, 800), {})  # The room was kept for this one.
        assert store.contains([key(0)]) == {key(0)}
    assert store.can_lease(MIB)
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


# ---- shm alone


def entry_path(store: ShmStore, number: int) -> Path:
    return store.directory / f"{key(number)}.safetensors"


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "grown"])
def test_damaged_files_are_deleted_and_corrupt_once(shm_store: ShmStore, damage: str) -> None:
    shm_store.put(key(1), rows(1), {})
    path = entry_path(shm_store, 1)
    good = path.read_bytes()
    path.write_bytes(
        {"cut": good[:-5], "empty": b"", "garbage": b"\xff" * 99, "grown": good + b"x"}[damage]
    )
    with pytest.raises(EmbeddingCorrupt):
        shm_store.get(key(1))
    assert not path.exists()
    assert shm_store.get(key(1)) is None
    shm_store.put(key(1), rows(1), {})
    assert fetched(shm_store, 1).tensors["rows"][0, 0] == 1


def test_a_file_that_is_cut_while_it_is_read_is_corrupt(shm_store: ShmStore) -> None:
    shm_store.put(key(1), rows(1), {})
    entry = fetched(shm_store, 1)
    os.truncate(entry_path(shm_store, 1), 5000)
    with pytest.raises(EmbeddingCorrupt):
        entry.copy_rows("rows", torch.empty(16, 512).bfloat16())


def test_mapped_rows_outlive_their_file(shm_store: ShmStore) -> None:
    shm_store.put(key(1), rows(1), {})
    lazy, mapped = fetched(shm_store, 1), fetched(shm_store, 1).tensors["rows"]
    shm_store.delete(key(1))
    assert mapped[15, 511] == 1
    assert lazy.tensors["rows"][15, 511] == 1


def test_large_files_take_the_prepared_memory(tmp_path: Path) -> None:
    with_spares = ShmStore(tmp_path / "tier", 64 * MIB)
    for number in range(6):
        with_spares.put(key(number), rows(number, 1500 + 400 * (number % 2)), {"n": str(number)})
        with_spares.settle()
    for number in range(6):
        entry = fetched(with_spares, number)
        assert bool((entry.tensors["rows"] == number).all())
        assert entry.tensors["rows"].shape == (1500 + 400 * (number % 2), 512)
        assert entry.meta["n"] == str(number)
    with_spares.close()
    assert list((tmp_path / "tier" / "holders").iterdir()) == []


def test_files_on_disk_are_safetensors_and_private(shm_store: ShmStore) -> None:
    shm_store.put(key(1), rows(1), {})
    assert shm_store.directory.stat().st_mode & 0o777 == 0o700
    assert entry_path(shm_store, 1).stat().st_mode & 0o077 == 0
    from safetensors.torch import load_file

    assert torch.equal(load_file(entry_path(shm_store, 1))["rows"], rows(1)["rows"])


def test_a_write_beyond_the_limit_leaves_nothing(shm_store: ShmStore) -> None:
    """A file-size limit fails write(2) as a full file system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, hard))
    try:
        with pytest.raises(StoreFull):
            shm_store.put(key(1), rows(1, 256), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert shm_store.get(key(1)) is None
    assert shm_store.stored_bytes() == 0
    shm_store.put(key(1), rows(1, 256), {})
    assert fetched(shm_store, 1).tensors["rows"][0, 0] == 1


def test_a_file_system_that_others_fill(
    shm_store: ShmStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC although the tier is within its capacity: old entries make room, once."""
    for number in range(4):
        shm_store.put(key(number), rows(number, 128), {})
    failures = iter([OSError(28, "No space left on device")])
    write = shm._write_all

    def failing(temporary: object, pieces: object) -> None:
        for error in failures:
            raise error
        write(temporary, pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(shm, "_write_all", failing)
    shm_store.put(key(9), rows(9, 128), {})
    here = shm_store.contains(map(key, range(10)))
    assert key(0) not in here
    assert here >= {key(3), key(9)}


def test_a_directory_that_goes_is_a_miss_and_an_error_to_write(shm_store: ShmStore) -> None:
    shm_store.put(key(1), rows(1), {})
    shutil.rmtree(shm_store.directory)
    assert shm_store.get(key(1)) is None
    assert shm_store.contains([key(1)]) == set()
    with pytest.raises(StoreError):
        shm_store.put(key(2), rows(2), {})
    with pytest.raises(StoreError):
        shm_store.lease(key(2), 1).__enter__()
    assert not shm_store.can_lease(1)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Every file descriptor that this process may have is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 16, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_cannot_be_opened_is_a_miss(shm_store: ShmStore) -> None:
    shm_store.put(key(1), rows(1), {})
    with no_descriptors():
        missed = shm_store.get(key(1)), shm_store.read_bytes(key(1))
    assert missed == (None, None)
    assert fetched(shm_store, 1).tensors["rows"][0, 0] == 1


def test_a_holder_that_cannot_be_asked_counts_as_living(tmp_path: Path) -> None:
    ours, theirs = (ShmStore(tmp_path / "tier", MIB) for _ in range(2))
    with theirs.lease(key(1), MIB // 2):
        holders = list((tmp_path / "tier" / "holders").iterdir())
        with no_descriptors():
            living = [is_locked(holder / "alive") for holder in holders]
        assert living == [True, True]
        assert not ours.can_lease(MIB)
    ours.close()
    theirs.close()


def test_a_corrupt_file_that_cannot_be_deleted_is_corrupt_all_the_same(
    shm_store: ShmStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "LOCK_TIMEOUT_S", 0.01)
    shm_store.put(key(1), rows(1), {})
    entry_path(shm_store, 1).write_bytes(b"\xff" * 99)
    with (shm_store.directory / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # A process that is stopped with the lock in its hand.
        for read in (shm_store.get, shm_store.read_bytes):
            with pytest.raises(EmbeddingCorrupt):
                read(key(1))
    with pytest.raises(EmbeddingCorrupt):
        shm_store.get(key(1))
    assert shm_store.get(key(1)) is None


def test_small_file_systems_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Small:
        f_blocks, f_frsize = 64 * KIB // 4, 4 * KIB  # 64 MiB, as in containers.

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    store = ShmStore(tmp_path / "tier")
    assert store.capacity == 32 * MIB
    assert "only 32 MiB" in caplog.text
    store.close()


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
