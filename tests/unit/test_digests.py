"""Every byte of the weights counts; they are read once, and again when their files change."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from opticnerve.checkpoints import digests as module
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.digests import RECORD
from opticnerve.errors import CheckpointError
from opticnerve.tensors.header import TensorEntry
from tests.checkpoints import make_checkpoint

LONG_AGO = 1_600_000_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTICNERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MIN_RECORDED_BYTES", 1)
    monkeypatch.setattr(module, "SETTLED_S", -60.0)  # What was just written counts as settled.
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path, cache: Path) -> Path:
    return make_checkpoint("qwen2_vl", tmp_path / "checkpoint", shards=2)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, once for each of their tensors."""
    names: list[str] = []
    digest = module._digest

    def counted(entry: TensorEntry) -> str:
        names.append(entry.file.name)
        return digest(entry)

    monkeypatch.setattr(module, "_digest", counted)
    return names


def pair_id(path: Path) -> str:
    return Checkpoint.open(str(path)).pair_id


def flip(path: Path, key: str, at: int) -> None:
    """Changes one byte of a tensor, in place."""
    entry = Checkpoint.open(str(path)).tensor_index()[key]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + at % entry.num_bytes)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, -1])
def test_one_byte_of_any_tensor_is_another_checkpoint(path: Path, at: int) -> None:
    keys = list(Checkpoint.open(str(path)).tensor_index())
    seen = {pair_id(path)}
    for key in keys:
        flip(path, key, at)
        seen.add(pair_id(path))
        flip(path, key, at)
    assert len(seen) == 1 + len(keys)
    assert pair_id(path) in seen


def test_weights_are_read_once_by_all_sides(path: Path, read: list[str]) -> None:
    first = pair_id(path)
    count = len(read)
    assert count == len(Checkpoint.open(str(path)).tensor_index())
    for side in ("gateway", "encoder", "llm"):
        checkpoint = Checkpoint.open(str(path), side=side)
        assert checkpoint.pair_id == first
        checkpoint.weights_digest(lambda key: "visual" in key)
    assert len(read) == count
    assert (path / RECORD).exists()


def test_what_was_read_before_an_early_end_is_kept(
    path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Checkpoint.open(str(path)).tensor_index()
    first, second = sorted({entry.file.name for entry in entries.values()})
    read_group = module._read

    def ended(group: dict[str, TensorEntry]) -> dict[str, str]:
        if next(iter(group.values())).file.name == second:
            raise KeyboardInterrupt
        return read_group(group)

    with monkeypatch.context() as context:
        context.setattr(module, "_read", ended)
        with pytest.raises(KeyboardInterrupt):
            pair_id(path)
    assert set(read) == {first}
    read.clear()
    pair_id(path)
    assert set(read) == {second}


def test_a_file_that_was_written_again_is_read_again_and_no_other(
    path: Path, read: list[str]
) -> None:
    """Although it has the size, the time of modification and the inode of before."""
    first = pair_id(path)
    entries = Checkpoint.open(str(path)).tensor_index()
    key, entry = next(iter(entries.items()))
    before = entry.file.stat()
    read.clear()
    flip(path, key, 0)
    os.utime(entry.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = entry.file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size, before.st_mtime_ns, before.st_ino,
    )  # fmt: skip
    assert pair_id(path) != first
    assert set(read) == {entry.file.name}


def test_what_a_copy_brings_along_is_not_trusted(
    path: Path, tmp_path: Path, read: list[str]
) -> None:
    first = pair_id(path)
    copy = shutil.copytree(path, tmp_path / "copy")  # With times.
    key = next(iter(Checkpoint.open(str(copy)).tensor_index()))
    flip(copy, key, 0)
    read.clear()
    assert pair_id(copy) != first
    assert len(read) == len(Checkpoint.open(str(copy)).tensor_index())


def test_beside_weights_that_cannot_be_written_the_users_cache_serves(
    path: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.replace_file

    def refuse(place: Path, data: bytes) -> None:
        if place.parent == path:
            raise PermissionError("read-only")
        write(place, data)

    monkeypatch.setattr(module, "replace_file", refuse)
    first = pair_id(path)
    read.clear()
    assert pair_id(path) == first and not read
    assert not (path / RECORD).exists() and len(list((cache / "digests").iterdir())) == 1


def test_nothing_is_written_among_links_of_the_hubs_cache(path: Path, cache: Path) -> None:
    for file in path.glob("*.safetensors"):
        blob = path.parent / file.name
        file.rename(blob)
        file.symlink_to(blob)
    pair_id(path)
    assert not (path / RECORD).exists() and len(list((cache / "digests").iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        '{"scheme": 0, "files": {}}',
        '{"scheme": 1, "files": {"model-1.safetensors": 7}}',
        "[" * 100_000,
    ],
)
def test_what_is_damaged_is_read_anew(path: Path, content: str) -> None:
    first = pair_id(path)
    (path / RECORD).write_text(content)
    assert pair_id(path) == first
    assert json.loads((path / RECORD).read_text())["files"]


def test_where_nothing_can_be_kept_weights_are_read_at_each_start(
    path: Path, cache: Path, read: list[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache.write_text("a file where the directory should be")
    (path / RECORD).mkdir()
    first = pair_id(path)
    assert "cannot record the digests" in caplog.text
    read.clear()
    assert pair_id(path) == first and read


def test_a_file_that_just_changed_is_not_trusted_to_stay(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_S", 60.0)
    for file in path.glob("*.safetensors"):
        os.utime(file, (LONG_AGO, LONG_AGO))
    pair_id(path)
    assert not (path / RECORD).exists() and not cache.exists()


def test_small_checkpoints_leave_nothing_behind(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_RECORDED_BYTES", 64 * 2**20)
    pair_id(path)
    assert not (path / RECORD).exists() and not cache.exists()


def test_those_who_start_together_read_once(path: Path, read: list[str]) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(pair_id(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert len(read) == len(Checkpoint.open(str(path)).tensor_index())


def test_reading_ahead_is_the_reading(path: Path, read: list[str]) -> None:
    checkpoint = Checkpoint.open(str(path))
    checkpoint.read_ahead()
    assert len(checkpoint.pair_id) == 64
    assert len(read) == len(checkpoint.tensor_index())


def test_weights_that_cannot_be_read_are_told(path: Path) -> None:
    checkpoint = Checkpoint.open(str(path))
    entries = checkpoint.tensor_index()
    file = next(iter(entries.values())).file
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="cut short"):
        module.Digests().of(entries)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        module.Digests().of(entries)


def test_what_is_kept_is_for_every_user(path: Path) -> None:
    pair_id(path)
    assert stat.S_IMODE((path / RECORD).stat().st_mode) == 0o644
