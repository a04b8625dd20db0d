"""Attention with torch's scaled_dot_product_attention over gathered blocks.

Made for the CPU; on CUDA it is the reference that faster backends are compared with. Decoding
sequences form one batch, padded to the longest, or a few batches where lengths differ much. Chunks
are computed one by one; they need a mask where tokens before them are cached, where spans are
bidirectional, and where a window is shorter than the chunk. Layers with a window gather only the
blocks that it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from llm_service.device.attention.base import AttentionBackend, AttentionStep, BlockShape, Chunk
from llm_service.device.memory import to_device

if TYPE_CHECKING:
    from opticnerve.models.decoders.spec import LayerSpec

# Decoding sequences are split into batches of similar length while padding more than doubles the
# work.
MAX_PADDING = 2.0
MAX_GROUPS = 4
# Rows of a chunk that share one mask: bounds how many hidden scores are computed in vain.
TILE_ROWS = 512


@dataclass(frozen=True, slots=True)
class _Group:
    """Decoding sequences that attend in one batch: packed rows [begin, end)."""

    begin: int
    end: int
    blocks: torch.Tensor  # [rows * blocks each]
    length: int  # Keys of the longest row, counted from its first gathered block.
    mask: torch.Tensor | None  # [rows, 1, 1, length], added to scores; None: every row sees all.


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of one chunk that attend in one call."""

    begin: int  # Packed rows [begin, end).
    end: int
    first: int  # Attends over keys [first, last) of the run.
    last: int
    mask: torch.Tensor | None  # [rows, last - first], added to scores; None: plain causal.


@dataclass(frozen=True, slots=True)
class _Run:
    """One chunk. ``blocks``: to gather keys from; None: all of them are computed in this step."""

    begin: int
    end: int
    blocks: torch.Tensor | None
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class _View:
    """A step as the layers of one window see it."""

    groups: tuple[_Group, ...]
    runs: tuple[_Run, ...]


