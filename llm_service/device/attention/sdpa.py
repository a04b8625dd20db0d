"""Attention with torch's scaled_dot_product_attention over gathered blocks.

Made for the CPU; on CUDA it is the reference that faster backends are compared with. Decoding
sequences go in one batch, padded to the longest (or in a few batches, where lengths differ much);
chunks go one by one, and only those that have something cached need a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from llm_service.device.attention.base import AttentionBackend, AttentionStep, BlockShape, Chunk
from llm_service.device.memory import to_device

# Decoding splits into batches of alike lengths while padding more than doubles the work.
MAX_PADDING = 2.0
MAX_GROUPS = 4
# Rows of a chunk that share one mask: bounds what causality throws away.
TILE_ROWS = 512


@dataclass(frozen=True, slots=True)
class _Group:
    """Decoding sequences that attend in one batch: packed rows [begin, end)."""

    begin: int
    end: int
    blocks: torch.Tensor  # [rows * blocks each]
    length: int  # Of the longest.
    mask: torch.Tensor | None  # [rows, 1, 1, length], added to scores; None: all are as long.


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of one chunk that attend in one call."""

    begin: int  # Packed rows [begin, end).
    end: int
    length: int  # Keys seen, from the sequence's first.
    mask: torch.Tensor | None  # [rows, length], added to scores; None: plain causal.


@dataclass(frozen=True, slots=True)
class _Run:
    """One chunk. ``blocks`` is None where all of its keys are in the step itself."""

    begin: int
    end: int
    blocks: torch.Tensor | None
    tiles: tuple[_Tile, ...]


