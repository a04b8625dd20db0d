"""Which rows the engine may use, and the leases that sequences hold on them.

``RowSource`` is implemented over the embedding store. The scheduler asks for rows and leases them
by key; only the model runner ever sees a tensor (``get``). Both run on the engine's thread, where
every method is a look-up: no file, no network, no waiting. Another thread loads and checks rows
(``load``) before RowsReady is sent to the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from llm_service.policy.sequence import Sequence

if TYPE_CHECKING:
    import torch


class RowSource(Protocol):
    def ready(self, key: str) -> bool:
        """Whether ``get`` would succeed now. Leased rows stay ready once they are loaded."""
        ...

    def can_acquire(self, num_bytes: int) -> bool:
        """Whether leases on ``num_bytes`` more fit the tier's budget, as last measured."""
        ...

    def acquire(self, key: str, num_bytes: int) -> None:
        """Pins rows that are here or will arrive. Called once for a key until ``release``.

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
        """Forgets rows that ``get`` returned but that the model cannot use, and deletes them on
        this host. The key is not ready until its rows are loaded again."""
        ...

    def load(self, key: str) -> bool:
        """Makes leased rows ready if this host has them; returns whether it has. Reads files, so it
        must not be called on the engine's thread."""
        ...


class Leases:
    """Counts the sequences that hold each item. A running sequence holds an item until the last of
    its spans that use the item is computed."""

    def __init__(self, rows: RowSource, row_bytes: int) -> None:
        self._rows = rows
        self._row_bytes = row_bytes
        self._holders: Counter[str] = Counter()

    def items(self, seq: Sequence, computed: int) -> dict[str, tuple[int, int]]:
        """(end of its last span, bytes) of each item that has tokens past ``computed``."""
        request = seq.request
        items: dict[str, tuple[int, int]] = {}
        for index in range(seq.generation.span_at(computed), len(request.spans)):
            span = request.spans[index]
            key = request.items[span.item]
            size = (span.row_start + span.num_tokens) * self._row_bytes
            known = items.get(key, (0, 0))[1]
            items[key] = (span.token_offset + span.num_tokens, max(known, size))
        return items

    def fit(self, items: dict[str, tuple[int, int]]) -> bool:
        """Whether the tier has room for ``items``. While no lease is held, any size fits."""
        fresh = [size for key, (_, size) in items.items() if key not in self._holders]
        return not (self._holders and fresh) or self._rows.can_acquire(sum(fresh))

    def take(self, seq: Sequence) -> None:
        """Acquires the items that the tokens left to compute need."""
        for key, (end, num_bytes) in self.items(seq, seq.num_computed).items():
            seq.leases[key] = end
            self._holders[key] += 1
            if self._holders[key] == 1:
                self._rows.acquire(key, num_bytes)

    def release(self, seq: Sequence, computed: int | None = None) -> None:
        """Releases the items whose last span ends by ``computed``; None: all."""
        ended = [key for key, end in seq.leases.items() if computed is None or end <= computed]
        for key in ended:
            del seq.leases[key]
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._rows.release(key)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises RuntimeError unless ``sequences`` hold what is counted."""
        held = Counter(key for seq in sequences for key in seq.leases)
        if held != self._holders:
            raise RuntimeError(f"leases held {held}, counted {self._holders}")