def split_by_length(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """At most MAX_GROUPS ranges [begin, end) of ``lengths``, which come longest first.

    Cuts the range with the most padding where that saves the most, until the padded work is at most
    MAX_PADDING times the work itself.
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


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None = None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """[batch, heads, rows, dim] over [batch, kv_heads, length, dim].

    ``mask`` is added to scores. Before that, ``soft_cap`` c turns a score s into c * tanh(s / c),
    as in Gemma 2 (arXiv 2408.00118). torch's function cannot do that, so the whole matrix of scores
    is computed here.
    """
    grouped = query.shape[1] != keys.shape[1]
    if soft_cap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / soft_cap)) * soft_cap
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(above, -torch.inf)
    elif mask is not None:
        scores += mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


class SdpaBackend(AttentionBackend):
    """Each layer's blocks are one tensor, [blocks + 1, block_size, 2, kv_heads, head_dim], so that
    one gather brings keys and values. The extra block stays zero; it pads the shorter sequences of
    a batch."""

    name: ClassVar[str] = "sdpa"
    block_sizes: ClassVar[tuple[int, ...]] = (16, 32, 64, 128)

    def __init__(self) -> None:
        self._shape = BlockShape(0, 0, 0, 0)
        self._layers: list[torch.Tensor] = []
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._null_block = 0
        self._slots = torch.empty(0, dtype=torch.int64)
        self._windows: tuple[int | None, ...] = ()  # By layer.
        self._soft_caps: tuple[float | None, ...] = ()
        self._views: list[_View] = []
        self._gathered = torch.empty(0)

    def allocate(
        self,
        shape: BlockShape,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[LayerSpec] = (),
    ) -> None:
        size = (num_blocks + 1, shape.block_size, 2, shape.num_kv_heads, shape.head_dim)
        self._shape, self._dtype, self._device, self._null_block = shape, dtype, device, num_blocks
        self._layers = [
            torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)
        ]
        plain = (None,) * shape.num_layers
        self._windows = tuple(layer.window for layer in layers) or plain
        self._soft_caps = tuple(layer.soft_cap for layer in layers) or plain

    def free(self) -> None:
        self._layers = []
        self._gathered = torch.empty(0)
        self._views = []

    # ---- the step's description

    def prepare(self, step: AttentionStep) -> None:
        self._slots = to_device(step.token_slots, self._device)
        ends = [chunk.start + chunk.num_tokens for chunk in step.chunks]
        longest = max([*step.decode_lengths[:1].tolist(), *ends], default=0)
        windows = [None if each is None or each >= longest else each for each in self._windows]
        views = {window: self._make_view(step, window) for window in set(windows)}
        self._views = [views[window] for window in windows]
        used = [group.blocks for view in views.values() for group in view.groups]
        used += [
            run.blocks for view in views.values() for run in view.runs if run.blocks is not None
        ]
        self._make_room(max(map(len, used), default=0))

    def _make_view(self, step: AttentionStep, window: int | None) -> _View:
        """``window``: tokens that each token attends to, itself included; None: all."""
        groups: tuple[_Group, ...] = ()
        if len(step.decode_lengths):
            seen = step.decode_lengths
            ranges = split_by_length(seen if window is None else np.minimum(seen, window))
            groups = tuple(self._make_group(step, begin, end, window) for begin, end in ranges)
        return _View(groups, tuple(self._make_run(chunk, window) for chunk in step.chunks))

    def _make_room(self, num_blocks: int) -> None:
        """Makes the buffer of gathered blocks large enough. All layers reuse it: memory of this
        size, allocated anew each time, would go back to the system and be faulted in again."""
        if len(self._gathered) < num_blocks:
            shape = (2 * num_blocks, *self._layers[0].shape[1:])
            self._gathered = torch.empty(shape, dtype=self._dtype, device=self._device)

    def _gather(self, blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Blocks ``index`` of one layer, valid until the next call."""
        return torch.index_select(blocks, 0, index, out=self._gathered[: len(index)])

    def _make_group(self, step: AttentionStep, begin: int, end: int, window: int | None) -> _Group:
        """Decoding sequences [begin, end), with the blocks that ``window`` reaches."""
        table, lengths = step.decode_blocks[begin:end], step.decode_lengths[begin:end]
        block_size = self._shape.block_size
        firsts = np.zeros_like(lengths)  # First key that each row sees.
        if window is not None:
            firsts = np.maximum(lengths - window, 0)
            skipped = firsts // block_size
            columns = skipped[:, None] + np.arange(-(-window // block_size) + 1)
            table = np.take_along_axis(table, np.minimum(columns, table.shape[1] - 1), axis=1)
            lengths, firsts = lengths - skipped * block_size, firsts - skipped * block_size
        longest = int(lengths.max())
        blocks = table[:, : -(-longest // block_size)]
        mask = None
        if int(lengths.min()) < longest or firsts.any():
            used = np.arange(0, blocks.shape[1] * block_size, block_size) < lengths[:, None]
            blocks = np.where(used, blocks, self._null_block)
            keys = np.arange(longest)
            hidden = (keys >= lengths[:, None]) | (keys < firsts[:, None])
            mask = self._additive(hidden).view(end - begin, 1, 1, longest)
        flat = np.ascontiguousarray(blocks).reshape(-1)
        return _Group(begin, end, to_device(flat, self._device), longest, mask)

    def _make_run(self, chunk: Chunk, window: int | None) -> _Run:
        count, end = chunk.num_tokens, chunk.first_index + chunk.num_tokens
        within = window is None or count <= window
        if chunk.start == 0 and within and not chunk.bidirectional:
            return _Run(
                chunk.first_index, end, None, (_Tile(chunk.first_index, end, 0, count, None),)
            )
        skipped, blocks = 0, None
        if chunk.start:
            if window is not None:
                skipped = max(chunk.start + 1 - window, 0) // self._shape.block_size
            blocks = to_device(chunk.blocks[skipped:], self._device)
        absent = skipped * self._shape.block_size
        tiles = tuple(
            self._make_tile(chunk, first, min(first + TILE_ROWS, count), window, absent)
            for first in range(0, count, TILE_ROWS)
        )
        return _Run(chunk.first_index, end, blocks, tiles)

    def _make_tile(
        self, chunk: Chunk, first: int, last: int, window: int | None, absent: int
    ) -> _Tile:
        """Tokens [first, last) of the chunk; a bidirectional range may reach beyond ``last``.
        ``absent``: number of the sequence's keys that come before the run's.

        A window bounds how far back a token attends in a bidirectional range, too.
        """
        start = chunk.start
        stop = start + max([last, *(end for begin, end in chunk.bidirectional if begin < last)])
        low = absent if window is None else max(absent, start + first + 1 - window)
        keys, rows = np.arange(low, stop), np.arange(start + first, start + last)[:, None]
        hidden = keys > rows
        for begin, end in chunk.bidirectional:
            above, below = max(begin, first), min(end, last)
            if above < below:
                seen = slice(max(start + begin - low, 0), start + end - low)
                hidden[above - first : below - first, seen] = False
        if window is not None:
            hidden |= keys <= rows - window
        begin = chunk.first_index
        mask = self._additive(hidden)
        return _Tile(begin + first, begin + last, low - absent, stop - absent, mask)

    def _additive(self, hidden: NDArray[np.bool_]) -> torch.Tensor:
        """0 where visible, minus infinity where hidden."""
        on_device = torch.from_numpy(hidden).to(self._device, non_blocking=True)
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(on_device, -torch.inf)

    # ---- the arithmetic

    def attend(
        self, layer: int, query: torch.Tensor, key_value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        blocks, view = self._layers[layer], self._views[layer]
        soft_cap = self._soft_caps[layer]
        blocks.view(-1, *key_value.shape[1:]).index_copy_(0, self._slots, key_value)
        if not view.runs:
            parts = [self._decode(blocks, group, query, scale, soft_cap) for group in view.groups]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in view.groups:
            out[group.begin : group.end] = self._decode(blocks, group, query, scale, soft_cap)
        for run in view.runs:
            self._attend_run(
                run, query, *self._run_keys(blocks, run, key_value), scale, soft_cap, out
            )
        return out

    def _decode(
        self,
        blocks: torch.Tensor,
        group: _Group,
        query: torch.Tensor,
        scale: float,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """Passes the heads that share a KV head as its queries, so that no keys are repeated."""
        _, heads, head_dim = query.shape
        kv_heads = blocks.shape[3]
        size = group.end - group.begin
        gathered = self._gather(blocks, group.blocks).view(size, -1, 2, kv_heads, head_dim)[
            :, : group.length
        ]
        keys, values = gathered.permute(2, 0, 3, 1, 4).unbind(0)
        rows = query if size == len(query) else query[group.begin : group.end]
        grouped = rows.reshape(size, kv_heads, heads // kv_heads, head_dim)
        out = attention(grouped, keys, values, group.mask, scale, soft_cap)
        return out.reshape(size, heads, head_dim)

    def _run_keys(
        self, blocks: torch.Tensor, run: _Run, key_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a run, each [length, kv_heads, head_dim]."""
        if run.blocks is None:
            keys, values = key_value[run.begin : run.end].chunk(2, dim=1)
        else:
            gathered = self._gather(blocks, run.blocks).view(-1, 2, *blocks.shape[3:])
            keys, values = gathered.unbind(1)
        return keys, values

    def _attend_run(
        self,
        run: _Run,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        soft_cap: float | None,
        out: torch.Tensor,
    ) -> None:
        for tile in run.tiles:
            # [1, heads, rows, head_dim] against [1, kv_heads, length, head_dim].
            rows, seen, mixed = (
                part.transpose(0, 1).unsqueeze(0)
                for part in (
                    query[tile.begin : tile.end],
                    keys[tile.first : tile.last],
                    values[tile.first : tile.last],
                )
            )
            causal = tile.mask is None
            attended = attention(rows, seen, mixed, tile.mask, scale, soft_cap, causal=causal)
            out[tile.begin : tile.end] = attended[0].transpose(0, 1)

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
