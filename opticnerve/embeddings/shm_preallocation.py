"""Files of a shared-memory tier whose memory is allocated before a put needs it.

Most of the cost of a put is the kernel's: finding pages for a new file takes several times as long
as copying bytes into existing pages. So a writer keeps one file ready, as large as its last put,
which a background thread allocates and maps while the caller computes the next embedding. Until it
is published the file is a temporary like any other: invisible, counted, removed with its holder.

The mapping has huge pages where the kernel allows them: a file of 4 KiB pages is read at a third of
memory's speed. Since 6.1 Linux makes huge pages of any tmpfs file on request (MADV_COLLAPSE),
whatever the mount options, but only if address and offset are aligned alike. Python's mmap cannot
choose an address, so libc's is called. Without huge pages, small ones are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opticnerve.embeddings.ledger import Ledger, Temporary
from opticnerve.errors import StoreError

MIN_BYTES = 256 * 2**10  # Below this, a plain write is as fast.
MAX_BYTES = 64 * 2**20
MAX_FRACTION = 1 / 16  # Of the tier's capacity, for one preallocated file.
ROUND_TO = 2**20
PAUSE_S = 0.003  # The next file is made after a pause without puts, which come first.

_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAX_HUGE = 2 * 2**20  # With larger base pages, huge ones are larger than files.

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class PreallocatedFile:
    """A file of ``num_bytes``, allocated and mapped as ``memory``, uint8 [num_bytes].

    ``unmap`` releases the mapping; publishing or abandoning ``temporary`` ends the file. Raises
    StoreError, and OSError (ENOSPC) if the file system has no room, so that writing to ``memory``
    can never end in a SIGBUS.
    """

    def __init__(self, ledger: Ledger, num_bytes: int) -> None:
        reserved = ledger.reserve(num_bytes)
        assert reserved is not None  # Only a key can be there already.
        self.temporary: Temporary = reserved
        huge = _huge_page_bytes()
        self._length = num_bytes + huge
        try:
            self._base = _map(None, self._length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            try:
                self.memory = self._map_file(num_bytes, huge)
            except BaseException:
                _libc.munmap(self._base, self._length)
                raise
        except BaseException:
            ledger.abandon(reserved)
            raise

    def fill(self, pieces: Sequence[memoryview]) -> None:
        """Copies a file's pieces in, from the first byte on."""
        offset = 0
        for piece in pieces:
            source = np.frombuffer(piece, dtype=np.uint8)
            self.memory[offset : offset + piece.nbytes] = source
            offset += piece.nbytes

    def unmap(self) -> None:
        del self.memory
        _libc.munmap(self._base, self._length)

    def _map_file(self, num_bytes: int, huge: int) -> NDArray[np.uint8]:
        fd = self.temporary.fd
        start = self._base if not huge else -(-self._base // huge) * huge
        access = mmap.PROT_READ | mmap.PROT_WRITE
        _map(start, num_bytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd)
        os.posix_fallocate(fd, 0, num_bytes)
        if huge:  # After the allocation. If it fails, pages stay small.
            _libc.madvise(start, num_bytes, _MADV_COLLAPSE)
        block = (ctypes.c_ubyte * num_bytes).from_address(start)
        memory: NDArray[np.uint8] = np.frombuffer(memoryview(block), dtype=np.uint8)
        memory[::4096] = 0  # Brings the pages in.
        return memory


class Preallocator:
    """Keeps one file ready for a writer. Thread-safe; ``close`` releases it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._background = ThreadPoolExecutor(1, thread_name_prefix="store-preallocate")
        self._lock = threading.Lock()  # Guards all below.
        self._ready: PreallocatedFile | None = None
        self._published: list[PreallocatedFile] = []  # Still mapped.
        self._puts = 0
        self._closed = False

    def take(self, num_bytes: int) -> PreallocatedFile | None:
        """The file that is ready, if it has room for ``num_bytes``. Call ``replace`` after the
        put."""
        if not self._serves(num_bytes):
            return None
        with self._lock:
            self._puts += 1
            ready = self._ready
            if ready is None or _too_small(ready, num_bytes):
                return None
            self._ready = None
            return ready

    def replace(self, used: PreallocatedFile | None, num_bytes: int) -> None:
        """After a put of ``num_bytes``: unmaps ``used`` and makes the next, in the background."""
        with self._lock:
            if used is not None:
                self._published.append(used)
            if self._serves(num_bytes) and not self._closed:
                wanted = -(-num_bytes // ROUND_TO) * ROUND_TO
                self._background.submit(self._prepare, wanted, self._puts)

    def settle(self) -> None:
        """Waits for the background work; for measurements and tests."""
        self._background.submit(int).result()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._background.shutdown()
        for file in self._published:
            file.unmap()
        self._discard(self._ready)

    def _serves(self, num_bytes: int) -> bool:
        return MIN_BYTES <= num_bytes <= min(MAX_BYTES, self._ledger.capacity * MAX_FRACTION)

    # ---- the background thread

    def _prepare(self, num_bytes: int, puts: int) -> None:
        if self._is_outdated(puts):
            return
        time.sleep(PAUSE_S)
        if self._is_outdated(puts):
            return
        with self._lock:
            published, self._published = self._published, []
            small = self._ready
            if small is not None and not _too_small(small, num_bytes):
                small, num_bytes = None, 0
            else:
                self._ready = None
        for file in published:
            file.unmap()
        self._discard(small)
        if num_bytes:
            with contextlib.suppress(StoreError, OSError):  # Then puts write plainly.
                made = PreallocatedFile(self._ledger, num_bytes)
                with self._lock:
                    self._ready = made

    def _is_outdated(self, puts: int) -> bool:
        """Whether another put has begun, after which the next file will be made, or all is
        closed."""
        with self._lock:
            return self._closed or self._puts != puts

    def _discard(self, file: PreallocatedFile | None) -> None:
        if file is not None:
            file.unmap()
            self._ledger.abandon(file.temporary)


def _too_small(file: PreallocatedFile, num_bytes: int) -> bool:
    return file.temporary.num_bytes < num_bytes


def _huge_page_bytes() -> int:
    """Size of the kernel's huge pages; 0 if there are none, or too large ones."""
    try:
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if size <= _MAX_HUGE else 0


def _map(address: int | None, length: int, access: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, length, access, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
