"""Records, across crashes of processes, which items a worker was processing when it died.

A picture that crashes a decoder or a driver kills its worker, and the retry kills the next one. So
each worker leaves an empty file ``<worker>-<key>``, a mark, while it decodes or encodes an item,
and holds a lock on its file ``<worker>.lock`` as long as it lives. A mark whose worker's lock is
free counts as one crash of that item. After one crash the item runs alone, so that another crash
can be blamed on no other item; after two it is refused. Its crashes are forgotten after a success,
or after an hour.

The directory is shared by the workers of one machine. If it cannot be written, nothing is
remembered and the log says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from opticnerve.errors import PoisonousItem, StoreError
from opticnerve.owned_directories import is_locked, make_private

log = logging.getLogger(__name__)

MAX_CRASHES = 2
FORGET_AFTER_S = 3600.0


class CrashRecord:
    """One worker's view of the record. ``close`` removes its own files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.worker = secrets.token_hex(8)
        self._lock: int | None = None
        try:
            make_private(directory)
            self._lock = self._take_lock()
        except (OSError, StoreError) as error:
            log.warning("items that kill workers cannot be remembered in %s: %s", directory, error)
            return
        self._sweep()

    def _take_lock(self) -> int:
        """Creates and locks the file under another name, and then renames it: a sweep would take an
        unlocked file for a dead worker's."""
        new = self.directory / f"{self.worker}.new"
        handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self._lock_path(self.worker))
        return handle

    def crashes(self, key: str) -> int:
        """The number of workers that died while they processed this item."""
        return sum(1 for _ in self._dead_marks(key, {}))

    def check(self, key: str) -> int:
        """The item's number of crashes. Raises PoisonousItem if there are too many."""
        crashes = self.crashes(key)
        if crashes >= MAX_CRASHES:
            raise PoisonousItem(
                f"encoding this item crashed {crashes} workers, so it is refused; send another file"
            )
        return crashes

    @contextlib.contextmanager
    def working_on(self, keys: Iterable[str]) -> Iterator[None]:
        """Marks ``keys`` as being processed while the context lasts."""
        prefix = f"{self.directory}/{self.worker}-"
        marks = [prefix + key for key in keys] if self.active else []
        try:
            for mark in marks:
                with contextlib.suppress(OSError):  # A full disk must not fail the item.
                    os.close(os.open(mark, os.O_CREAT | os.O_WRONLY, 0o600))
            yield
        finally:
            for mark in marks:
                with contextlib.suppress(OSError):
                    os.unlink(mark)

    def add(self, key: str) -> None:
        """Records the crash of a child process that decoded this item for this worker."""
        if self.active:
            dead_worker = secrets.token_hex(8)  # A worker without a lock file counts as dead.
            with contextlib.suppress(OSError):
                mark = self.directory / f"{dead_worker}-{key}"
                os.close(os.open(mark, os.O_CREAT | os.O_WRONLY, 0o600))

    def clear(self, key: str) -> None:
        """Forgets the item's crashes: it was encoded after all."""
        for path in list(self._dead_marks(key, {})):
            path.unlink(missing_ok=True)

    @property
    def active(self) -> bool:
        return self._lock is not None

    def close(self) -> None:
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        self._lock_path(self.worker).unlink(missing_ok=True)
        os.close(lock)
        self._sweep()
        with contextlib.suppress(OSError):  # Not empty: in use, or crashes that count.
            self.directory.rmdir()

    def _lock_path(self, worker: str) -> Path:
        return self.directory / f"{worker}.lock"

    def _dead_marks(self, key: str | None, dead: dict[str, bool]) -> Iterator[Path]:
        """Marks of ``key`` (None: of any) that dead workers left and that are young enough to
        count. Fills ``dead``: worker to whether it is dead."""
        with contextlib.suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                worker, dash, marked = entry.name.partition("-")
                if not dash or worker == self.worker or (key is not None and marked != key):
                    continue
                if worker not in dead:
                    dead[worker] = not is_locked(self._lock_path(worker))
                if dead[worker] and not self._is_old(Path(entry.path)):
                    yield Path(entry.path)

    @staticmethod
    def _is_old(path: Path) -> bool:
        try:
            return time.time() - path.stat().st_mtime > FORGET_AFTER_S
        except FileNotFoundError:
            return True

    def _sweep(self) -> None:
        """Removes what dead workers left, except the crashes that still count."""
        dead: dict[str, bool] = {}
        counting = {path.name.partition("-")[0] for path in self._dead_marks(None, dead)}
        for path in list(self.directory.glob("*-*")):
            worker = path.name.partition("-")[0]
            if dead.get(worker) and self._is_old(path):
                path.unlink(missing_ok=True)
        for path in list(self.directory.glob("*.lock")):
            worker = path.stem
            if worker != self.worker and worker not in counting and not is_locked(path):
                path.unlink(missing_ok=True)
