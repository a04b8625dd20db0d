"""The SHA-256 of every tensor of a checkpoint: read whole, once, and kept for the next process.

They are kept in ``KEPT`` beside the weights, or in the user's cache directory where that cannot be
written, or where the weights are links into the hub's cache. With them stand each file's size,
times of modification and change, and inode: a file of which one of these differs is read again.
A second process that wants the same waits for the first one's reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opticnerve.checkpoints.tensorfile import TensorEntry
from opticnerve.errors import CheckpointError

KEPT = ".opticnerve-digests.json"
SCHEME = 1
CHUNK_BYTES = 2**20
MAX_THREADS = 8
LEAST_KEPT_BYTES = 64 * 2**20  # Fewer take less time to read than a file is worth.
TOLD_BYTES = 2**30  # Reading so many is told of in the log.
SETTLED_S = 2.0  # A file changed more recently may change again within its time stamp's step.
PATIENCE_S = 600.0  # For another process that reads the same weights.

log = logging.getLogger(__name__)

Kept = dict[str, dict[str, Any]]  # By file name: its "identity", and "tensors" by key.


class Digests:
    """Those of one checkpoint, as far as they were asked for. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def of(self, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
        """64 hex digits by key, of the tensors' bytes. Raises CheckpointError."""
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
    """What is kept, and what has to be read."""
    if sum(entry.num_bytes for entry in entries.values()) < LEAST_KEPT_BYTES:
        return _read(entries)
    files = sorted({entry.file for entry in entries.values()})
    with _alone(files[0].parent):
        started = time.time()
        identities = {file.name: _identity(file) for file in files}
        kept = _load(files, identities)
        known = {
            key: kept[entry.file.name]["tensors"][key]
            for key, entry in entries.items()
            if key in kept.get(entry.file.name, {"tensors": ()})["tensors"]
        }
        missing = {key: entry for key, entry in entries.items() if key not in known}
        if missing:
            known.update(_read(missing))
            newest = max(max(status.st_mtime, status.st_ctime) for status in map(_status, files))
            if newest < started - SETTLED_S:
                for key, entry in missing.items():
                    name = entry.file.name
                    fresh: dict[str, Any] = {"identity": identities[name], "tensors": {}}
                    kept.setdefault(name, fresh)["tensors"][key] = known[key]
                _keep(files, kept)
    return known


# ---- reading


def _read(entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Large tensors first, so that no thread is left with one alone at the end."""
    keys = sorted(entries, key=lambda key: entries[key].num_bytes, reverse=True)
    size = sum(entry.num_bytes for entry in entries.values())
    told = size >= TOLD_BYTES
    if told:
        log.info("reading %.1f GB of weights, to know them from others", size / 1e9)
    started = time.monotonic()
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="digests") as pool:
        found = dict(zip(keys, pool.map(lambda key: _digest(entries[key]), keys), strict=True))
    if told:
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


# ---- keeping


def _status(file: Path) -> os.stat_result:
    return file.stat()  # Of the file itself where the hub's cache has a link.


def _identity(file: Path) -> str:
    status = _status(file)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _places(files: list[Path]) -> Iterator[Path]:
    """Files that may hold what is kept, the first choice first."""
    directory = files[0].parent
    if not any(file.is_symlink() for file in files):
        yield directory / KEPT
    with contextlib.suppress(RuntimeError):
        name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()
        yield cache_directory() / "digests" / f"{name}.json"


def _load(files: list[Path], identities: Mapping[str, str]) -> Kept:
    """What is kept of files that are as they were; nothing of what cannot be read."""
    found: Kept = {}
    for place in _places(files):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(place.read_text(encoding="utf-8"))
            for name, each in _checked(content).items():
                if each["identity"] == identities.get(name):
                    found.setdefault(name, each)
    return found


def _checked(content: Any) -> Kept:
    """``content``, if it is what ``_keep`` writes. Raises ValueError."""
    kept = content.get("files") if isinstance(content, dict) else None
    if not isinstance(kept, dict) or content.get("scheme") != SCHEME:
        raise ValueError("of another version")
    for each in kept.values():
        tensors = each.get("tensors") if isinstance(each, dict) else None
        if not isinstance(tensors, dict) or not isinstance(each.get("identity"), str):
            raise ValueError("damaged")
        if not all(isinstance(digest, str) and len(digest) == 64 for digest in tensors.values()):
            raise ValueError("damaged")
    return kept


def _keep(files: list[Path], kept: Kept) -> None:
    """Where nothing can be written, the next process reads."""
    text = json.dumps({"scheme": SCHEME, "files": kept})
    failure: OSError | None = None
    for place in _places(files):
        try:
            _write(place, text)
            return
        except OSError as error:
            failure = error
    log.warning("the digests of the weights are not kept for the next start: %s", failure)


def _write(place: Path, text: str) -> None:
    """Whole or not at all."""
    if place.name != KEPT:
        place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=KEPT)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)  # Another user's process may serve the same checkpoint.
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits for another process of this machine that reads the weights of ``directory``. Where they
    cannot be told apart, or the other one takes too long, both read."""
    handle = -1
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        _lock(handle)
    except OSError as error:  # A file system without such locks, say.
        log.debug("reading weights without a lock on their directory: %s", error)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _lock(handle: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    told = False
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                log.info("waiting for another process that reads these weights")
                told = True
            time.sleep(0.05)
