"""Leases on items' rows: counted by sequence, taken and released at the RowSource."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llm_service.policy.rows import RowSource
from llm_service.policy.sequence import Sequence


class Leases:
    """A running sequence holds an item until its last span of it is computed."""

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
        """Whether the tier has room for ``items``. If nobody holds a lease, any size may try."""
        fresh = [size for key, (_, size) in items.items() if key not in self._holders]
        return not (self._holders and fresh) or self._rows.can_acquire(sum(fresh))

    def take(self, seq: Sequence) -> None:
        """Acquires the items that ``seq`` has still to compute from."""
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
