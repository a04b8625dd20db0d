"""The sdpa backend against attention written out by hand, one token at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from llm_service.device.attention import make_backend
from llm_service.device.attention import sdpa as sdpa_module
from llm_service.device.attention.base import (
    AttentionStep,
    BlockShape,
    Chunk,
    active,
    paged_attention,
)
from llm_service.device.attention.sdpa import SdpaBackend
from opticnerve.errors import ConfigError, EngineFailure
from opticnerve.models.decoders.spec import LayerSpec

HEADS, KV_HEADS, DIM, LAYERS, BLOCK = 6, 2, 8, 2, 4
SCALE = DIM**-0.5
PLAIN = LayerSpec()


@dataclass
class History:
    """One sequence: its pages, and all keys and values so far."""

    pages: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)  # [kv_heads, dim] each
    values: list[torch.Tensor] = field(default_factory=list)


def by_hand(
    history: History, query: torch.Tensor, position: int, last: int, spec: LayerSpec
) -> torch.Tensor:
    """Token ``position`` attends over everything up to ``last``, as far back as ``spec`` has it."""
    seen = slice(0 if spec.window is None else max(position + 1 - spec.window, 0), last + 1)
    out = torch.empty(HEADS, DIM)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        keys = torch.stack([key[shared] for key in history.keys[seen]])
        values = torch.stack([value[shared] for value in history.values[seen]])
        scores = (keys @ query[head]) * SCALE
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        out[head] = torch.softmax(scores, dim=0) @ values
    return out


class Bench:
    """Drives a backend and the reference with the same steps, in each of two layers."""

    def __init__(self, num_blocks: int = 64, seed: int = 0, second: LayerSpec = PLAIN) -> None:
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.backend = SdpaBackend()
        shape = BlockShape(LAYERS, KV_HEADS, DIM, BLOCK)
        self.layers = (PLAIN, second)
        device = torch.device("cpu")
        self.backend.allocate(shape, num_blocks, torch.float32, device, self.layers)
        self.free = list(self.rng.permutation(num_blocks))

    def sequence(self) -> History:
        return History(pages=[])

    def step(
        self,
        decodes: list[History],
        chunks: list[tuple[History, int]],
        layers: tuple[int, ...] = (0, 1),
        bidirectional: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Runs one step and compares every token of it."""
        decodes = sorted(decodes, key=lambda history: -len(history.keys))
        work = [(history, 1) for history in decodes] + chunks
        total = sum(count for _, count in work)
        query, key, value = (
            torch.randn(total, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        slots, described, starts, row = [], [], [], 0
        for index, (history, count) in enumerate(work):
            start = len(history.keys)
            starts.append(start)
            while len(history.pages) * BLOCK < start + count:
                history.pages.append(int(self.free.pop()))
            slots += [
                history.pages[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, start + count)
            ]
            history.keys += list(key[row : row + count])
            history.values += list(value[row : row + count])
            if index >= len(decodes):
                pages = np.array(history.pages, dtype=np.int64)
                described.append(Chunk(row, count, start, pages, bidirectional))
            row += count
        width = max((len(history.pages) for history in decodes), default=0)
        tables = np.zeros((len(decodes), width), dtype=np.int64)
        for index, history in enumerate(decodes):
            tables[index, : len(history.pages)] = history.pages
        self.backend.prepare(
            AttentionStep(
                token_slots=np.array(slots, dtype=np.int64),
                decode_blocks=tables,
                decode_lengths=np.array([len(h.keys) for h in decodes], dtype=np.int64),
                chunks=tuple(described),
            )
        )
        for layer in layers:
            got = self.backend.attend(layer, query, torch.cat((key, value), dim=1), SCALE)
            self.compare(got, query, list(zip(work, starts, strict=True)), layer, bidirectional)

    def compare(
        self,
        got: torch.Tensor,
        query: torch.Tensor,
        work: list[tuple[tuple[History, int], int]],
        layer: int,
        bidirectional: tuple[tuple[int, int], ...],
    ) -> None:
        row = 0
        for (history, count), start in work:
            for offset in range(count):
                last = start + offset
                for begin, end in bidirectional:
                    if begin <= offset < end:
                        last = start + end - 1
                want = by_hand(history, query[row], start + offset, last, self.layers[layer])
                torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-4)
                row += 1


SPECS = {
    "plain": PLAIN,
    "a short window": LayerSpec(window=3),
    "a window of a block": LayerSpec(window=BLOCK),
    "a window over blocks": LayerSpec(window=9),
    "capped": LayerSpec(soft_cap=0.5),
    "capped, with a window": LayerSpec(window=6, soft_cap=0.5),
}


@pytest.mark.parametrize("second", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("seed", range(4))
def test_random_mixes_of_decodes_and_chunks(seed: int, second: LayerSpec) -> None:
    bench = Bench(num_blocks=200, seed=seed, second=second)
    rng = bench.rng
    running: list[History] = []
    for _ in range(8):
        fresh = [
            (bench.sequence(), int(rng.integers(1, 14))) for _ in range(int(rng.integers(0, 3)))
        ]
        continued = [
            (history, int(rng.integers(2, 9))) for history in running if rng.random() < 0.3
        ]
        chosen = [id(history) for history, _ in continued]
        decodes = [h for h in running if id(h) not in chosen and rng.random() < 0.8]
        if decodes or continued or fresh:
            bench.step(decodes, continued + fresh)
        running += [history for history, _ in fresh]


@pytest.mark.parametrize("second", SPECS.values(), ids=SPECS)
def test_very_different_lengths_are_split_and_still_right(second: LayerSpec) -> None:
    bench = Bench(num_blocks=200, second=second)
    lengths = [90, 3, 1, 40, 2, 5, 1, 1, 44, 2]
    histories = [bench.sequence() for _ in lengths]
    for history, length in zip(histories, lengths, strict=True):
        bench.step([], [(history, length)])
    bench.step(histories, [])
    assert len(bench.backend._views[0].groups) > 1
    bench.step(histories[::-1], [(bench.sequence(), 7)])


def test_split_by_length_covers_everything_once_and_bounds_padding() -> None:
    lengths = np.array([4000, 900, *[100] * 15, 7], dtype=np.int64)
    ranges = sdpa_module.split_by_length(lengths)
    assert [index for begin, end in ranges for index in range(begin, end)] == list(range(18))
    assert 1 < len(ranges) <= sdpa_module.MAX_GROUPS
    padded = sum(int(lengths[begin]) * (end - begin) for begin, end in ranges)
    assert padded <= sdpa_module.MAX_PADDING * lengths.sum()
    assert sdpa_module.split_by_length(np.array([9, 8, 8, 7])) == [(0, 4)]


@pytest.mark.parametrize("second", SPECS.values(), ids=SPECS)
def test_a_bidirectional_range_sees_itself_whole(second: LayerSpec) -> None:
    """With a window, each of its tokens sees as far back as the window has it."""
    bench = Bench(second=second)
    history = bench.sequence()
    bench.step([], [(history, 5)])
    bench.step([], [(history, 9)], bidirectional=((2, 6),))
    bench.step([], [(bench.sequence(), 6)], bidirectional=((0, 3), (4, 6)))


@pytest.mark.parametrize("second", SPECS.values(), ids=SPECS)
def test_long_chunks_are_tiled(second: LayerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_module, "TILE_ROWS", 4)
    bench = Bench(second=second)
    bench.step([], [(bench.sequence(), 14)])
    history = bench.sequence()
    bench.step([], [(history, 6)])
    bench.step([], [(history, 11)], bidirectional=((2, 6),))
    assert len(bench.backend._views[0].runs[0].tiles) == 3


def test_a_window_gathers_no_more_than_it_reaches() -> None:
    bench = Bench(second=LayerSpec(window=5))
    one, two = bench.sequence(), bench.sequence()
    bench.step([], [(one, 30), (two, 41)])
    bench.step([one], [(two, 3)])
    plain, windowed = bench.backend._views
    assert [len(group.blocks) for group in plain.groups] == [8]
    assert [len(group.blocks) for group in windowed.groups] == [2]
    runs = [view.runs[0].blocks for view in (plain, windowed)]
    assert [len(blocks) for blocks in runs if blocks is not None] == [11, 2]


def test_a_window_that_hides_nothing_is_prepared_once() -> None:
    bench = Bench(second=LayerSpec(window=7))
    history = bench.sequence()
    bench.step([], [(history, 6)])
    bench.step([history], [])
    assert bench.backend._views[0] is bench.backend._views[1]
    bench.step([history], [])
    assert bench.backend._views[0] is not bench.backend._views[1]


def test_layers_have_pages_of_their_own() -> None:
    bench = Bench()
    one, two = bench.sequence(), bench.sequence()
    bench.step([], [(one, 5)], layers=(0,))
    two.pages = list(one.pages)
    bench.step([], [(two, 5)], layers=(1,))
    bench.step([one], [], layers=(0,))


def test_copied_pages_continue_alone() -> None:
    bench = Bench()
    parent = bench.sequence()
    bench.step([], [(parent, 6)])
    child = History(
        [parent.pages[0], int(bench.free.pop())], list(parent.keys), list(parent.values)
    )
    bench.backend.copy_blocks(((parent.pages[1], child.pages[1]),))
    bench.step([parent, child], [])
    bench.step([parent, child], [])


def test_scrubbed_pages_spread_nothing() -> None:
    bench = Bench(num_blocks=8)
    sick = bench.sequence()
    bench.step([], [(sick, 6)])
    for pages in bench.backend._layers:
        pages[torch.tensor(sick.pages)] = float("nan")
    bench.backend.scrub(tuple(sick.pages))
    bench.free += sick.pages
    short, long = bench.sequence(), bench.sequence()
    bench.step([], [(short, 2), (long, 9)])
    bench.step([short, long], [])


def test_scrubbing_changes_nothing_that_is_finite() -> None:
    bench = Bench()
    history = bench.sequence()
    bench.step([], [(history, 6)])
    bench.backend.scrub(tuple(history.pages))
    bench.step([history], [])


def test_transformers_interface_reaches_the_active_backend() -> None:
    bench = Bench()
    bench.backend.prepare(
        AttentionStep(
            token_slots=np.arange(3, dtype=np.int64),
            decode_blocks=np.zeros((0, 0), dtype=np.int64),
            decode_lengths=np.zeros(0, dtype=np.int64),
            chunks=(Chunk(0, 3, 0, np.zeros(1, dtype=np.int64)),),
        )
    )

    class Layer:
        layer_idx = 1

    query, key = torch.randn(1, HEADS, 3, DIM), torch.randn(1, KV_HEADS, 3, DIM)
    with active(bench.backend):
        out, weights = paged_attention(Layer(), query, key, key, None, scaling=SCALE)
    assert out.shape == (1, 3, HEADS, DIM) and weights is None
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, want.transpose(1, 2))
    assert math.isclose(SCALE, query.shape[-1] ** -0.5)
    with pytest.raises(EngineFailure):
        paged_attention(Layer(), query, key, key, None)
    with active(bench.backend), pytest.raises(EngineFailure):
        paged_attention(Layer(), query, key, key, torch.zeros(3, 3))


def test_backends_are_found_by_name() -> None:
    assert isinstance(make_backend("auto"), SdpaBackend)
    with pytest.raises(ConfigError, match="sdpa"):
        make_backend("flash9")
