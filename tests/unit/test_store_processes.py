"""The shared-memory tier under several real processes: writers, readers, eviction, kill -9."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from opticnerve.embeddings import codec
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import StoreFull

pytestmark = pytest.mark.process
MIB = 2**20
spawn = multiprocessing.get_context("spawn")


def key(number: int) -> str:
    return f"{number:064x}"


def rows(number: int, kib: int) -> dict[str, torch.Tensor]:
    return {"rows": torch.full((kib, 512), float(number)).bfloat16()}


def churn(directory: Path, capacity: int, seed: int, steps: int, answer: Connection) -> None:
    """Puts, gets and leases at random; reports what was seen that should never be."""
    torch.set_num_threads(1)
    store = ShmStore(directory, capacity)
    wrong: list[str] = []
    hits = 0
    for step in range(steps):
        number = (seed * 31 + step * 17) % 40
        with contextlib.suppress(StoreFull):
            store.put(key(number), rows(number, 50 + number), {})
        for other in (number, (number * 3 + seed) % 40):
            entry = store.get(key(other))
            if entry is None:
                continue
            hits += 1
            tensors = entry.tensors
            codec.verify(tensors, entry.meta)
            if tensors["rows"].shape[0] != 50 + other or not bool((tensors["rows"] == other).all()):
                wrong.append(f"{other} read as something else")
        if store.stored_bytes() > capacity:
            wrong.append("beyond the capacity")
    store.close()
    answer.send((hits, wrong))


def test_writers_and_readers_under_eviction(tmp_path: Path) -> None:
    directory, capacity = tmp_path / "tier", MIB  # 40 entries of 50 to 90 KiB: most go.
    watcher = ShmStore(directory, capacity)
    watcher.put(key(100), rows(100, 64), {})
    pipes, processes = [], []
    with watcher.lease(key(100), 64 * 1024):
        for seed in range(3):
            here, there = spawn.Pipe()
            process = spawn.Process(target=churn, args=(directory, capacity, seed, 120, there))
            process.start()
            pipes.append(here)
            processes.append(process)
        results = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
        entry = watcher.get(key(100))
        assert entry is not None
        assert bool((entry.tensors["rows"] == 100).all())
    assert [wrong for _, wrong in results] == [[], [], []]
    assert all(hits > 0 for hits, _ in results)
    files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert watcher.stored_bytes() == files <= capacity
    assert len(list((directory / "holders").iterdir())) == 1
    watcher.close()


def write_half(directory: Path, answer: Connection) -> None:
    """Stops for ever in the middle of a write."""
    from opticnerve.embeddings import shm_store as shm

    def half(temporary: object, pieces: list[memoryview]) -> None:
        os.write(temporary.fd, pieces[0])  # type: ignore[attr-defined]
        answer.send("writing")
        signal.pause()

    shm._write_all = half  # type: ignore[assignment]
    ShmStore(directory, MIB).put(key(1), rows(1, 600), {})


def test_a_writer_killed_half_way_leaves_no_entry_and_no_file(tmp_path: Path) -> None:
    here, there = spawn.Pipe()
    process = spawn.Process(target=write_half, args=(tmp_path / "tier", there))
    process.start()
    assert here.recv() == "writing"
    store = ShmStore(tmp_path / "tier", MIB)
    assert store.stored_bytes() > 600 * 1024  # What is being written counts.
    with pytest.raises(StoreFull):
        store.put(key(2), rows(2, 600), {})
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert store.get(key(1)) is None
    assert list(store.directory.glob("*.safetensors")) == []
    store.put(key(2), rows(2, 600), {})  # Sweeps what the dead writer left.
    assert store.contains([key(1), key(2)]) == {key(2)}
    assert len(list((store.directory / "holders").iterdir())) == 1
    store.close()


def test_a_reader_keeps_rows_that_another_process_evicts(tmp_path: Path) -> None:
    store = ShmStore(tmp_path / "tier", MIB)
    store.put(key(200), rows(200, 300), {})
    entry = store.get(key(200))
    assert entry is not None
    mapped = entry.tensors["rows"]
    here, there = spawn.Pipe()
    process = spawn.Process(target=churn, args=(tmp_path / "tier", MIB, 1, 40, there))
    process.start()
    assert here.recv()[1] == []
    process.join()
    assert store.contains([key(200)]) == set()
    assert mapped.shape == (300, 512)
    assert bool((mapped == 200).all())
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_tmpfs_that_is_full_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        store = ShmStore(small / "tier", 64 * MIB)  # The capacity promises what is not there.
        store.put(key(0), rows(0, 1500), {})
        with pytest.raises(StoreFull):
            store.put(key(1), rows(1, 5000), {})
        store.put(key(2), rows(2, 1500), {})
        store.settle()  # No room for a spare either.
        store.put(key(3), rows(3, 1500), {})
        entry = store.get(key(3))
        assert entry is not None
        assert bool((entry.tensors["rows"] == 3).all())
        del entry
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
