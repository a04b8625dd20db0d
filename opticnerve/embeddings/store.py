"""The embedding store's interface; ``open_store`` (``opticnerve.embeddings.open``) picks a backend.

=============================  =================================================================
``memory://``                  a dictionary of this process; tests and single-process use
``shm://[dir][?capacity=]``    safetensors files on tmpfs, shared by the processes of one machine
``redis://`` ``rediss://``     the same bytes in Redis, with a local tier of what was fetched
=============================  =================================================================

A store holds whole embeddings by content key (64 lowercase hex digits; other keys are an
InvalidRequest). ``get`` returns None for a miss, and also if the backend is down (which is logged).
An unreadable entry is deleted everywhere and raised as EmbeddingCorrupt once; the next ``get``
misses. A failed write is a StoreError, which the caller may ignore: the embedding can still be had
by Fetch.

Stores are synchronous and safe to share between threads; callers keep them off event loops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opticnerve.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check_key(key: str) -> str:
    """``key``, if it is a content key. Raises InvalidRequest: keys become file names."""
    if not _KEY.fullmatch(key):
        raise InvalidRequest("an embedding's key is 64 lowercase hex digits", param="key")
    return key


class Entry:
    """What ``get`` returns: named tensors on the CPU, mapped without a copy if the backend can.

    Tensors are private to the reader (copy-on-write): writing to them changes nobody else's.
    ``meta``: the string metadata of the safetensors header.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
        self._tensors = tensors
        self.meta = meta

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Raises EmbeddingCorrupt if the file changed after ``get``, OSError if there is no memory
        to map it. Neither deletes anything."""
        return self._tensors

    def copy_rows(self, name: str, out: torch.Tensor, row_start: int = 0) -> None:
        """Copies rows ``[row_start, row_start + len(out))`` of one tensor into ``out``, which has
        as many columns. The fastest way to use rows once. Raises KeyError, ValueError."""
        source = self.tensors[name]
        check_rows(tuple(source.shape), tuple(out.shape), row_start)
        out.copy_(source[row_start : row_start + out.shape[0]])


def check_rows(source: tuple[int, ...], out: tuple[int, ...], row_start: int) -> None:
    """Raises ValueError unless ``source`` has rows from ``row_start`` on that fill ``out``."""
    if not out or source[1:] != out[1:] or not 0 <= row_start <= source[0] - out[0]:
        raise ValueError(f"rows {row_start}.. of {list(source)} do not fill {list(out)}")


@dataclass(frozen=True)
class StoreState:
    """A store's state for /health. If not ``reachable``, look-ups miss and embeddings travel by
    Fetch."""

    kind: str  # "memory", "shm" or "redis".
    reachable: bool = True
    key_id: str = ""  # Id of the secret in --store-key-file; empty: none.


class Store(Protocol):
    tier_id: str  # Random id of the local shared-memory tier; "" if there is none.
    shared: bool  # Whether other machines can read from it (Redis).

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
        """Stores an embedding completely or not at all; the first writer of a key wins. Tensors
        may be any objects with DLPack export. Raises StoreError/StoreFull, InvalidRequest."""
        ...

    def get(self, key: str) -> Entry | None:
        """Raises EmbeddingCorrupt, after deleting an unreadable entry."""
        ...

    def contains(self, keys: Iterable[str]) -> set[str]:
        """The ``keys`` that are stored now; they may be evicted before a ``get``."""
        ...

    def read_bytes(self, key: str) -> bytes | None:
        """The safetensors bytes as stored, for Fetch. Raises EmbeddingCorrupt like ``get``."""
        ...

    def put_bytes(self, key: str, data: bytes) -> None:
        """Stores safetensors bytes, after checking that they parse.
        Raises EmbeddingCorrupt, StoreError/StoreFull."""
        ...

    def lease(self, key: str, num_bytes: int) -> AbstractContextManager[None]:
        """Pins ``key`` in the local tier, whether it is stored yet or not, until the context ends.
        Pinned bytes count against the tier's capacity; entering raises StoreFull if they exceed
        it."""
        ...

    def leasable_bytes(self) -> int:
        """Bytes of the local tier's capacity that are left for leases of any process."""
        ...

    def delete(self, key: str) -> None:
        """Deletes ``key``, such as a corrupt file. Not an error if it is not stored."""
        ...

    @property
    def state(self) -> StoreState:
        """The last known state, without I/O."""
        ...

    def stored_bytes(self) -> int:
        """Bytes in the local tier, of all its writers; for metrics. Raises StoreError."""
        ...

    def close(self) -> None: ...
