"""One step's tokens, packed: arrays on the host, made from a plan and the state of its slots.

Decoding sequences come first, one token each, longest first; chunks follow. So a backend needs no
index to tell them apart or to group sequences of similar length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_service.device.attention.base import AttentionStep, Chunk
from llm_service.policy.sequence import Sequence
from llm_service.policy.step_plan import Work
from opticnerve.media.plan import SpanAttention

if TYPE_CHECKING:
    from opticnerve.models.family import Layout


class SlotTable:
    """Host-side state of each running sequence: its blocks and positions, in arrays over slots, so
    that packing decoding sequences takes a few vectorised look-ups.

    ``delta``: int64 [slots], position minus index of tokens past the prompt. ``blocks``: int64
    [slots, most blocks], the block tables, extended as they grow.
    """

    def __init__(self, num_slots: int, max_blocks: int, layout: Layout) -> None:
        self._layout = layout
        self.position_dims = layout.position_dims
        self.delta = np.zeros(num_slots, dtype=np.int64)
        self.blocks = np.zeros((num_slots, max_blocks), dtype=np.int64)
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

    def update_blocks(self, slot: int, table: tuple[int, ...]) -> None:
        """Updates the slot's row to ``table``; most steps change nothing or add a block."""
        known = self._tables[slot]
        if table is known:
            return
        same = len(known) if table[: len(known)] == known else 0
        if len(table) > same:
            self.blocks[slot, same : len(table)] = table[same:]
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


Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """T packed tokens of W works."""

    works: tuple[Work, ...]  # In packed order.
    first_indices: list[int]  # Index of each work's first packed token.
    token_ids: Ints  # [T]; 0 for tokens that are still on the device (see read_indices).
    read_indices: Ints  # Indices of packed tokens that are a slot's last sample, ...
    read_slots: Ints  # ... and those slots.
    positions: Ints  # [position_dims, T]
    attention: AttentionStep
    logit_works: list[int]  # Indices of works that sample a token.
    logit_indices: Ints  # Indices of their last packed tokens.
    logit_slots: Ints
    output_positions: Ints  # Output position of each token to be sampled.

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def pack(works: list[Work], slots: SlotTable, block_size: int) -> Batch:
    """Packs ``works``, whose slots have been admitted and have their blocks."""
    decodes = [work for work in works if work.num_tokens == 1]
    decodes.sort(key=_start, reverse=True)
    if len(decodes) == len(works):
        return _pack_decodes(decodes, slots, block_size)
    chunks = [work for work in works if work.num_tokens > 1]
    head = _pack_decodes(decodes, slots, block_size) if decodes else None
    parts = [_chunk_arrays(work, slots, block_size) for work in chunks]
    ids, positions, token_slots = (list(column) for column in zip(*parts, strict=True))
    if head is not None:
        ids.insert(0, head.token_ids)
        positions.insert(0, head.positions)
        token_slots.insert(0, head.attention.token_slots)
    counts = [1] * len(decodes) + [work.num_tokens for work in chunks]
    ends = np.cumsum(counts)
    ordered = (*decodes, *chunks)
    reading = [i for i, work in enumerate(ordered) if work.last_token_on_device]
    wanting = [i for i, work in enumerate(ordered) if work.samples]
    all_slots = np.array([work.slot for work in ordered], dtype=np.int64)
    firsts = (ends - counts).tolist()
    return Batch(
        works=ordered,
        first_indices=firsts,
        token_ids=np.concatenate(ids),
        read_indices=ends[reading] - 1,
        read_slots=all_slots[reading],
        positions=np.concatenate(positions, axis=1),
        attention=AttentionStep(
            token_slots=np.concatenate(token_slots),
            decode_blocks=head.attention.decode_blocks if head else np.zeros((0, 0), np.int64),
            decode_lengths=head.attention.decode_lengths if head else np.zeros(0, np.int64),
            chunks=tuple(map(_chunk, chunks, firsts[len(decodes) :], repeat(slots))),
        ),
        logit_works=wanting,
        logit_indices=ends[wanting] - 1,
        logit_slots=all_slots[wanting],
        output_positions=np.array([_output_position(ordered[i]) for i in wanting], dtype=np.int64),
    )


def _pack_decodes(works: list[Work], slots: SlotTable, block_size: int) -> Batch:
    """A batch in which every work computes one token: vectorised."""
    of = np.array([work.slot for work in works], dtype=np.int64)
    starts = np.array([work.start for work in works], dtype=np.int64)
    reading = [i for i, work in enumerate(works) if work.last_token_on_device]
    wanting = [i for i, work in enumerate(works) if work.samples]
    rows = np.arange(len(works))
    token_ids = np.zeros(len(works), dtype=np.int64)
    positions = np.empty((slots.position_dims, len(works)), dtype=np.int64)
    positions[:] = starts + slots.delta[of]
    for i, work in enumerate(works):
        if not work.last_token_on_device:
            token_ids[i] = work.seq.token_ids[work.start]
        if work.start < work.seq.num_prompt:
            positions[:, i : i + 1] = slots.positions(work.slot, work.start, 1)
    block, offset = np.divmod(starts, block_size)
    width = int(block.max()) + 1
    all_read, all_wanted = len(reading) == len(works), len(wanting) == len(works)
    return Batch(
        works=tuple(works),
        first_indices=rows.tolist(),
        token_ids=token_ids,
        read_indices=rows if all_read else rows[reading],
        read_slots=of if all_read else of[reading],
        positions=positions,
        attention=AttentionStep(
            token_slots=slots.blocks[of, block] * block_size + offset,
            decode_blocks=slots.blocks[of, :width],
            decode_lengths=starts + 1,
        ),
        logit_works=wanting,
        logit_indices=rows if all_wanted else rows[wanting],
        logit_slots=of if all_wanted else of[wanting],
        output_positions=np.array([_output_position(works[i]) for i in wanting], dtype=np.int64),
    )


def _chunk_arrays(work: Work, slots: SlotTable, block_size: int) -> tuple[Ints, Ints, Ints]:
    """Token ids, positions and cache slots of one chunk."""
    end = work.start + work.num_tokens
    ids = np.zeros(work.num_tokens, dtype=np.int64)
    known = work.seq.token_ids[work.start : end]
    ids[: len(known)] = known
    block, offset = np.divmod(np.arange(work.start, end), block_size)
    token_slots = slots.blocks[work.slot, block] * block_size + offset
    return ids, slots.positions(work.slot, work.start, work.num_tokens), token_slots


def _chunk(work: Work, first_index: int, slots: SlotTable) -> Chunk:
    return Chunk(
        first_index=first_index,
        num_tokens=work.num_tokens,
        start=work.start,
        blocks=slots.blocks[work.slot, : len(work.block_table)].copy(),
        bidirectional=_bidirectional(work.seq, work.start, work.start + work.num_tokens),
    )


def _bidirectional(seq: Sequence, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Ranges of the chunk [start, end) whose tokens attend to one another in both directions."""
    return tuple(
        (span.token_offset - start, span.token_offset + span.num_tokens - start)
        for span in seq.request.spans
        if span.attention is SpanAttention.BIDIRECTIONAL
        and span.token_offset >= start
        and span.token_offset + span.num_tokens <= end
    )


def _start(work: Work) -> int:
    return work.start


def _output_position(work: Work) -> int:
    return work.start + work.num_tokens - work.seq.num_prompt
