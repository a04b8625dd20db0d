"""The SHA-256 of every tensor of a checkpoint, computed once and recorded for the next process.

The record is the file ``RECORD`` beside the weights, or, if that cannot be written or the weights
are links into the hub's cache, a file in the user's cache directory. It holds each weight file's
size, mtime, ctime and inode; a file for which one of these differs is read again. A second process
that needs the same digests waits for the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opticnerve.errors import CheckpointError
from opticnerve.replace_file import replace_file
from opticnerve.tensors.header import TensorEntry

RECORD = ".opticnerve-digests.json"
SCHEME = 1
CHUNK_BYTES = 2**20
MAX_THREADS = 8
MIN_RECORDED_BYTES = 64 * 2**20  # Below, reading is as fast as a record.
LOGGED_BYTES = 2**30  # From here on reading is logged.
SETTLED_S = 2.0  # A file changed later may change again without a new time stamp.
LOCK_TIMEOUT_S = 600.0  # For another process that reads the same weights.

log = logging.getLogger(__name__)

Record = dict[str, dict[str, Any]]  # File name -> "identity", and "tensors": digests by key.


class Digests:
    """Digests of one checkpoint's tensors, computed when first asked for. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def of(self, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
        """Digests of the tensors' bytes by key, 64 hex digits each. Raises CheckpointError."""
        with self._lock:
            missing = {key: entry for key, entry in entries.items() if key not in self._known}
            try:
                self._known.update(_find(missing))
            except OSError as error:
                raise CheckpointError(f"cannot read the weights: {error}") from error
            return {key: self._known[key] for key in entries}


def cache_directory() -> Path:
    """``OPTICNERVE_CACHE_DIR``, or ``opticnerve`` in the user's cache directory. Raises
    RuntimeError where there is no home directory."""
    given = os.environ.get("OPTICNERVE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opticnerve"


def _find(entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Digests from the record; missing ones are computed and recorded."""
    if sum(entry.num_bytes for entry in entries.values()) < MIN_RECORDED_BYTES:
        return _read(entries)
    files = sorted({entry.file for entry in entries.values()})
    with _locked(files[0].parent):
        started = time.time()
        identities = {file.name: _identity(file) for file in files}
        record = _load(files, identities)
        known = {
            key: record[entry.file.name]["tensors"][key]
            for key, entry in entries.items()
            if key in record.get(entry.file.name, {"tensors": ()})["tensors"]
        }
        missing = {key: entry for key, entry in entries.items() if key not in known}
        kept = True
        for file, group in _by_file(missing):
            digests = _read(group)
            known.update(digests)
            if kept and _newest_change(files) < started - SETTLED_S:
                fresh: dict[str, Any] = {"identity": identities[file.name], "tensors": {}}
                record.setdefault(file.name, fresh)["tensors"].update(digests)
                kept = _save(files, record)  # After each file, in case the process ends.
    return known


def _by_file(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[Path, dict[str, TensorEntry]]]:
    files = sorted({entry.file for entry in entries.values()})
    for file in files:
        yield file, {key: entry for key, entry in entries.items() if entry.file == file}


def _newest_change(files: Iterable[Path]) -> float:
    return max(max(status.st_mtime, status.st_ctime) for status in map(Path.stat, files))


# ---- reading


def _read(entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Computes digests on threads, large tensors first, so that the threads end together."""
    keys = sorted(entries, key=lambda key: entries[key].num_bytes, reverse=True)
    size = sum(entry.num_bytes for entry in entries.values())
    logged = size >= LOGGED_BYTES
    if logged:
        log.info("reading %.1f GB of weights, to identify them", size / 1e9)
    started = time.monotonic()
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="digests") as pool:
        found = dict(zip(keys, pool.map(lambda key: _digest(entries[key]), keys), strict=True))
    if logged:
        seconds = time.monotonic() - started
        log.info("read them in %.1f s (%.2f s a gigabyte)", seconds, seconds / size * 1e9)
    return found


def _digest(entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.num_bytes)))
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start)
        left = entry.num_bytes
        while left:
            count = stream.readinto(buffer[:left])
            if not count:
                raise CheckpointError(f"{entry.file} was cut short while it was read")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


# ---- the record


def _identity(file: Path) -> str:
    status = file.stat()  # Follows links of the hub's cache.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _places(files: list[Path]) -> Iterator[Path]:
    """Files that may hold the record, the first choice first."""
    directory = files[0].parent
    if not any(file.is_symlink() for file in files):
        yield directory / RECORD
    with contextlib.suppress(RuntimeError):
        name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()
        yield cache_directory() / "digests" / f"{name}.json"


def _load(files: list[Path], identities: Mapping[str, str]) -> Record:
    """The records of files that have not changed. Ignores records that cannot be read."""
    found: Record = {}
    for place in _places(files):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(place.read_text(encoding="utf-8"))
            for name, each in _checked(content).items():
                if each["identity"] == identities.get(name):
                    found.setdefault(name, each)
    return found


def _checked(content: Any) -> Record:
    """``content``, if it is what ``_save`` writes. Raises ValueError."""
    record = content.get("files") if isinstance(content, dict) else None
    if not isinstance(record, dict) or content.get("scheme") != SCHEME:
        raise ValueError("of another version")
    for each in record.values():
        tensors = each.get("tensors") if isinstance(each, dict) else None
        if not isinstance(tensors, dict) or not isinstance(each.get("identity"), str):
            raise ValueError("damaged")
        if not all(isinstance(digest, str) and len(digest) == 64 for digest in tensors.values()):
            raise ValueError("damaged")
    return record


def _save(files: list[Path], record: Record) -> bool:
    """Writes the record, and returns whether it could."""
    text = json.dumps({"scheme": SCHEME, "files": record})
    failure: OSError | None = None
    for place in _places(files):
        try:
            replace_file(place, text.encode())
            return True
        except OSError as error:
            failure = error
    log.warning(
        "cannot record the digests of the weights, so the next start reads them again: %s", failure
    )
    return False


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets only one process of this machine read the weights of ``directory`` at a time. If there
    can be no lock, or the other process takes too long, both read."""
    handle = -1
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        _lock(handle)
    except OSError as error:  # Such as a file system without locks.
        log.debug("reading weights without a lock on their directory: %s", error)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _lock(handle: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    logged = False
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not logged:
                log.info("waiting for another process that reads these weights")
                logged = True
            time.sleep(0.05)
