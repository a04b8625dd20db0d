"""Directories that are removed when their owner, a process or a user, is gone: those of
shared-memory tiers, and of a supervisor's small files, such as secrets.

Three kinds of tiers:

* one that a user names (``shm:///dir``) is never removed;
* one that a supervisor makes for its children (``create_tier_directory``) lives as long as the
  supervisor: it removes it at the end (``remove_tier``), or after its death the next one does
  (``sweep_dead_tiers``);
* the one that services without a supervisor share (``shm://``), one for each user of the machine,
  is removed by the last of them to close it.

All are 0700. An owner is alive while it holds the lock on the directory's ``owner`` file, or while
the process with the file's id and start time runs (ids alone are reused).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from opticnerve.errors import StartupError, StoreError

PREFIX = "opticnerve-"
OWNED = PREFIX + "tier-"
UNFINISHED = "." + OWNED
OWNER = "owner"
STALE_S = 60.0  # Age at which an unfinished directory counts as a dead supervisor's.

log = logging.getLogger(__name__)

_owned: dict[Path, int] = {}  # Directories that this process made, and their locks.
_owned_lock = threading.Lock()


def base_directory() -> Path:
    """/dev/shm if it is writable, else the directory for temporary files."""
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK | os.X_OK):
        return shm
    return Path(tempfile.gettempdir())


def default_directory(base: Path | None = None) -> Path:
    """The tier that this user's services share if none is configured."""
    return (base or base_directory()) / f"{PREFIX}user-{os.getuid()}"


def make_private(path: Path) -> None:
    """Makes a 0700 directory, or checks that an existing one belongs to this user; warns if others
    may write to it.

    Raises StoreError for a link, and if another user owns it: in /dev/shm, anyone could have
    created it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise StoreError(f"cannot make the store's directory {path}: {error.strerror}") from error
    if path.is_symlink() or status.st_uid != os.geteuid():
        raise StoreError(
            f"the store's directory {path} is a link or belongs to another user; name one of your "
            "own: --store shm:///dir"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning(
            "other users can write to the store's directory %s and so replace what the model sees "
            "of pictures: `chmod 700` it",
            path,
        )


def create_tier_directory(base: Path | None = None) -> Path:
    """A new tier directory, owned by this process until ``remove_tier``, or until the process ends.
    Raises StoreError."""
    base = base or base_directory()
    token = secrets.token_hex(8)
    unfinished, path = base / (UNFINISHED + token), base / (OWNED + token)
    try:
        unfinished.mkdir(mode=0o700)
        lock = os.open(unfinished / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        owner = {"pid": os.getpid(), "start_time": process_start_time(os.getpid())}
        with contextlib.suppress(OSError):  # A full tmpfs; the lock suffices.
            os.write(lock, json.dumps(owner).encode())
        unfinished.rename(path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StoreError(f"cannot make a store directory in {base}: {error.strerror}") from error
    with _owned_lock:
        _owned[path] = lock
    return path


def remove_tier(path: Path) -> None:
    """Removes a directory that ``create_tier_directory`` made, with its contents."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # A child may have written while it was being removed.
        shutil.rmtree(path, ignore_errors=True)
    with _owned_lock:
        lock = _owned.pop(path, None)
    if lock is not None:
        os.close(lock)


@contextlib.contextmanager
def owned_directory(base: Path) -> Iterator[Path]:
    """A directory of this process in ``base``, removed at the end of the context, or by the next
    sweep if the process is killed. Raises StartupError."""
    try:
        directory = create_tier_directory(base)
    except StoreError as error:
        raise StartupError(error.message) from error
    try:
        yield directory
    finally:
        remove_tier(directory)


def sweep_dead_tiers(base: Path | None = None) -> list[Path]:
    """Removes this user's tiers whose owner is dead; returns them."""
    base = base or base_directory()
    removed = []
    for pattern in (OWNED + "*", UNFINISHED + "*"):
        for path in base.glob(pattern):
            with contextlib.suppress(OSError):
                if path.lstat().st_uid == os.geteuid() and not path.is_symlink() and _is_dead(path):
                    shutil.rmtree(path, ignore_errors=True)
                    removed.append(path)
    if removed:
        log.info("removed %d directories of dead processes", len(removed))
    return removed


def _is_dead(path: Path) -> bool:
    if path.name.startswith("."):
        return time.time() - path.stat().st_mtime > STALE_S
    try:
        lock = os.open(path / OWNER, os.O_RDWR)
    except FileNotFoundError:
        return True  # Half removed: the owner file goes with the rest.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not _runs(os.read(lock, 4096))
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _runs(owner: bytes) -> bool:
    """Whether the recorded process runs; a reused id has another start time."""
    try:
        fields = json.loads(owner)
        started = process_start_time(int(fields["pid"]))
    except (ValueError, KeyError, TypeError):
        return False
    return started is not None and started == fields.get("start_time")


def is_locked(path: Path) -> bool:
    """Whether any process, this one included, holds the lock on a file. A missing file is not
    locked; one that cannot be opened counts as locked."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # Not ours to read, or no descriptors left.
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def process_start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None if it does not run (or is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
