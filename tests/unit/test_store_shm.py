"""What is shm's own: files, damage, full file systems, descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opticnerve import owned_directories as tier
from opticnerve.embeddings import ledger
from opticnerve.embeddings import shm_store as shm
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import EmbeddingCorrupt, StoreError, StoreFull
from opticnerve.owned_directories import is_locked
from tests.stores import KIB, MIB, fetched, key, rows


@pytest.fixture
def shm_store(tmp_path: Path) -> Iterator[ShmStore]:
    opened = ShmStore(tmp_path / "tier", MIB)
    yield opened
    opened.close()


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


@contextlib.contextmanager
def full_file_system() -> Iterator[None]:
    """Files and directories can be made, and no byte can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_tier_is_opened_in_a_full_file_system_and_works_once_it_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with full_file_system():
        path = tier.create_tier_directory(tmp_path)
        store, other = ShmStore(path, MIB), ShmStore(path, MIB)
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert f"{path} is full" in caplog.text
        assert store.tier_id == other.tier_id != ""
        assert tier.sweep_dead_tiers(tmp_path) == []
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(StoreFull):
                store.put(key(1), rows(1), {})
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert store.get(key(1)) is None
    store.put(key(1), rows(1), {})
    assert fetched(other, 1).tensors["rows"][0, 0] == 1
    assert store.stored_bytes() == entry_path(store, 1).stat().st_size
    store.close()
    other.close()
    tier.remove_tier(path)
    assert list(tmp_path.iterdir()) == []


def test_a_tier_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("0" * 32)  # A file; now it is a link.
    with contextlib.closing(ShmStore(tmp_path, MIB)) as store:
        store.put(key(1), rows(1), {})
        assert len(store.tier_id) == 32
        with contextlib.closing(ShmStore(tmp_path, MIB)) as other:
            assert other.tier_id == store.tier_id and other.get(key(1)) is not None


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
    assert shm_store.leasable_bytes() < 1


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
        assert ours.leasable_bytes() < MIB
    ours.close()
    theirs.close()


def test_a_corrupt_file_that_cannot_be_deleted_is_corrupt_all_the_same(
    shm_store: ShmStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shm_store.put(key(1), rows(1), {})
    entry_path(shm_store, 1).write_bytes(b"\xff" * 99)
    with monkeypatch.context() as hurried, (shm_store.directory / "lock").open() as lock:
        hurried.setattr(ledger, "LOCK_TIMEOUT_S", 0.01)
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
