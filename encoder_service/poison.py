"""Remembers, over the death of processes, which items were in work when a worker died.

A picture that crashes a decoder or a driver kills its worker; the retry kills the next one. So
each worker leaves an empty file ``<worker>-<key>`` while it decodes or encodes an item, and holds
a lock on its file ``<worker>.lock`` as long as it lives. A file whose worker's lock is free is a
death in that item's name. After one death the item runs alone, so that no bystander of its batch
is suspected with it; after two it is refused; a success clears its name, and so does an hour.

The directory is shared by the workers of one machine. Where it cannot be written, nothing is
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

from opticnerve.embeddings.tier import is_locked, make_private
from opticnerve.errors import PoisonousItem, StoreError

log = logging.getLogger(__name__)

MAX_DEATHS = 2
FORGET_AFTER_S = 3600.0


class PoisonRecord:
    """One worker's view of the record. ``close`` takes its own traces away."""

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
        """Makes the lock's file appear locked, so that no sweep takes it for a dead worker's."""
        new = self.directory / f"{self.worker}.new"
        handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self._lock_path(self.worker))
        return handle

    def deaths(self, key: str) -> int:
        """How many workers died while this item was in work."""
        dead: dict[str, bool] = {}
        return sum(1 for _ in self._dead_marks(key, dead))

    def check(self, key: str) -> int:
        """The item's deaths. Raises PoisonousItem when they are too many."""
        deaths = self.deaths(key)
        if deaths >= MAX_DEATHS:
            raise PoisonousItem(
                f"encoding this item ended {deaths} workers; it is refused. Send another file"
            )
        return deaths

    @contextlib.contextmanager
    def working_on(self, keys: Iterable[str]) -> Iterator[None]:
        """Marks ``keys`` as in work while the context lasts."""
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

    def blame(self, key: str) -> None:
        """Records a death in this item's name of a process that worked for this worker."""
        if self.active:
            nobody = secrets.token_hex(8)  # Whose lock is free.
            with contextlib.suppress(OSError):
                mark = self.directory / f"{nobody}-{key}"
                os.close(os.open(mark, os.O_CREAT | os.O_WRONLY, 0o600))

    def absolve(self, key: str) -> None:
        """The item was encoded after all: forgets the deaths in its name."""
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
        with contextlib.suppress(OSError):  # Not empty: others live here, or deaths are recorded.
            self.directory.rmdir()

    def _lock_path(self, worker: str) -> Path:
        return self.directory / f"{worker}.lock"

    def _dead_marks(self, key: str | None, dead: dict[str, bool]) -> Iterator[Path]:
        """Marks of ``key`` (None: of any) left by workers that are no more, young enough."""
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
        """Removes what dead workers left, except deaths that still count."""
        dead: dict[str, bool] = {}
        keep = {path.name.partition("-")[0] for path in self._dead_marks(None, dead)}
        for path in list(self.directory.glob("*-*")):
            worker = path.name.partition("-")[0]
            if dead.get(worker) and self._is_old(path):
                path.unlink(missing_ok=True)
        for path in list(self.directory.glob("*.lock")):
            worker = path.stem
            if worker != self.worker and worker not in keep and not is_locked(path):
                path.unlink(missing_ok=True)
