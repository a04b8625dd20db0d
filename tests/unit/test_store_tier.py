"""Tier directories: who makes them, who removes them, and what is left after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opticnerve import owned_directories as tier
from opticnerve.embeddings.ledger import Ledger
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import StoreError

OWNER = """
import sys, time
from pathlib import Path
from opticnerve.owned_directories import create_tier_directory
print(create_tier_directory(Path(sys.argv[1])), flush=True)
time.sleep(600)
"""


def start_owner(base: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(base)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_an_owned_directory_lives_and_goes_with_its_owner(tmp_path: Path) -> None:
    path = tier.create_tier_directory(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert json.loads((path / "owner").read_text())["pid"] == os.getpid()
    assert tier.sweep_dead_tiers(tmp_path) == []
    store = ShmStore(path, 10**6)
    store.close()
    assert path.exists()
    tier.remove_tier(path)
    assert list(tmp_path.iterdir()) == []
    tier.remove_tier(path)


@pytest.mark.process
def test_a_killed_owners_directory_is_swept(tmp_path: Path) -> None:
    process, path = start_owner(tmp_path)
    try:
        (path / "deep").mkdir()
        assert tier.sweep_dead_tiers(tmp_path) == []
        process.kill()
        process.wait()
        assert tier.sweep_dead_tiers(tmp_path) == [path]
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def test_sweeping_leaves_what_is_not_a_tier_of_ours(tmp_path: Path) -> None:
    (tmp_path / "opticnerve-user-1").mkdir()
    (tmp_path / "someone-elses").mkdir()
    (tmp_path / "opticnerve-tier-file").write_text("x")
    (tmp_path / "opticnerve-tier-link").symlink_to(tmp_path / "someone-elses")
    (tmp_path / ".opticnerve-tier-new").mkdir()
    tier.sweep_dead_tiers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".opticnerve-tier-new",
        "opticnerve-tier-file",
        "opticnerve-tier-link",
        "opticnerve-user-1",
        "someone-elses",
    ]
    old = time.time() - 2 * tier.STALE_S
    os.utime(tmp_path / ".opticnerve-tier-new", (old, old))
    assert tier.sweep_dead_tiers(tmp_path) == [tmp_path / ".opticnerve-tier-new"]


def test_a_reused_process_id_does_not_keep_a_dead_tier(tmp_path: Path) -> None:
    path = tmp_path / "opticnerve-tier-1"
    path.mkdir()
    (path / "owner").write_text(json.dumps({"pid": os.getpid(), "start_time": 1}))
    assert tier.sweep_dead_tiers(tmp_path) == [path]
    path.mkdir()
    started = tier.process_start_time(os.getpid())
    (path / "owner").write_text(json.dumps({"pid": os.getpid(), "start_time": started}))
    assert tier.sweep_dead_tiers(tmp_path) == []
    (path / "owner").write_text("not json")
    assert tier.sweep_dead_tiers(tmp_path) == [path]


def test_the_default_directory_goes_with_its_last_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier, "base_directory", lambda: tmp_path)
    one, two = ShmStore(None, 10**6), ShmStore(None, 10**6)
    assert one.tier_id == two.tier_id
    assert one.directory == tmp_path / f"opticnerve-user-{os.getuid()}"
    one.close()
    assert two.directory.exists()
    two.close()
    two.close()
    assert list(tmp_path.iterdir()) == []


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="belongs to another user"):
        ShmStore(tmp_path / "link", 10**6)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        ShmStore(tmp_path / "file", 10**6)


@pytest.mark.process
def test_a_process_that_was_killed_pins_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from opticnerve.embeddings.shm_store import ShmStore\n"
        "store = ShmStore(Path(sys.argv[1]), 10**6)\n"
        "lease = store.lease('a' * 64, 900_000); lease.__enter__()\n"
        "print('pinned', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "t")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "pinned\n"
        store = ShmStore(tmp_path / "t", 10**6)
        assert store.leasable_bytes() < 200_000
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert store.leasable_bytes() >= 200_000
        store.close()
    finally:
        process.kill()
        process.wait()


def test_the_ledger_counts_what_is_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "t", 1000)
    temporary = ledger.reserve(300, "a" * 64)
    assert temporary is not None
    assert ledger.stored_bytes() == 300
    os.ftruncate(temporary.fd, 200)
    ledger.publish(temporary, "a" * 64, 200)
    assert ledger.stored_bytes() == 200
    assert ledger.reserve(300, "a" * 64) is None
    abandoned = ledger.reserve(100, "b" * 64)
    assert abandoned is not None
    ledger.abandon(abandoned)
    assert ledger.stored_bytes() == 200
    os.unlink(ledger.path("a" * 64))  # By hand: a new user of the tier counts again.
    other = Ledger(tmp_path / "t", 1000)
    assert ledger.stored_bytes() == 0
    other.close()
    ledger.close()


def test_nobody_counts_a_file_while_it_becomes_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan in between would count it twice, or with the length that it had before."""
    ledger = Ledger(tmp_path / "tier", 1000)
    locked = []
    for name in ("ftruncate", "link"):
        call = getattr(os, name)

        def watched(*arguments: object, call: Callable[..., None] = call) -> None:
            locked.append(tier.is_locked(tmp_path / "tier" / "lock"))
            call(*arguments)

        monkeypatch.setattr(os, name, watched)
    temporary = ledger.reserve(300)
    assert temporary is not None
    ledger.publish(temporary, "a" * 64, 200)
    assert len(locked) == 3 and all(locked)
    assert ledger.stored_bytes() == Path(ledger.path("a" * 64)).stat().st_size == 200
    ledger.close()


def test_a_directory_that_others_may_write_to_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "shared"
    path.mkdir()
    for mode, told in ((0o755, False), (0o770, True), (0o777, True)):
        path.chmod(mode)
        caplog.clear()
        tier.make_private(path)
        assert ("chmod 700" in caplog.text) is told
