"""Pages: held, shared, cached, evicted, and never two of these by mistake."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llm_service.policy.block_manager import BlockManager, extend_hashes
from llm_service.policy.messages import GenerateRequest
from llm_service.policy.sequence import GenerationState, Sequence, Status
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid, Modality, Span, SpanAttention
from tests.fake_runner import clear_cache


def sequence(length: int, first: int = 0, **fields: Any) -> Sequence:
    tokens = tuple(range(first, first + length))
    request = GenerateRequest("r", tokens, sampling=Sampling(), **fields)
    seq = GenerationState(request, 0, 0.0).begin()
    assert seq is not None
    return seq


def running(blocks: BlockManager, seq: Sequence) -> Sequence:
    assert blocks.lacking(seq) <= 0
    blocks.allocate(seq)
    seq.status = Status.RUNNING
    return seq


def computed(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> Sequence:
    running(blocks, seq)
    seq.num_computed = seq.num_tokens if num_tokens is None else num_tokens
    blocks.commit(seq)
    return seq


def released(blocks: BlockManager, seq: Sequence) -> None:
    blocks.release(seq)
    seq.suspend()
    seq.status = Status.WAITING


def test_a_page_is_a_multiple_of_sixteen_tokens() -> None:
    for num_blocks, block_size in ((0, 16), (4, 8), (4, 24)):
        with pytest.raises(ValueError, match="multiple of 16"):
            BlockManager(num_blocks, block_size)


def test_pages_are_taken_and_given_back() -> None:
    blocks = BlockManager(4, 16)
    seq = running(blocks, sequence(33))
    assert len(seq.block_table) == 3
    assert blocks.num_free == 1
    assert blocks.can_grow(seq, 64)
    assert not blocks.can_grow(seq, 65)
    blocks.grow(seq, 48)
    assert len(seq.block_table) == 3
    blocks.grow(seq, 49)
    assert len(seq.block_table) == 4
    released(blocks, seq)
    assert blocks.num_free == 4
    blocks.check_integrity([seq])


def test_predicates_change_nothing() -> None:
    blocks = BlockManager(4, 16)
    released(blocks, computed(blocks, sequence(64)))
    seq = sequence(64)
    before = (list(blocks._free), list(blocks._idle), dict(blocks._cached))
    for _ in range(2):
        assert blocks.lacking(seq) <= 0
        assert blocks.lacking(seq, reserve=1) > 0
        assert blocks.lacking(sequence(65)) > 0
        assert blocks.cached_tokens(seq) == 48
        assert (list(blocks._free), list(blocks._idle), dict(blocks._cached)) == before
    assert seq.block_table == ()


def test_only_what_is_computed_is_shared() -> None:
    blocks = BlockManager(8, 16)
    running(blocks, sequence(64))
    assert blocks.cached_tokens(sequence(64)) == 0
    blocks = BlockManager(8, 16)
    computed(blocks, sequence(64), 40)
    assert blocks.cached_tokens(sequence(64)) == 32


def test_shared_pages_are_counted() -> None:
    blocks = BlockManager(8, 16)
    first = computed(blocks, sequence(48))
    second = running(blocks, sequence(48))
    assert second.block_table[:2] == first.block_table[:2]
    assert blocks.num_free == 4
    blocks.check_integrity([first, second])
    released(blocks, first)
    blocks.check_integrity([second])
    assert blocks.num_free == 5
    released(blocks, second)
    assert blocks.num_free == 8


def test_the_least_recently_used_page_is_evicted_and_tails_before_heads() -> None:
    blocks = BlockManager(4, 16)
    released(blocks, computed(blocks, sequence(32)))
    released(blocks, computed(blocks, sequence(32, first=100)))
    running(blocks, sequence(16, first=500))
    assert blocks.cached_tokens(sequence(33)) == 16
    assert blocks.cached_tokens(sequence(33, first=100)) == 32


def test_a_hit_saves_its_pages_from_eviction() -> None:
    blocks = BlockManager(4, 16)
    released(blocks, computed(blocks, sequence(48)))
    again = sequence(64)
    assert blocks.lacking(again) <= 0
    assert running(blocks, again).num_computed == 48
    blocks.check_integrity([again])


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(8, 16)
    released(blocks, computed(blocks, sequence(32)))
    assert blocks.cached_tokens(sequence(32)) == 16
    assert blocks.cached_tokens(sequence(33)) == 32


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_hash_chains_do_not_depend_on_the_page_size(block_size: int) -> None:
    small, large = sequence(128), sequence(128)
    extend_hashes(small, 128 // 16, 16)
    extend_hashes(large, 128 // block_size, block_size)
    step = block_size // 16
    assert large.hashes == small.hashes[step - 1 :: step]
    assert all(len(name) * 8 >= 128 for name in small.hashes)


def test_a_cut_may_run_through_several_bidirectional_spans() -> None:
    spans = tuple(
        Span(start, 16, 0, 0, Modality.IMAGE, Grid(1, 4, 4), 0.0, SpanAttention.BIDIRECTIONAL)
        for start in (8, 24, 40)
    )
    blocks = BlockManager(8, 16)
    released(blocks, computed(blocks, sequence(80, spans=spans, items=("k",))))
    assert blocks.cached_tokens(sequence(81, spans=spans, items=("k",))) == 80
    shorter = sequence(57, spans=spans, items=("k",))  # Three pages hit, each cuts a span.
    assert blocks.cached_tokens(shorter) == 0


def test_without_prefix_caching_nothing_is_shared() -> None:
    blocks = BlockManager(8, 16, prefix_caching=False)
    released(blocks, computed(blocks, sequence(48)))
    assert not blocks._cached
    assert blocks.cached_tokens(sequence(48)) == 0


def test_equal_pages_computed_twice_are_cached_once() -> None:
    blocks = BlockManager(8, 16)
    first, second = running(blocks, sequence(32)), running(blocks, sequence(32))
    for seq in (first, second):
        seq.num_computed = 32
        blocks.commit(seq)
    blocks.check_integrity([first, second])
    assert len(blocks._cached) == 2
    released(blocks, second)
    released(blocks, first)
    assert blocks.num_free == 8


def test_distrusted_pages_are_found_no_more() -> None:
    blocks = BlockManager(8, 16)
    seq = computed(blocks, sequence(48))
    blocks.evict_from_prefix_cache(seq)
    blocks.check_integrity([seq])
    assert blocks.cached_tokens(sequence(48)) == 0
    released(blocks, seq)
    assert blocks.num_free == 8


@pytest.mark.parametrize(
    "harm",
    [
        lambda blocks, seq: blocks._free.append(seq.block_table[0]),
        lambda blocks, seq: blocks._free.pop(),
        lambda blocks, seq: blocks._hash_of.popitem(),
        lambda blocks, seq: setattr(seq, "block_table", seq.block_table[:-1]),
        lambda blocks, seq: setattr(seq, "num_computed", 1000),
        lambda blocks, seq: setattr(seq, "status", Status.WAITING),
        lambda blocks, seq: setattr(seq, "block_table", seq.block_table * 2),
    ],
)
def test_integrity_checks_see_harm(harm: Any) -> None:
    blocks = BlockManager(8, 16)
    seq = computed(blocks, sequence(48))
    blocks.check_integrity([seq])
    harm(blocks, seq)
    with pytest.raises(RuntimeError):
        blocks.check_integrity([seq])


class Pages(RuleBasedStateMachine):
    """Any order of verbs, each allowed by its predicate, keeps the books balanced; and a page
    that is shared always holds what its reader expects of it (``contents``)."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(8, 16)
        self.live: list[Sequence] = []
        self.contents: dict[int, tuple[int, ...]] = {}  # Tokens up to the end of each page.

    @rule(
        target=sequences,
        lengths=st.lists(st.sampled_from((3, 16, 20)), min_size=1, max_size=4),
        tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4),
        skip=st.booleans(),
    )
    def allocate(self, lengths: list[int], tokens: list[int], skip: bool) -> Sequence | None:
        seq = sequence(1, skip_prefix_cache=skip)
        ids = [token for token, length in zip(tokens, lengths, strict=False) for _ in range(length)]
        seq.token_ids = ids
        seq.num_prompt = len(ids)
        if self.blocks.lacking(seq) > 0:
            return None
        free, cached = self.blocks.num_free, self.blocks.cached_tokens(seq)
        assert self.blocks.allocate(seq) == cached < len(ids)
        assert self.blocks.num_free >= free - len(seq.block_table)
        seq.status = Status.RUNNING
        self.live.append(seq)
        for index in range(cached // 16):
            assert self.contents[seq.block_table[index]] == tuple(ids[: 16 * (index + 1)])
        return seq

    @rule(seq=sequences, count=st.integers(1, 40))
    def compute(self, seq: Sequence | None, count: int) -> None:
        if seq not in self.live:
            return
        end = min(seq.num_computed + count, seq.num_tokens)
        first = seq.num_computed // 16
        seq.num_computed = end
        for index in range(first, self.blocks.blocks_for(end)):
            page = seq.block_table[index]
            assert self.blocks._references[page] == 1 or page not in self.blocks._hash_of
            self.contents[page] = tuple(seq.token_ids[: 16 * (index + 1)])
        self.blocks.commit(seq)

    @rule(seq=sequences, token=st.integers(0, 1))
    def grow(self, seq: Sequence | None, token: int) -> None:
        if seq not in self.live or not self.blocks.can_grow(seq, seq.num_tokens + 1):
            return
        self.blocks.grow(seq, seq.num_tokens + 1)
        seq.token_ids.append(token)

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: Sequence | None) -> Sequence | None:
        if parent not in self.live:
            return None
        child = Sequence(parent.generation, 1)
        child.token_ids = list(parent.token_ids)
        child.num_prompt = parent.num_prompt
        start = child.num_tokens - 1
        if not self.blocks.can_fork(parent, child, start):
            return None
        for source, destination in self.blocks.fork(parent, child, start):
            assert self.blocks._references[destination] == 1
            if source in self.contents:
                self.contents[destination] = self.contents[source]
        child.status = Status.RUNNING
        self.live.append(child)
        return child

    @rule(seq=consumes(sequences))
    def release(self, seq: Sequence | None) -> None:
        if seq in self.live:
            self.live.remove(seq)
            released(self.blocks, seq)

    @rule()
    def clear(self) -> None:
        clear_cache(self.blocks)

    @invariant()
    def balanced(self) -> None:
        self.blocks.check_integrity(self.live)

    def teardown(self) -> None:
        for seq in self.live:
            released(self.blocks, seq)
        self.blocks.check_integrity()
        assert self.blocks.num_free == 8


Pages.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPages = Pages.TestCase
