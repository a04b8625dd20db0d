"""Where the engine learns which rows it may use; implemented over the embedding store.

The scheduler asks and leases by key; only the model runner ever sees a tensor (``get``).
Methods are called on the engine's thread and must be quick: no network, no waiting. Whoever
fetches rows does it elsewhere, under the implementation's own lock, and then sends RowsReady.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RowsNote:
    """What happened to rows where the engine lives, for the servicer to know; it pickles."""

    key: str
    seconds: float | None  # That loading them took; None: they were damaged.


class RowSource(Protocol):
    def ready(self, key: str) -> bool:
        """Whether ``get`` would succeed now. Leased rows stay ready once they are."""
        ...

    def can_acquire(self, num_bytes: int) -> bool:
        """Whether leases on so many more bytes fit the tier's budget. Changes nothing."""
        ...

    def acquire(self, key: str, num_bytes: int) -> None:
        """Pins rows that are here or still to come. Called once for a key until ``release``.

        Never fails: the scheduler exceeds the budget for a sequence that would run alone.
        """
        ...

    def release(self, key: str) -> None: ...

    def get(self, key: str) -> Mapping[str, torch.Tensor]:
        """Named tensors, "rows" and perhaps "deepstack.<i>", each [rows, hidden_size], finite.

        For the runner alone. Raises EmbeddingUnavailable, with ``param`` the key.
        """
        ...

    def discard(self, key: str) -> None:
        """Forgets what ``get`` returned, which did not fit its use, and deletes it on this host: it
        is not ready until it has come anew."""
        ...