def split_by_length(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """At most MAX_GROUPS ranges [begin, end) of ``lengths``, which come longest first.

    Cuts the range that pads most, where that saves most, until padding is within MAX_PADDING of
    the work itself.
    """
    ranges = [(0, len(lengths))]
    while len(ranges) < MAX_GROUPS:
        padded = [int(lengths[begin]) * (end - begin) for begin, end in ranges]
        if sum(padded) <= MAX_PADDING * int(lengths.sum()):
            break
        waste = [
            total - int(lengths[begin:end].sum())
            for total, (begin, end) in zip(padded, ranges, strict=True)
        ]
        worst = int(np.argmax(waste))
        begin, end = ranges[worst]
        # Cutting before i shortens everything from i on to that length.
        saved = (lengths[begin] - lengths[begin + 1 : end]) * np.arange(end - begin - 1, 0, -1)
        cut = begin + 1 + int(np.argmax(saved))
        ranges[worst : worst + 1] = [(begin, cut), (cut, end)]
    return ranges


class SdpaBackend(AttentionBackend):
    """Blocks are [blocks + 1, block_size, 2, kv_heads, head_dim] a layer: one gather brings keys
    and values. The extra block stays zero; it pads shorter sequences of a batch."""

    name: ClassVar[str] = "sdpa"
    block_sizes: ClassVar[tuple[int, ...]] = (16, 32, 64, 128)

    def __init__(self) -> None:
        self._shape = BlockShape(0, 0, 0, 0)
        self._layers: list[torch.Tensor] = []
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._null_block = 0
        self._slots = torch.empty(0, dtype=torch.int64)
        self._groups: tuple[_Group, ...] = ()
        self._runs: tuple[_Run, ...] = ()
        self._gathered = torch.empty(0)

    def allocate(
        self, shape: BlockShape, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (num_blocks + 1, shape.block_size, 2, shape.num_kv_heads, shape.head_dim)
        self._shape, self._dtype, self._device, self._null_block = shape, dtype, device, num_blocks
        self._layers = [
            torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)
        ]

    def free(self) -> None:
        self._layers = []
        self._gathered = torch.empty(0)
        self._groups, self._runs = (), ()

    # ---- the step's description

    def prepare(self, step: AttentionStep) -> None:
        self._slots = to_device(step.token_slots, self._device)
        self._groups = self._make_groups(step)
        self._runs = tuple(self._make_run(chunk) for chunk in step.chunks)
        used = [group.blocks for group in self._groups]
        used += [run.blocks for run in self._runs if run.blocks is not None]
        self._make_room(max(map(len, used), default=0))

    def _make_room(self, num_blocks: int) -> None:
        """One buffer takes what is gathered, layer after layer: memory of this size, allocated
        anew each time, would go back to the system and be faulted in again."""
        if len(self._gathered) < num_blocks:
            shape = (2 * num_blocks, *self._layers[0].shape[1:])
            self._gathered = torch.empty(shape, dtype=self._dtype, device=self._device)

    def _gather(self, blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Blocks ``index`` of one layer, valid until the next call."""
        return torch.index_select(blocks, 0, index, out=self._gathered[: len(index)])

    def _make_groups(self, step: AttentionStep) -> tuple[_Group, ...]:
        if not len(step.decode_lengths):
            return ()
        ranges = split_by_length(step.decode_lengths)
        return tuple(self._make_group(step, begin, end) for begin, end in ranges)

    def _make_group(self, step: AttentionStep, begin: int, end: int) -> _Group:
        lengths = step.decode_lengths[begin:end]
        longest = int(lengths[0])
        block_size = self._shape.block_size
        blocks = step.decode_blocks[begin:end, : -(-longest // block_size)]
        mask = None
        if int(lengths[-1]) < longest:
            used = np.arange(0, blocks.shape[1] * block_size, block_size) < lengths[:, None]
            blocks = np.where(used, blocks, self._null_block)
            beyond = np.arange(longest) >= lengths[:, None]
            mask = self._additive(beyond).view(end - begin, 1, 1, longest)
        flat = np.ascontiguousarray(blocks).reshape(-1)
        return _Group(begin, end, to_device(flat, self._device), longest, mask)

    def _make_run(self, chunk: Chunk) -> _Run:
        end = chunk.first_index + chunk.num_tokens
        if chunk.start == 0 and not chunk.bidirectional:
            tile = _Tile(chunk.first_index, end, chunk.num_tokens, None)
            return _Run(chunk.first_index, end, None, (tile,))
        tiles = tuple(
            self._make_tile(chunk, first, min(first + TILE_ROWS, chunk.num_tokens))
            for first in range(0, chunk.num_tokens, TILE_ROWS)
        )
        blocks = None if chunk.start == 0 else to_device(chunk.blocks, self._device)
        return _Run(chunk.first_index, end, blocks, tiles)

    def _make_tile(self, chunk: Chunk, first: int, last: int) -> _Tile:
        """Tokens [first, last) of the chunk; a bidirectional range may reach beyond ``last``."""
        reach = max([last, *(end for begin, end in chunk.bidirectional if begin < last)])
        length = chunk.start + reach
        hidden = np.arange(length) > chunk.start + np.arange(first, last)[:, None]
        for begin, end in chunk.bidirectional:
            low, high = max(begin, first), min(end, last)
            if low < high:
                hidden[low - first : high - first, chunk.start + begin : chunk.start + end] = False
        return _Tile(
            chunk.first_index + first, chunk.first_index + last, length, self._additive(hidden)
        )

    def _additive(self, hidden: NDArray[np.bool_]) -> torch.Tensor:
        """0 where visible, minus infinity where hidden."""
        on_device = torch.from_numpy(hidden).to(self._device, non_blocking=True)
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(on_device, -torch.inf)

    # ---- the arithmetic

    def attend(
        self, layer: int, query: torch.Tensor, key_value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        blocks = self._layers[layer]
        blocks.view(-1, *key_value.shape[1:]).index_copy_(0, self._slots, key_value)
        if not self._runs:
            parts = [self._decode(blocks, group, query, scale) for group in self._groups]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in self._groups:
            out[group.begin : group.end] = self._decode(blocks, group, query, scale)
        for run in self._runs:
            self._attend_run(blocks, run, query, key_value, scale, out)
        return out

    def _decode(
        self, blocks: torch.Tensor, group: _Group, query: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The heads that share a key head go as its queries: nothing is repeated."""
        _, heads, head_dim = query.shape
        kv_heads = blocks.shape[3]
        size = group.end - group.begin
        gathered = self._gather(blocks, group.blocks).view(size, -1, 2, kv_heads, head_dim)[
            :, : group.length
        ]
        keys, values = gathered.permute(2, 0, 3, 1, 4).unbind(0)
        rows = query if size == len(query) else query[group.begin : group.end]
        grouped = rows.reshape(size, kv_heads, heads // kv_heads, head_dim)
        out = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=group.mask, scale=scale
        )
        return out.reshape(size, heads, head_dim)

    def _attend_run(
        self,
        blocks: torch.Tensor,
        run: _Run,
        query: torch.Tensor,
        key_value: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        kv_heads, head_dim = blocks.shape[3:]
        if run.blocks is None:
            keys, values = key_value[run.begin : run.end].chunk(2, dim=1)
        else:
            gathered = self._gather(blocks, run.blocks).view(-1, 2, kv_heads, head_dim)
            keys, values = gathered.unbind(1)
        grouped = query.shape[1] != kv_heads
        for tile in run.tiles:
            # [1, heads, rows, head_dim] against [1, kv_heads, length, head_dim].
            out[tile.begin : tile.end] = F.scaled_dot_product_attention(
                query[tile.begin : tile.end].transpose(0, 1).unsqueeze(0),
                keys[: tile.length].transpose(0, 1).unsqueeze(0),
                values[: tile.length].transpose(0, 1).unsqueeze(0),
                attn_mask=tile.mask,
                is_causal=tile.mask is None,
                scale=scale,
                enable_gqa=grouped,
            )[0].transpose(0, 1)

    # ---- upkeep

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        if not copies:
            return
        pairs = to_device(np.array(copies, dtype=np.int64), self._device)
        source, destination = pairs.unbind(1)
        for blocks in self._layers:
            blocks.index_copy_(0, destination, blocks.index_select(0, source))

    def scrub(self, blocks: tuple[int, ...]) -> None:
        index = to_device(np.array(blocks, dtype=np.int64), self._device)
        for layer in self._layers:
            clean = torch.nan_to_num(layer.index_select(0, index), nan=0.0, posinf=0.0, neginf=0.0)
            layer.index_copy_(0, index, clean)
