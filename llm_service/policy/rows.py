"""Which rows the engine may use; implemented over the embedding store.

The scheduler asks and leases by key; only the model runner ever sees a tensor (``get``). Both call
on the engine's thread, where every method is a look-up: no file, no network, no waiting. Rows are
loaded and checked on another thread (``load``), before the engine is sent RowsReady.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class RowSource(Protocol):
    def ready(self, key: str) -> bool:
        """Whether ``get`` would succeed now. Leased rows stay ready once they are loaded."""
        ...

    def can_acquire(self, num_bytes: int) -> bool:
        """Whether leases on so many more bytes fit the tier's budget, as last known."""
        ...

    def acquire(self, key: str, num_bytes: int) -> None:
        """Pins rows that are here or still to come. Called once for a key until ``release``.

        Never fails: the scheduler exceeds the budget for a sequence that would run alone.
        """
        ...

    def release(self, key: str) -> None:
        """Drops the loaded rows with the lease."""
        ...

    def get(self, key: str) -> Mapping[str, torch.Tensor]:
        """Named tensors, "rows" and perhaps "deepstack.<i>", each [rows, hidden_size], finite.

        For the runner alone. Raises EmbeddingUnavailable, with ``param`` the key.
        """
        ...

    def discard(self, key: str) -> None:
        """Forgets what ``get`` returned, which did not fit its use, and deletes it on this host: it
        is not ready until it has been loaded anew."""
        ...

    def load(self, key: str) -> bool:
        """Makes leased rows ready if this host has them; whether it has. Not for the engine's
        thread: reads files."""
        ...
