"""What a worker's results depend on, in 64 hex digits.

An encoder's fingerprint covers everything that decides a row: configuration, processor settings,
every byte of the tower's and projector's tensors, output dtype, backend and precision. Reading
those bytes takes a second a gigabyte, so their digest is kept in the cache directory, under the
identity (path, size, modification time, inode) of the files that hold them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from opticnerve.errors import CheckpointError
from opticnerve.models.loader import wanted
from opticnerve.models.registry import make_layout

if TYPE_CHECKING:
    from opticnerve.models.checkpoint import Checkpoint
    from opticnerve.models.family import Language, Tower
    from opticnerve.models.tensorfile import TensorEntry

SCHEME = "opticnerve-fingerprint-1"
CHUNK_BYTES = 4 * 2**20
SETTLED_S = 2.0  # A file changed more recently may change again within its time stamp's step.

log = logging.getLogger(__name__)


def fingerprint(
    checkpoint: Checkpoint, tower: Tower, backend: str, precision: str | None = None
) -> str:
    """The encoder's: equal fingerprints give equal rows, to tolerance.

    ``precision`` is the backend's, where it differs from the output dtype.
    """
    dtype = str(tower.dtype).removeprefix("torch.")
    vision = importlib.import_module(f"opticnerve.models.{checkpoint.family}.vision")
    entries = checkpoint.tensor_index(wanted(vision.KEY_MAP))
    settings = make_layout(checkpoint).settings()
    return _hash(
        SCHEME,
        "encoder",
        _canonical(checkpoint.config),
        _canonical(checkpoint.processor_config),
        _canonical(settings),
        tensor_digest(entries),
        dtype,
        backend,
        precision or dtype,
    )


def language_fingerprint(checkpoint: Checkpoint, language: Language) -> str:
    """The LLM worker's. Cheap: of the weights it covers what ``Checkpoint.pair_id`` does."""
    dtype = str(language.dtype).removeprefix("torch.")
    return _hash(SCHEME, "llm", _canonical(checkpoint.config), checkpoint.pair_id, dtype)


def tensor_digest(entries: Mapping[str, TensorEntry]) -> str:
    """SHA-256 of tensors: keys, types, shapes and bytes. The same however they are sharded."""
    files = sorted({entry.file for entry in entries.values()})
    identity = _hash(SCHEME, *sorted(entries), *(_file_identity(file) for file in files))
    kept = _kept(identity)
    if kept is not None:
        return kept
    started = time.time()
    digest = _read_digest(entries)
    newest = max((file.stat().st_mtime for file in files), default=0.0)
    if newest < started - SETTLED_S:
        _keep(identity, digest)
    return digest


def cache_directory() -> Path:
    """``OPTICNERVE_CACHE_DIR``, or ``opticnerve`` in the user's cache directory."""
    given = os.environ.get("OPTICNERVE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opticnerve"


def _read_digest(entries: Mapping[str, TensorEntry]) -> str:
    digest = hashlib.sha256()
    for key, entry in sorted(entries.items()):
        digest.update(_hash(key, entry.dtype, str(entry.shape)).encode())
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            left = entry.num_bytes
            while left:
                part = stream.read(min(left, CHUNK_BYTES))
                if not part:
                    raise CheckpointError(f"{entry.file} was cut short while it was read")
                digest.update(part)
                left -= len(part)
    return digest.hexdigest()


def _file_identity(file: Path) -> str:
    status = file.stat()  # Of the file itself where the hub's cache has a link.
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _kept(identity: str) -> str | None:
    """The digest that an earlier start left; None when there is none that can be read."""
    try:
        digest = (cache_directory() / "digests" / identity).read_text(encoding="ascii").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home directory.
        return None
    is_digest = len(digest) == 64 and all(char in "0123456789abcdef" for char in digest)
    return digest if is_digest else None


def _keep(identity: str, digest: str) -> None:
    """Whole or not at all. A cache that cannot be written costs time at the next start only."""
    try:
        directory = cache_directory() / "digests"
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(digest)
            os.replace(name, directory / identity)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, RuntimeError) as error:
        log.warning("the digest of the weights is not cached: %s", error)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{value!r} cannot be part of a fingerprint")


def _hash(*parts: str) -> str:
    """Length before content: no two lists of parts look alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
