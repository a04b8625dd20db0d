"""Who computes what in a step: order, budget, room, and that everybody gets on."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.policy.block_manager import BlockManager
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import GenerateRequest
from llm_service.policy.scheduler import Scheduler
from llm_service.policy.sequence import GenerationState, Sequence, Status
from llm_service.policy.step_plan import StepPlan
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid, Modality, Span, SpanAttention
from tests.fake_runner import FakeRows, Machine


class Desk:
    """A scheduler, and a step that only counts, and takes as long as ``machine`` says."""

    def __init__(self, machine: Machine | None = None, **config: Any) -> None:
        self.machine = machine
        values = {
            "num_blocks": 16,
            "block_size": 16,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "row_bytes": 1,
        }
        self.config = EngineConfig(**{**values, **config})
        self.rows = FakeRows()
        self.blocks = BlockManager(self.config.num_blocks, self.config.block_size)
        self.scheduler = Scheduler(self.config, self.blocks, self.rows)
        self.arrivals = 0
        self.slots: dict[int, Sequence] = {}

    def add(self, length: int = 20, priority: int = 0, **fields: Any) -> Sequence:
        """Prompts share nothing unless ``first`` says so: each begins with its own number."""
        self.arrivals += 1
        sampling = Sampling(max_tokens=fields.pop("max_tokens", 8), n=fields.pop("n", 1))
        tokens = (fields.pop("first", 1000 + self.arrivals), *range(length - 1))
        request = GenerateRequest(
            f"r{self.arrivals}", tokens, sampling=sampling, priority=priority, **fields
        )
        seq = GenerationState(request, self.arrivals, 0.0).begin()
        assert seq is not None
        self.scheduler.add(seq)
        return seq

    def step(self) -> StepPlan | None:
        most = self.most_prefill()
        plan = self.scheduler.schedule(0.0)
        self.scheduler.check_integrity()
        if plan is not None:
            self.check(plan)
            assert plan.num_tokens - plan.num_decodes <= most
            self.commit(plan)
            self.scheduler.check_integrity()
        return plan

    def most_prefill(self) -> int:
        """Prefill tokens that the next step may have: what fits its time, or a page."""
        running, target_s = self.scheduler.running, self.config.max_step_s
        decodes = sum(
            1 for seq in running if seq.num_output and seq.num_computed + 1 == len(seq.token_ids)
        )
        if not (decodes and target_s):
            return self.config.max_num_batched_tokens
        fitting = self.scheduler.costs.prefill_tokens(decodes, target_s)
        return max(fitting, self.blocks.block_size)

    def check(self, plan: StepPlan) -> None:
        """What the runner may rely on."""
        works = plan.works
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        for slot in plan.freed_slots:
            self.slots.pop(slot)
        for work in works:
            assert self.slots.setdefault(work.slot, work.seq) is work.seq
            assert 0 <= work.slot < self.config.max_num_seqs
            end = work.start + work.num_tokens
            assert len(work.block_table) == self.blocks.blocks_for(end)
            assert work.samples == (end == work.seq.num_tokens)
        assert len(set(self.slots.values())) == len(self.slots)

    def commit(self, plan: StepPlan) -> None:
        if self.machine is not None:
            self.scheduler.costs.learn(plan, self.machine.run(plan))
        for work in plan.works:
            self.scheduler.advance(work.seq, work.start + work.num_tokens)
            if work.samples:
                for child in iter(work.seq.generation.begin, None):
                    self.scheduler.fork(work.seq, child)
                work.seq.token_ids.append(7)
                work.seq.last_token_on_device = True
                if work.seq.num_output == work.seq.request.sampling.max_tokens:
                    self.scheduler.remove(work.seq)


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    assert plan is not None
    return [(work.seq.request_id, work.start, work.num_tokens) for work in plan.works]


def test_one_budget_for_decoding_and_prefill() -> None:
    desk = Desk()
    desk.add(10)
    assert shape(desk.step()) == [("r1", 0, 10)]
    desk.add(50)
    assert shape(desk.step()) == [("r1", 10, 1), ("r2", 0, 31)]
    assert shape(desk.step()) == [("r1", 11, 1), ("r2", 31, 19)]
    assert shape(desk.step()) == [("r1", 12, 1), ("r2", 50, 1)]


def test_whoever_runs_comes_before_whoever_waits() -> None:
    desk = Desk()
    desk.add(60, share="ada")
    desk.step()
    desk.add(10, priority=-9, share="ada")
    plan = desk.step()
    assert sorted(shape(plan)) == [("r1", 32, 28), ("r2", 0, 4)]
    assert desk.scheduler.running[0].request_id == "r2"  # Now that it runs, it comes first.


def test_the_queue_is_by_priority_then_arrival() -> None:
    desk = Desk(max_num_seqs=1, max_num_batched_tokens=200)
    for priority in (0, 5, -5, 0):
        desk.add(10, priority, max_tokens=1)
    order = []
    while plan := desk.step():
        order += [work.seq.request_id for work in plan.works]
    assert order == ["r3", "r1", "r4", "r2"]


def test_idle_is_none() -> None:
    assert Desk().step() is None


def test_the_last_in_order_makes_room() -> None:
    desk = Desk(num_blocks=4)
    first, second = desk.add(30, max_tokens=30), desk.add(30, max_tokens=30)
    while not desk.scheduler.num_preemptions:
        desk.step()
    assert second.status is Status.WAITING
    assert (second.num_computed, second.block_table, second.slot) == (0, (), -1)
    assert second.num_output > 0
    assert first.status is Status.RUNNING
    while desk.step():
        pass
    assert first.status is second.status is Status.FINISHED
    assert desk.blocks.num_free == 4


def test_a_high_priority_latecomer_preempts_when_it_grows() -> None:
    desk = Desk(num_blocks=4)
    low, high = desk.add(20, priority=1, max_tokens=40), desk.add(30, priority=0, max_tokens=30)
    while not desk.scheduler.num_preemptions:
        desk.step()
    assert low.status is Status.WAITING
    assert high.status is Status.RUNNING


def test_a_preempted_sequence_is_told_as_new() -> None:
    desk = Desk(num_blocks=4)
    desk.add(30, max_tokens=30)
    desk.add(30, max_tokens=30)
    while not desk.scheduler.num_preemptions:
        plan = desk.step()
    assert plan is not None
    freed = plan.freed_slots
    assert len(freed) == 1
    while not any(work.seq.request_id == "r2" for work in plan.works):
        plan = desk.step()
        assert plan is not None
    (work,) = (work for work in plan.works if work.seq.request_id == "r2")
    assert not work.last_token_on_device


def test_pages_of_a_victim_that_the_claimant_shares_are_not_counted_as_freed() -> None:
    """Its prefix hit would keep them, so that preempting the one victim would not suffice."""
    desk = Desk(num_blocks=12, max_num_batched_tokens=64)
    theirs = [desk.add(60, share="ada", max_tokens=100) for _ in range(3)]
    while not all(seq.num_output for seq in theirs):
        desk.step()
    claimant = desk.add(112, share="bob", first=1003)  # Starts like the last of them.
    desk.step()
    assert claimant.status is Status.RUNNING
    assert [seq.status for seq in theirs] == [Status.RUNNING, Status.WAITING, Status.WAITING]


def test_two_that_do_not_fit_together_do_not_chase_each_other() -> None:
    desk = Desk(num_blocks=4)
    pair = [desk.add(20, max_tokens=44), desk.add(20, max_tokens=44)]
    steps = 0
    while desk.step():
        steps += 1
    assert all(seq.status is Status.FINISHED for seq in pair)
    assert steps < 150
    assert desk.scheduler.num_preemptions < 5


def test_the_first_in_line_is_not_overtaken_for_want_of_pages() -> None:
    desk = Desk(num_blocks=6, max_num_batched_tokens=200)
    desk.add(40, max_tokens=20, share="ada")
    desk.step()
    large, small = desk.add(60, share="ada"), desk.add(10, share="ada")
    desk.step()
    assert large.status is small.status is Status.WAITING
    while large.status is Status.WAITING:
        assert small.status is Status.WAITING
        desk.step()


def test_a_span_that_is_atomic_waits_for_a_whole_budget() -> None:
    span = Span(0, 32, 0, 0, Modality.IMAGE, Grid(1, 8, 16), 0.0, SpanAttention.BIDIRECTIONAL)
    desk = Desk()
    desk.rows.present.add("k")
    desk.add(10, max_tokens=5, share="ada")
    desk.step()
    atomic = desk.add(40, spans=(span,), items=("k",), share="ada")
    behind = desk.add(5, share="ada")
    while atomic.status is Status.WAITING:
        assert behind.status is Status.WAITING  # Else its tokens would be in the way for ever.
        plan = desk.step()
    assert shape(plan)[0] == ("r2", 0, 32)


def test_blocked_sequences_let_others_pass() -> None:
    span = Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))
    desk = Desk()
    blocked = desk.add(20, spans=(span,), items=("k",))
    desk.add(10)
    assert shape(desk.step()) == [("r2", 0, 10)]
    assert desk.scheduler.take_needs() == [(blocked, ("k",))]
    assert desk.scheduler.take_needs() == []
    desk.rows.present.add("k")
    assert shape(desk.step()) == [("r2", 10, 1)]  # Nobody has said that they are there.
    desk.scheduler.rows_ready("k")
    assert shape(desk.step()) == [("r2", 11, 1), ("r1", 0, 20)]


def test_pictures_that_are_slow_to_come_leave_room_for_text() -> None:
    span = Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))
    desk = Desk(max_num_seqs=4)
    pictures = [desk.add(20, spans=(span,), items=(f"k{i}",)) for i in range(6)]
    desk.rows.present.add("k5")
    text = desk.add(10)
    while desk.step():
        pass
    assert text.status is Status.FINISHED
    assert [seq.status for seq in pictures] == [Status.RUNNING] * 2 + [Status.WAITING] * 4
    for i in range(6):
        desk.rows.present.add(f"k{i}")
        desk.scheduler.rows_ready(f"k{i}")
        desk.step()
    while desk.step():
        pass
    assert all(seq.status is Status.FINISHED for seq in pictures)


def test_a_picture_whose_rows_are_found_does_not_wait_behind_those_that_are_encoded() -> None:
    span = Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))
    desk = Desk(max_num_seqs=4)
    slow = [desk.add(20, spans=(span,), items=(f"k{i}",)) for i in range(2)]
    desk.step()
    found = desk.add(20, spans=(span,), items=("k2",))
    desk.step()
    assert [seq.status for seq in slow] == [Status.RUNNING] * 2
    assert found.status is Status.WAITING
    found.generation.available_keys.add("k2")
    desk.step()
    assert found.status is Status.RUNNING


def test_pictures_of_one_that_are_slow_to_come_leave_room_for_those_of_another() -> None:
    span = Span(0, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))
    desk = Desk(max_num_seqs=6)
    slow = [desk.add(20, spans=(span,), items=(f"k{i}",), share="ada") for i in range(6)]
    while desk.step():
        pass
    assert [seq.status for seq in slow] == [Status.RUNNING] * 3 + [Status.WAITING] * 3
    victim = desk.add(30, spans=(span,), items=("v",), share="bob")
    another = desk.add(30, spans=(span,), items=("v",), share="bob")
    while desk.step():
        pass
    assert (victim.status, another.status) == (Status.RUNNING, Status.WAITING)
    desk.rows.present.add("v")
    desk.scheduler.rows_ready("v")
    while desk.step():
        pass
    assert victim.status is another.status is Status.FINISHED


def test_segments_follow_the_chunk() -> None:
    spans = (
        Span(5, 20, 0, 0, Modality.IMAGE, Grid(1, 4, 20)),
        Span(30, 10, 0, 20, Modality.IMAGE, Grid(1, 4, 10)),
    )
    desk = Desk(max_num_batched_tokens=16)
    desk.rows.present.add("k")
    desk.add(45, spans=spans, items=("k",))
    seen = []
    for _ in range(3):
        plan = desk.step()
        assert plan is not None
        seen.append(
            [(each.chunk_offset, each.row_start, each.num_rows) for each in plan.works[0].segments]
        )
    assert seen == [[(5, 0, 11)], [(0, 11, 9), (14, 20, 2)], [(0, 22, 8)]]


@pytest.mark.parametrize("field", ["waiting", "running", "slots", "leases"])
def test_integrity_checks_see_harm(field: str) -> None:
    desk = Desk()
    seq = desk.add()
    desk.step()
    scheduler = desk.scheduler
    match field:
        case "waiting":
            scheduler.shares.wait(seq)
        case "running":
            scheduler.running.clear()
        case "slots":
            scheduler._free_slots.pop()
        case "leases":
            seq.leases["k"] = 4
    with pytest.raises(RuntimeError):
        scheduler.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("shares", [("ada",), ("",), ("ada", "bob", "")])
@given(st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_the_first_always_gets_on_and_nobody_waits_for_ever(
    shares: tuple[str, ...], seed: int
) -> None:
    """New sequences come at every step, more than there is room for. Of one sharer and equal
    priority, each ends within the work of those before it."""
    chance = Random(seed)
    slowness = 10 ** chance.uniform(-5, 1)
    desk = Desk(
        Machine(slowness, slowness / 10, slowness * chance.choice((0.001, 0.1, 10))),
        max_step_s=chance.choice((0.0, 0.01, 0.2)),
        num_blocks=chance.choice((6, 8, 16)),
        max_num_seqs=chance.randint(1, 6),
        max_num_batched_tokens=chance.choice((16, 33, 100)),
    )
    sequences: list[Sequence] = []
    steps = 0
    while steps < 150 or any(seq.status is not Status.FINISHED for seq in sequences[:30]):
        steps += 1
        if desk.scheduler.shares.num_waiting < 20:
            length, max_tokens = chance.randint(1, 60), chance.randint(1, 30)
            share = chance.choice(shares)
            sequences.append(desk.add(length, max_tokens=max_tokens, share=share))
        first = min(seq.order for seq in sequences if seq.status is not Status.FINISHED)
        plan = desk.step()
        assert plan is not None
        if shares == ("ada",):
            assert min(work.seq.order for work in plan.works) <= first
        assert steps < 3000
    while desk.step():
        pass
    assert all(seq.status is Status.FINISHED for seq in sequences)
    assert desk.blocks.num_free == desk.config.num_blocks


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_one_sharer_has_asked_for_another_has_a_token_within_a_few_steps(
    seed: int,
) -> None:
    chance = Random(seed)
    desk = Desk(
        num_blocks=chance.choice((16, 24, 48)),
        max_num_seqs=chance.randint(2, 6),
        max_num_batched_tokens=chance.choice((48, 64, 100)),
    )
    for _ in range(chance.randint(1, 30)):
        desk.add(chance.randint(1, 90), max_tokens=chance.randint(1, 90), share="mallory")
        for _ in range(chance.choice((0, 0, 1, 5, 20))):
            desk.step()
    victim = desk.add(chance.randint(1, 32), max_tokens=20, share="ada")
    steps = 0
    while not victim.num_output:
        desk.step()
        steps += 1
        if chance.random() < 0.5:
            desk.add(chance.randint(1, 90), max_tokens=90, share="mallory")
    assert steps <= 6  # The longest prompt of the other, in steps of 32 tokens, and its own.
    while victim.status is not Status.FINISHED:
        before = victim.num_output
        desk.step()
        assert victim.num_output == before + 1


@pytest.mark.parametrize("count", [1, 3, 6])
def test_many_choices_of_one_request_leave_others_of_its_sharer_a_place(count: int) -> None:
    """They come while all places are taken; as many as can have one get on at once."""
    desk = Desk(num_blocks=64, max_num_batched_tokens=128)
    many = desk.add(max_tokens=60, n=24, share="app")
    for _ in range(3):
        desk.step()
    assert len(desk.scheduler.running) == 4
    late = [desk.add(10, max_tokens=5, share="app") for _ in range(count)]
    desk.step()
    assert [seq.num_output for seq in late] == ([1] * 3 + [0] * 3)[:count]
    steps = 1
    while any(seq.status is not Status.FINISHED for seq in late):
        before = many.num_output
        desk.step()
        assert many.num_output == before + 1  # The first of the choices gets on all the same.
        steps += 1
    assert steps <= 5 * -(-count // 3)
    while desk.step():
        pass
    assert all(seq.status is Status.FINISHED for seq in many.generation.sequences)
    assert desk.scheduler.num_preemptions == min(count, 3)  # Nothing was taken back.


def test_requests_of_one_sharer_that_come_one_by_one_take_a_place_each_and_no_more() -> None:
    desk = Desk(num_blocks=64, max_num_batched_tokens=128)
    many = desk.add(max_tokens=60, n=24, share="app")
    late: list[Sequence] = []
    while desk.step():
        if not desk.scheduler._step % 10 and len(late) < 20:
            assert all(seq.status is Status.FINISHED for seq in late)
            late.append(desk.add(10, max_tokens=5, share="app"))
    assert len(late) == 20
    assert all(seq.status is Status.FINISHED for seq in many.generation.sequences)
    assert desk.scheduler.num_preemptions <= len(late)


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_choices_a_sharer_has_a_request_of_it_has_a_token_within_a_few_steps(
    seed: int,
) -> None:
    """There is room for one choice of each request, and too little for all."""
    chance = Random(seed)
    count = chance.randint(1, 3)
    desk = Desk(
        num_blocks=12 * count + 6,
        max_num_seqs=count + chance.randint(1, 8),
        max_num_batched_tokens=chance.choice((48, 64, 100)),
    )
    many = []
    for _ in range(count):
        length, n = chance.randint(1, 90), chance.randint(1, 12)
        many.append(desk.add(length, max_tokens=chance.randint(1, 90), n=n, share="app"))
        for _ in range(chance.choice((0, 5, 20, 60))):
            desk.step()
    victim = desk.add(chance.randint(1, 32), max_tokens=20, share="app")
    steps = 0
    while not victim.num_output:
        desk.step()
        steps += 1
    assert steps <= 12  # What of the others was begun, in steps of 32 tokens, and its own.
    while victim.status is not Status.FINISHED:
        before = victim.num_output
        desk.step()
        assert victim.num_output == before + 1
    while desk.step():
        steps += 1
        assert steps < 3000
    finished = [seq.status is Status.FINISHED for each in many for seq in each.generation.sequences]
    assert all(finished)
    assert desk.scheduler.num_preemptions <= 4 * len(finished)
    assert not victim.preemptions
