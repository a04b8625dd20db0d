"""Host-side state of each running sequence, by slot: pages and positions. numpy, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_service.policy.sequence import Sequence

if TYPE_CHECKING:
    from opticnerve.models.family import Layout


class SlotTable:
    """Arrays over slots, so that a step of decoding sequences is a few vectorised look-ups.

    ``delta``: position minus index of a token past the prompt. ``pages``: the block tables, written
    as they grow.
    """

    def __init__(self, num_slots: int, max_pages: int, layout: Layout) -> None:
        self._layout = layout
        self.position_dims = layout.position_dims
        self.delta = np.zeros(num_slots, dtype=np.int64)
        self.pages = np.zeros((num_slots, max_pages), dtype=np.int64)
        self._sequences: list[Sequence | None] = [None] * num_slots
        self._tables: list[tuple[int, ...]] = [()] * num_slots
        self._positions: list[NDArray[np.int64]] = [np.zeros((1, 0), dtype=np.int64)] * num_slots
        self._placeholders: dict[int, NDArray[np.bool_]] = {}

    def holds(self, slot: int, seq: Sequence) -> bool:
        return self._sequences[slot] is seq

    def admit(self, slot: int, seq: Sequence) -> None:
        """Computes the prompt's positions, once. Raises what the layout raises."""
        positions, delta = self._layout.positions(seq.num_prompt, seq.request.spans)
        self._positions[slot] = positions
        self.delta[slot] = delta
        self._tables[slot] = ()
        self._sequences[slot] = seq

    def release(self, slot: int) -> None:
        self._sequences[slot] = None
        self._tables[slot] = ()
        self._placeholders.pop(slot, None)

    def update_pages(self, slot: int, table: tuple[int, ...]) -> None:
        """Updates the slot's row to ``table``; most steps change nothing or add a page."""
        known = self._tables[slot]
        if table is known:
            return
        same = len(known) if table[: len(known)] == known else 0
        if len(table) > same:
            self.pages[slot, same : len(table)] = table[same:]
        self._tables[slot] = table

    def positions(self, slot: int, start: int, count: int) -> NDArray[np.int64]:
        """int64 [position_dims, count] of tokens from ``start`` on."""
        prompt = self._positions[slot]
        known = prompt[:, start : start + count]
        missing = count - known.shape[1]
        if not missing:
            return known
        first = max(start, prompt.shape[1])
        rest = np.arange(first, first + missing, dtype=np.int64) + self.delta[slot]
        return np.concatenate([known, np.broadcast_to(rest, (len(prompt), missing))], axis=1)

    def is_placeholder(self, slot: int, seq: Sequence) -> NDArray[np.bool_]:
        """bool [prompt tokens]: True for tokens that spans overwrite."""
        if slot not in self._placeholders:
            covered = np.zeros(seq.num_prompt, dtype=np.bool_)
            for span in seq.request.spans:
                covered[span.token_offset : span.token_offset + span.num_tokens] = True
            self._placeholders[slot] = covered
        return self._placeholders[slot]
