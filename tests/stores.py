"""What tests of stores put into them."""

from __future__ import annotations

import torch

from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.embeddings.store import Entry

KIB = 1024
MIB = 2**20
Local = ShmStore | MemoryStore


def key(number: int) -> str:
    return f"{number:064x}"


def rows(number: int, kib: int = 16) -> dict[str, torch.Tensor]:
    return {"rows": torch.full((kib, 512), float(number)).bfloat16()}  # 1 KiB a row.


def fetched(store: Local, number: int) -> Entry:
    entry = store.get(key(number))
    assert entry is not None
    return entry
