"""The accounts of a shared-memory tier: what is stored, pinned and evicted. No tensors.

A tier's directory:

    id                      its random id: a symbolic link's target, for which a full tmpfs has room
    lock                    the one flock; its eight bytes say how many bytes are stored
    owner                   a supervisor's, if it made the directory (see ``owned_directories``)
    <key>.safetensors       entries; modification time is recency
    holders/<random>/       what one open store holds, alive while it holds the lock on:
        alive
        tmp-<n>             a file being written, counted with its final size
        <key>               a pin: its (sparse) size is the bytes pinned

A holder that was killed has lost its lock: the next eviction, by any process, removes its pins and
partial files. No process ids are used, so containers with their own namespaces can share a tier.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opticnerve.errors import StoreError, StoreFull
from opticnerve.owned_directories import is_locked, make_private
from opticnerve.telemetry.metrics import EVICTIONS

SUFFIX = ".safetensors"
ALIVE = "alive"  # The lock of a holder.
TEMPORARY = "tmp-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK_TIMEOUT_S = 10.0  # It is never held longer than a scan of the directory.
EXTRA_FRACTION = 1 / 16  # Of the capacity, evicted in advance, so that not every put scans.

log = logging.getLogger(__name__)

_STORED = struct.Struct("<q")


@dataclass(slots=True)
class Temporary:
    """A file being written, before its key is visible."""

    path: Path
    fd: int
    num_bytes: int  # As counted in the ledger.


@dataclass(frozen=True, slots=True)
class Scan:
    """What is in the directory now."""

    entries: list[tuple[int, int, str]]  # (recency in ns, bytes, key)
    stored: int  # Bytes of entries, and of files that living holders write.
    pins: dict[str, int]  # Bytes pinned by living holders, by key.


class Ledger:
    """One open store's part in a tier. Thread-safe.

    ``capacity``: in bytes. ``shared_default``: the last store to close removes the directory.
    Raises StoreError if the directory cannot be made or used, or has gone.
    """

    def __init__(self, directory: Path, capacity: int, *, shared_default: bool = False) -> None:
        self.directory = directory
        self._prefix = f"{directory}/"
        self.capacity = capacity
        self._shared_default = shared_default
        self._temporaries = itertools.count()
        self._mutex = threading.Lock()  # Guards the next two; taken before the tier's lock.
        self._pins: dict[str, int] = {}  # Leases of this store by key.
        self._closed = False
        self.id, self._holder, self._alive = self._enter()

    # ---- entries

    def path(self, key: str) -> str:
        return f"{self._prefix}{key}{SUFFIX}"

    def reserve(self, num_bytes: int, key: str = "") -> Temporary | None:
        """Makes room and opens a file to write; None if ``key`` is stored already.

        Ends with ``publish`` or ``abandon``. Raises StoreFull, StoreError.
        """
        if num_bytes > self.capacity:
            raise StoreFull(f"{num_bytes} bytes exceed the store's capacity of {self.capacity}")
        with self._locked() as lock:
            if key and self.touch(self.path(key)):
                return None
            stored = _read(lock)
            if stored + self._absent_pins(key) + num_bytes > self.capacity:
                stored = self._evict(num_bytes, key)
            path = self._holder / f"{TEMPORARY}{next(self._temporaries)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.ftruncate(fd, num_bytes)
                _write(lock, stored + num_bytes)
            except OSError:
                os.close(fd)
                path.unlink()
                raise
            return Temporary(path, fd, num_bytes)

    def publish(self, temporary: Temporary, key: str, num_bytes: int) -> None:
        """Makes the first ``num_bytes`` of a file visible as ``key``; the first writer wins.

        All under one lock, so that the count always equals the bytes stored.
        """
        kept = 0
        try:
            with self._locked() as lock:
                try:
                    os.ftruncate(temporary.fd, num_bytes)
                    self.touch(temporary.fd)
                    os.link(temporary.path, self.path(key))
                    kept = num_bytes
                except FileExistsError:
                    self.touch(self.path(key))
                finally:
                    _drop(lock, temporary, kept)
        finally:
            os.close(temporary.fd)

    def abandon(self, temporary: Temporary) -> None:
        os.close(temporary.fd)
        with contextlib.suppress(StoreError), self._locked() as lock:
            _drop(lock, temporary, 0)

    def make_room(self, num_bytes: int) -> None:
        """Evicts ``num_bytes`` or more, if possible, when other programs have filled the tmpfs."""
        with self._locked() as lock:
            scan = self._scan()
            _write(lock, scan.stored - self._unlink_oldest(scan, num_bytes))

    def remove(self, key: str) -> None:
        with self._locked() as lock, contextlib.suppress(FileNotFoundError):
            size = os.stat(self.path(key)).st_size
            os.unlink(self.path(key))
            _write(lock, _read(lock) - size)

    def touch(self, entry: str | int) -> bool:
        """Marks an entry (its path or open file) as used now. Returns whether it exists."""
        now = time.time_ns()
        try:
            os.utime(entry, ns=(now, now))
        except OSError:
            return False
        return True

    def stored_bytes(self) -> int:
        with self._locked() as lock:
            return _read(lock)

    # ---- pins

    def pin(self, key: str, num_bytes: int) -> None:
        """Protects ``key`` from eviction by any process until ``unpin``. Raises StoreFull."""
        with self._mutex:
            if self._pins.get(key):
                self._pins[key] += 1
                return
            with self._locked():
                pins = self._held()[0]
                if sum(pins.values()) - pins.get(key, 0) + num_bytes > self.capacity:
                    raise StoreFull("leases fill the store's capacity")
                fd = os.open(self._holder / key, os.O_WRONLY | os.O_CREAT, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.truncate(num_bytes)
            self._pins[key] = 1

    def unpin(self, key: str) -> None:
        with self._mutex:
            self._pins[key] -= 1
            if self._pins[key] == 0:
                del self._pins[key]
                (self._holder / key).unlink(missing_ok=True)

    def unpinned_bytes(self) -> int:
        """The part of the capacity that is not pinned; 0 if the directory has gone."""
        try:
            return self.capacity - sum(self._held()[0].values())
        except OSError:
            return 0

    # ---- the directory

    def close(self) -> None:
        """Releases every pin. The last user of a default directory removes it."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        try:
            with self._locked():
                shutil.rmtree(self._holder, ignore_errors=True)
                self._sweep()
                if self._shared_default and not any(self._living()):
                    shutil.rmtree(self.directory, ignore_errors=True)
        except StoreError:
            pass  # The directory has gone already.
        finally:
            os.close(self._alive)

    def _enter(self) -> tuple[str, Path, int]:
        """Joins the tier: (its id, this store's directory in it, the lock that shows it is
        alive)."""
        for _ in range(100):
            make_private(self.directory)
            try:
                os.close(os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600))
                with self._locked() as lock:
                    if _is_at(lock, self.directory / "lock"):
                        return self._join(lock)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise translated(error) from error
            except StoreError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            # The last user removed it while this one waited for the lock.
        raise StoreError(
            f"the store's directory {self.directory} is removed again and again by other processes"
        )

    def _join(self, lock: int) -> tuple[str, Path, int]:
        identity = _identity(self.directory / "id")
        self._holder = self.directory / "holders" / secrets.token_hex(8)
        self._holder.mkdir(mode=0o700, parents=True)
        alive = os.open(self._holder / ALIVE, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(alive, fcntl.LOCK_EX)
        try:
            _write(lock, self._scan().stored)
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.warning(
                "%s is full: embeddings are not kept there until it has room (--shm-size in "
                "containers, or another --store), and LLM workers fetch them from encoders",
                self.directory,
            )
        return identity, self._holder, alive

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Holds the tier's lock; yields the file that counts the bytes stored.

        An OSError under it is raised as a StoreError.
        """
        try:
            lock = os.open(self.directory / "lock", os.O_RDWR)
        except OSError as error:
            raise StoreError(f"the store's directory {self.directory} has gone") from error
        try:
            _acquire(lock)
            yield lock
        except OSError as error:
            raise translated(error) from error
        finally:
            os.close(lock)

    def _evict(self, num_bytes: int, key: str) -> int:
        """Makes room for ``num_bytes`` under ``key``. Returns the bytes then stored. Raises
        StoreFull."""
        scan = self._scan()
        here = {entry[2] for entry in scan.entries}
        absent = sum(n for pin, n in scan.pins.items() if pin not in here and pin != key)
        excess = scan.stored + absent + num_bytes - self.capacity
        if excess <= 0:
            return scan.stored
        freed = self._unlink_oldest(
            scan, excess + int(self.capacity * EXTRA_FRACTION), enough=excess
        )
        if freed < excess:
            raise StoreFull("the store is full of embeddings that are in use")
        return scan.stored - freed

    def _unlink_oldest(self, scan: Scan, wanted: int, enough: int = 0) -> int:
        """Removes unpinned entries, least recently used first, until ``wanted`` bytes are freed, or
        none if all together are less than ``enough``. Returns the bytes freed."""
        free = [entry for entry in sorted(scan.entries) if entry[2] not in scan.pins]
        if sum(size for _, size, _ in free) < enough:
            return 0
        freed = 0
        for _, size, key in free:
            if freed >= wanted:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(key))
                EVICTIONS.labels("shm").inc()
            freed += size
        return freed

    def _scan(self) -> Scan:
        """Reads the directory and removes what dead holders left. Call it under the lock."""
        entries = []
        with os.scandir(self.directory) as found:
            for item in found:
                if item.name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat(follow_symlinks=False)
                        key = item.name[: -len(SUFFIX)]
                        entries.append((status.st_mtime_ns, status.st_size, key))
        self._sweep()
        pins, writing = self._held()
        return Scan(entries, sum(entry[1] for entry in entries) + writing, pins)

    def _sweep(self) -> None:
        """Removes what dead holders left. Call it under the lock."""
        living = set(self._living())
        for holder in (self.directory / "holders").iterdir():
            if holder not in living:
                shutil.rmtree(holder, ignore_errors=True)

    def _absent_pins(self, key: str) -> int:
        """Bytes reserved by pins whose entries are not stored yet, excluding ``key``."""
        pins = self._held()[0].items()
        return sum(n for pin, n in pins if pin != key and not os.path.exists(self.path(pin)))

    def _held(self) -> tuple[dict[str, int], int]:
        """(bytes pinned, by key; bytes being written) of all living holders."""
        pins: dict[str, int] = {}
        writing = 0
        for holder in self._living():
            with contextlib.suppress(FileNotFoundError), os.scandir(holder) as found:
                for item in found:
                    with contextlib.suppress(FileNotFoundError):
                        size = item.stat().st_size
                        if item.name.startswith(TEMPORARY):
                            writing += size
                        elif item.name != ALIVE:
                            pins[item.name] = max(size, pins.get(item.name, 0))
        return pins, writing

    def _living(self) -> Iterator[Path]:
        for holder in (self.directory / "holders").iterdir():
            if holder == self._holder or is_locked(holder / ALIVE):
                yield holder


def _identity(link: Path) -> str:
    """The tier's id, made by the first to ask. Call it under the lock."""
    try:
        return os.readlink(link)
    except OSError:  # Missing, or a file of an earlier version.
        link.unlink(missing_ok=True)
        os.symlink(secrets.token_hex(16), link)
    return os.readlink(link)


def translated(error: OSError) -> StoreError:
    """The typed error behind a failed write."""
    if error.errno in FULL:
        return StoreFull("there is no space left for embeddings")
    return StoreError(f"writing an embedding failed: {error.strerror}")


def _acquire(lock: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError("another process keeps the store's lock") from None
            time.sleep(0.0005)


def _read(lock: int) -> int:
    data = os.pread(lock, _STORED.size, 0)
    return int(_STORED.unpack(data)[0]) if len(data) == _STORED.size else 0


def _write(lock: int, stored: int) -> None:
    os.pwrite(lock, _STORED.pack(max(stored, 0)), 0)


def _drop(lock: int, temporary: Temporary, kept: int) -> None:
    """Removes a temporary and counts ``kept`` of its bytes, which an entry has now."""
    temporary.path.unlink(missing_ok=True)
    _write(lock, _read(lock) - temporary.num_bytes + kept)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
