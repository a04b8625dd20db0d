"""``shm://``: content-addressed safetensors files on tmpfs, shared by the processes of a machine.

A file is written under a temporary name, with write(2) (so that a full tmpfs is a StoreFull, never
a SIGBUS) or into preallocated memory (``shm_preallocation``), then linked to its key: readers see
whole files or none, and the first writer wins. Readers map copy-on-write. Unlinking is safe, since
a mapped file lives as long as its mapping. The ledger decides what is evicted, and when.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from opticnerve.embeddings import codec
from opticnerve.embeddings.ledger import Ledger, Temporary, translated
from opticnerve.embeddings.shm_preallocation import Preallocator
from opticnerve.embeddings.store import Entry, StoreState, check_key, check_rows
from opticnerve.errors import EmbeddingCorrupt, StoreError, StoreFull
from opticnerve.owned_directories import default_directory
from opticnerve.telemetry.metrics import EMBEDDING_BYTES, STORE_FAILURES
from opticnerve.tensors.dtypes import FLOATING

MAX_CAPACITY = 2 * 2**30
SMALL_CAPACITY = 256 * 2**20
HEADER_GUESS = 4096  # Bytes of the first read, which hold nearly every header.

log = logging.getLogger(__name__)


class ShmStore:
    """A tier in ``directory``; None: the one that this user's services share by default.

    ``capacity`` in bytes; None: min(2 GiB, half the file system). Raises StoreError.
    """

    shared = False

    def __init__(self, directory: Path | None = None, capacity: int | None = None) -> None:
        self.directory = directory or default_directory()
        self.capacity = _default_capacity(self.directory) if capacity is None else capacity
        self._ledger = Ledger(self.directory, self.capacity, shared_default=directory is None)
        self._preallocator = Preallocator(self._ledger)
        self.tier_id = self._ledger.id

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
        if self._is_here(key):
            return
        self._write(key, codec.encode(tensors, meta))

    def put_bytes(self, key: str, data: bytes) -> None:
        codec.header_of(data, len(data))
        if not self._is_here(key):
            self._write(key, [memoryview(data)])

    def get(self, key: str) -> Entry | None:
        fd = self._open(key)
        if fd is None:
            return None
        try:
            header = _read_header(fd)
        except EmbeddingCorrupt:
            os.close(fd)
            self._forget(key)
            raise
        return MappedEntry(fd, header)

    def contains(self, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if os.path.exists(self._ledger.path(check_key(key)))}

    def read_bytes(self, key: str) -> bytes | None:
        fd = self._open(key)
        if fd is None:
            return None
        try:
            data = _read_file(fd)
            codec.header_of(data, len(data))
        except EmbeddingCorrupt:
            self._forget(key)
            raise
        return data

    def lease(self, key: str, num_bytes: int) -> AbstractContextManager[None]:
        return self._lease(check_key(key), num_bytes)

    @contextlib.contextmanager
    def _lease(self, key: str, num_bytes: int) -> Iterator[None]:
        self._ledger.pin(key, num_bytes)
        try:
            yield
        finally:
            self._ledger.unpin(key)

    def leasable_bytes(self) -> int:
        return self._ledger.unpinned_bytes()

    def delete(self, key: str) -> None:
        self._ledger.remove(check_key(key))

    @property
    def state(self) -> StoreState:
        return StoreState("shm")

    def stored_bytes(self) -> int:
        """Bytes of all files in the tier."""
        return self._ledger.stored_bytes()

    def settle(self) -> None:
        """Waits for the next file to be preallocated; for measurements and tests."""
        self._preallocator.settle()

    def close(self) -> None:
        self._preallocator.close()
        self._ledger.close()

    def _is_here(self, key: str) -> bool:
        return self._ledger.touch(self._ledger.path(check_key(key)))

    def _open(self, key: str) -> int | None:
        try:
            # Without O_NONBLOCK, a pipe of that name would block until it has a writer.
            fd = os.open(self._ledger.path(check_key(key)), os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:  # For example, no file descriptors left.
            log.warning("an embedding's file cannot be opened: %s", error.strerror)
            return None
        self._ledger.touch(fd)
        return fd

    def _forget(self, key: str) -> None:
        """Deletes a corrupt file. If that fails, the next reader finds it corrupt too."""
        try:
            self.delete(key)
        except StoreError as error:
            log.warning("a corrupt embedding could not be deleted: %s", error.message)

    def _write(self, key: str, pieces: Sequence[memoryview]) -> None:
        num_bytes = codec.num_bytes(pieces)
        try:
            self._write_somehow(key, pieces, num_bytes)
        except StoreError:
            STORE_FAILURES.labels("shm").inc()
            raise
        EMBEDDING_BYTES.labels("shm", "written").inc(num_bytes)

    def _write_somehow(self, key: str, pieces: Sequence[memoryview], num_bytes: int) -> None:
        """Writes into a preallocated file if there is one, else into a new one."""
        file = self._preallocator.take(num_bytes)
        try:
            if file is not None:
                file.fill(pieces)
                self._ledger.publish(file.temporary, key, num_bytes)
                return
            try:
                self._write_plainly(key, pieces, num_bytes)
            except StoreFull as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                self._ledger.make_room(num_bytes)  # Other programs have filled the tmpfs.
                self._write_plainly(key, pieces, num_bytes)
        finally:
            self._preallocator.replace(file, num_bytes)

    def _write_plainly(self, key: str, pieces: Sequence[memoryview], num_bytes: int) -> None:
        temporary = self._ledger.reserve(num_bytes, key)
        if temporary is None:
            return
        try:
            _write_all(temporary, pieces)
        except OSError as error:
            self._ledger.abandon(temporary)
            raise translated(error) from error
        self._ledger.publish(temporary, key, num_bytes)


class MappedEntry(Entry):
    """An entry whose file is mapped on the first access to its tensors.

    ``copy_rows`` reads the file instead, which for rows that are used once is faster than mapping
    every page.
    """

    def __init__(self, fd: int, header: codec.Header) -> None:
        super().__init__({}, header.meta)
        self._fd = fd  # -1 once it is mapped.
        self._header = header

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        if self._fd >= 0:
            with codec.reading():  # The file may have been cut meanwhile.
                mapped = mmap.mmap(
                    self._fd,
                    self._header.num_bytes,
                    flags=mmap.MAP_PRIVATE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            self._tensors = codec.views(mapped, self._header)
            os.close(self._fd)
            self._fd = -1
        return self._tensors

    def copy_rows(self, name: str, out: torch.Tensor, row_start: int = 0) -> None:
        spec, offset = self._header.find(name)
        check_rows(spec.shape, tuple(out.shape), row_start)
        plain = out.device.type == "cpu" and out.is_contiguous() and out.numel() > 0
        if not plain or out.dim() == 0 or out.dtype != FLOATING[spec.dtype] or self._fd < 0:
            super().copy_rows(name, out, row_start)
            return
        row_bytes = spec.num_bytes // spec.shape[0]
        target = out.view(torch.uint8).numpy()
        _read_all(self._fd, memoryview(target).cast("B"), offset + row_start * row_bytes)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _read_header(fd: int) -> codec.Header:
    """The checked header of an open file. Raises EmbeddingCorrupt."""
    with _readable():
        size = os.fstat(fd).st_size
        start = os.pread(fd, HEADER_GUESS, 0)
        span = codec.header_span(start)
        if span > len(start):
            start = os.pread(fd, span, 0)
    return codec.header_of(start, size)


def _read_file(fd: int) -> bytes:
    """Reads all of an open file and closes it. Raises EmbeddingCorrupt."""
    try:
        with _readable(), os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turns OSError into EmbeddingCorrupt: a file that cannot be read (a directory, a bad page) is
    deleted like wrong data."""
    try:
        yield
    except OSError as error:
        raise EmbeddingCorrupt(f"the embedding cannot be read: {error.strerror}") from error


def _write_all(temporary: Temporary, pieces: Sequence[memoryview]) -> None:
    left = [piece.cast("B") for piece in pieces if piece.nbytes]
    while left:
        written = os.writev(temporary.fd, left[:64])
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if left:
            left[0] = left[0][written:]


def _read_all(fd: int, target: memoryview, offset: int) -> None:
    while target:
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise EmbeddingCorrupt("the embedding's file was cut while it was read")
        target, offset = target[count:], offset + count


def _default_capacity(path: Path) -> int:
    existing = path if path.exists() else path.parent
    while not existing.exists():
        existing = existing.parent
    status = os.statvfs(existing)
    capacity = min(MAX_CAPACITY, status.f_blocks * status.f_frsize // 2)
    if capacity < SMALL_CAPACITY:
        log.warning(
            "the embedding store at %s holds only %d MiB; give it a larger tmpfs "
            "(--shm-size in containers) or name a directory: shm:///dir?capacity=2GiB",
            existing,
            capacity // 2**20,
        )
    return capacity
