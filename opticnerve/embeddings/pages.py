"""A writable mapping of a tmpfs file, in huge pages where the kernel gives them.

A file that is made of 4 KiB pages is read at a third of memory's speed, most of it spent on
finding pages. Linux makes huge pages of any tmpfs file on request (MADV_COLLAPSE, 6.1 and later),
whatever the mount says, but only where address and offset are aligned alike, and Python's mmap
cannot choose an address: hence libc. Where there are no huge pages, small ones serve.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAX_HUGE = 2 * 2**20  # Kernels with larger base pages have huge ones that are larger than files.

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


def huge_page_bytes() -> int:
    """Size of the kernel's huge pages; 0 where there are none that fit."""
    try:
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if size <= _MAX_HUGE else 0


class Pages:
    """The first ``num_bytes`` of an open file as ``memory``, uint8 [num_bytes], all allocated.

    ``unmap`` releases it, after which ``memory`` is gone. Raises OSError (ENOSPC) where the file
    system has no room: nothing that is written here can end in a SIGBUS.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        huge = huge_page_bytes()
        self._length = num_bytes + huge
        self._base = _map(None, self._length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        try:
            start = self._base if not huge else -(-self._base // huge) * huge
            access = mmap.PROT_READ | mmap.PROT_WRITE
            _map(start, num_bytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd)
            os.posix_fallocate(fd, 0, num_bytes)
            if huge:  # Of allocated pages only. May fail: then they stay small.
                _libc.madvise(start, num_bytes, _MADV_COLLAPSE)
        except BaseException:
            _libc.munmap(self._base, self._length)
            raise
        block = (ctypes.c_ubyte * num_bytes).from_address(start)
        self.memory: NDArray[np.uint8] = np.frombuffer(memoryview(block), dtype=np.uint8)
        self.memory[::4096] = 0  # Brings the pages in.

    def unmap(self) -> None:
        del self.memory
        _libc.munmap(self._base, self._length)


def _map(address: int | None, length: int, access: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, length, access, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
