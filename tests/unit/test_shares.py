"""Who has how much: slots and pages by weight, prompts by what each sharer was given."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence as Many
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.policy.messages import GenerateRequest
from llm_service.policy.sequence import GenerationState, Sequence, Status
from llm_service.policy.shares import Shares
from opticnerve.generation.values import Sampling

PAGE = 16
_arrivals = itertools.count()


def sequence(
    share: str = "", length: int = 20, weight: float = 1.0, priority: int = 0, pages: int = 1
) -> Sequence:
    return choices(1, share, length, weight, priority, pages)[0]


def choices(
    count: int,
    share: str = "",
    length: int = 20,
    weight: float = 1.0,
    priority: int = 0,
    pages: int = 1,
) -> list[Sequence]:
    """All those of one request."""
    arrival = next(_arrivals)
    request = GenerateRequest(
        f"r{arrival}",
        tuple(range(length)),
        sampling=Sampling(n=count),
        priority=priority,
        share=share,
        weight=weight,
    )
    made = list(iter(GenerationState(request, arrival, 0.0).begin, None))
    for seq in made:
        seq.block_table = tuple(range(pages))
    return made


class Hall:
    """So many slots, and sequences that never end."""

    def __init__(self, slots: int) -> None:
        self.shares = Shares()
        self.slots = slots
        self.running: list[Sequence] = []

    def start(self, seq: Sequence) -> None:
        self.shares.dequeue(seq)
        self.shares.enter(seq)
        seq.status = Status.RUNNING
        self.running.append(seq)

    def stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.shares.leave(seq)
        seq.status = Status.WAITING
        self.shares.wait(seq)

    def settle(self) -> int:
        """Admits whom it may until nobody has a claim; returns how many were preempted."""
        preempted = 0
        moved = True
        while moved:
            moved = False
            for seq in tuple(self.shares.waiting()):
                full = len(self.running) == self.slots
                victims = self.shares.claim(seq, full, 0, 1, lambda _: 1) if full else []
                if victims is None:
                    continue
                for victim in victims:
                    self.stop(victim)
                self.start(seq)
                preempted += len(victims)
                moved = True
        return preempted

    def having(self) -> Counter[str]:
        return Counter(seq.request.share for seq in self.running)


sharers = st.lists(
    st.tuples(st.sampled_from((0.5, 1.0, 2.0, 3.0)), st.integers(0, 40)), min_size=1, max_size=6
)


@pytest.mark.slow
@given(sharers, st.integers(1, 40), st.randoms())
@settings(max_examples=40, deadline=None)
def test_places_are_shared_by_weight_whoever_came_first(
    wanted: list[tuple[float, int]], slots: int, chance: Random
) -> None:
    hall = Hall(slots)
    weights = {f"s{i}": weight for i, (weight, _) in enumerate(wanted)}
    wants = {f"s{i}": count for i, (_, count) in enumerate(wanted)}
    names = [name for name, count in wants.items() for _ in range(count)]
    if chance.random() < 0.5:
        chance.shuffle(names)
    for name in names:
        hall.shares.wait(sequence(name, weight=weights[name]))
        hall.settle()
    have = hall.having()
    assert sum(have.values()) == min(slots, len(names))  # None is left empty that is wanted.
    for poor in (name for name in weights if have[name] < wants[name]):
        for rich in weights:
            fair = have[rich] / weights[rich] <= (have[poor] + 1) / weights[poor]
            assert fair or have[rich] <= 1
            assert have[poor] or have[rich] <= 1  # As far as there are slots, each has one.
    assert hall.settle() == 0  # Nothing is taken back.


def test_a_place_is_taken_from_the_last_of_who_has_most() -> None:
    hall = Hall(6)
    many = [sequence("many") for _ in range(4)]
    few = [sequence("few") for _ in range(2)]
    for seq in (*many, *few):
        hall.shares.wait(seq)
    hall.settle()
    late = sequence("late")
    hall.shares.wait(late)
    assert hall.shares.claim(late, True, 0, 1, lambda _: 1) == [many[3]]
    assert hall.shares.claim(late, True, 0, 1, lambda _: 1, spared=[many[3]]) == [many[2]]


def test_nothing_is_taken_from_who_may_go_first_or_has_one_place() -> None:
    hall = Hall(3)
    for seq in (sequence("a", priority=-1), sequence("a", priority=-1), sequence("b")):
        hall.shares.wait(seq)
    hall.settle()
    for priority, found in ((0, False), (-1, True)):
        late = sequence("late", priority=priority)
        hall.shares.wait(late)
        assert bool(hall.shares.claim(late, True, 0, 1, lambda _: 1)) is found


def test_pages_are_claimed_from_who_has_more_even_after_it_lost_them() -> None:
    hall = Hall(8)
    large = [sequence("large", pages=4) for _ in range(4)]
    for seq in large:
        hall.shares.wait(seq)
    hall.settle()
    late = sequence("late")
    hall.shares.wait(late)

    def claim(pages: int) -> list[Sequence] | None:
        return hall.shares.claim(late, False, pages, pages, lambda seq: len(seq.block_table))

    assert claim(5) == [large[3], large[2]]
    assert claim(8) == [large[3], large[2]]
    assert claim(9) is None  # It would have more than those whom it takes them from.


def test_who_holds_most_pages_gives_them_up_but_never_the_first_of_all() -> None:
    hall = Hall(8)
    first = sequence("first", pages=9)
    heavy = [sequence("heavy", pages=3, weight=4.0), sequence("heavy", pages=3, weight=4.0)]
    light = [sequence("light", pages=2), sequence("light", pages=2)]
    for seq in (first, *heavy, *light):
        hall.shares.wait(seq)
    hall.settle()
    assert hall.shares.pick_victim(hall.running) is light[1]
    assert hall.shares.pick_victim(hall.running[:3]) is heavy[1]
    assert hall.shares.pick_victim([first]) is first


def test_a_request_that_runs_nothing_comes_before_further_choices_of_its_sharer() -> None:
    hall = Hall(3)
    many = choices(5, "app")
    for seq in many:
        hall.shares.wait(seq)
    hall.settle()
    few = [sequence("app"), *choices(2, "app")]
    urgent, patient = sequence("app", priority=-1), sequence("app", priority=1)
    for seq in (*few, urgent, patient):
        hall.shares.wait(seq)
    turns = list(hall.shares.turns([], admits=True))
    assert turns == [urgent, *few, many[3], many[4], patient]


def test_a_request_that_runs_nothing_takes_a_place_from_one_of_its_sharer_that_runs_most() -> None:
    hall = Hall(5)
    most, two = choices(3, "app"), choices(2, "app")
    for seq in (*most, *two):
        hall.shares.wait(seq)
    hall.settle()
    late = [sequence("app") for _ in range(5)]
    for seq in late:
        hall.shares.wait(seq)
    assert hall.shares.claim(late[0], True, 0, 1, lambda _: 1) == [most[2]]
    assert hall.shares.claim(late[0], True, 0, 1, lambda _: 1, spared=[most[2]]) == [two[1]]
    assert hall.settle() == 3
    assert set(hall.running) == {most[0], two[0], *late[:3]}  # Each has one, and keeps it.
    assert not any(map(hall.shares.may_claim_a_slot, hall.shares.waiting()))
    hall.shares.check_integrity(hall.running)


def test_a_sharer_takes_nothing_from_its_own_that_may_go_first_or_for_further_choices() -> None:
    hall = Hall(3)
    many = choices(4, "app", priority=-1)
    for seq in many:
        hall.shares.wait(seq)
    hall.settle()
    for priority, found in ((0, False), (-1, True)):
        late = sequence("app", priority=priority)
        hall.shares.wait(late)
        assert bool(hall.shares.claim(late, True, 0, 1, lambda _: 1)) is found
    assert not hall.shares.may_claim_a_slot(many[3])
    assert hall.shares.claim(many[3], True, 0, 1, lambda _: 1) is None


def test_what_a_sharer_gives_up_is_the_last_of_its_request_that_runs_most() -> None:
    hall = Hall(5)
    many, single = choices(3, "app", pages=2), sequence("app", pages=9)
    other = sequence("other")
    for seq in (*many, single, other):
        hall.shares.wait(seq)
    hall.settle()
    late = sequence("late")
    hall.shares.wait(late)
    assert hall.shares.claim(late, True, 0, 1, lambda _: 1) == [many[2]]
    assert hall.shares.claim(late, True, 2, 1, lambda _: 1) == [many[2], many[1]]
    assert hall.shares.pick_victim(hall.running) is many[2]


def test_pages_come_from_further_choices_of_its_sharer_as_far_as_they_go() -> None:
    hall = Hall(8)
    for seq in (many := choices(4, "app", pages=4)):
        hall.shares.wait(seq)
    hall.settle()
    late = sequence("app")
    hall.shares.wait(late)

    def claim(pages: int) -> list[Sequence] | None:
        return hall.shares.claim(late, False, pages, pages, lambda seq: len(seq.block_table))

    assert claim(5) == [many[3], many[2]]
    assert claim(12) == [many[3], many[2], many[1]]
    assert claim(13) is None  # Its first is its own.


def serve(shares: Shares, prompts: dict[str, list[Sequence]], tokens: int) -> Counter[str]:
    """Hands out ``tokens`` in steps, to who always wants more; what each was given."""
    given: Counter[str] = Counter()
    while sum(given.values()) < tokens:
        left = 32
        queue = [seq for each in prompts.values() for seq in each if seq.status is Status.RUNNING]
        for seq in shares.turns(queue, admits=False):
            chunk = min(left, seq.num_tokens - seq.num_computed)
            shares.charge(seq, chunk)
            seq.num_computed += chunk
            given[seq.request.share] += chunk
            left -= chunk
            if seq.num_computed == seq.num_tokens:
                shares.leave(seq)
                prompts[seq.request.share].remove(seq)
            if not left:
                break
        if left:
            break
    return given


def prefilling(shares: Shares, lengths: Many[int], share: str, weight: float) -> list[Sequence]:
    made = [sequence(share, length, weight) for length in lengths]
    for seq in made:
        shares.wait(seq)
        shares.dequeue(seq)
        shares.enter(seq)
        seq.status = Status.RUNNING
    return made


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from((0.5, 1.0, 2.0)), st.integers(1, 400)), min_size=2, max_size=5
    ),
    st.integers(100, 2000),
)
@settings(deadline=None)
def test_who_always_wants_more_is_given_prefill_by_weight(
    sizes: list[tuple[float, int]], tokens: int
) -> None:
    shares = Shares()
    weights = {f"s{i}": weight for i, (weight, _) in enumerate(sizes)}
    prompts = {
        f"s{i}": prefilling(shares, [length] * (2000 // length + 2), f"s{i}", weight)
        for i, (weight, length) in enumerate(sizes)
    }
    given = serve(shares, prompts, tokens)
    assert sum(given.values()) >= tokens  # Nothing is left while anybody wants more.
    for (one, (_, a)), (other, (_, b)) in itertools.combinations(
        zip(weights, sizes, strict=True), 2
    ):
        lag = given[one] / weights[one] - given[other] / weights[other]
        assert -a / weights[one] <= lag <= b / weights[other]


def test_time_in_which_nothing_was_wanted_earns_nothing() -> None:
    shares = Shares()
    prompts = {"busy": prefilling(shares, [100] * 60, "busy", 1.0)}
    serve(shares, prompts, 4000)
    prompts["late"] = prefilling(shares, [100] * 20, "late", 1.0)
    given = serve(shares, prompts, 2000)
    assert abs(given["busy"] - given["late"]) <= 100


def test_leaving_and_coming_back_forgets_nothing() -> None:
    """One that ends each request before it sends the next is not always the newest."""
    shares = Shares()
    prompts = {"stays": prefilling(shares, [100] * 40, "stays", 1.0), "returns": []}
    given: Counter[str] = Counter()
    while sum(given.values()) < 3000:
        if not prompts["returns"]:
            prompts["returns"] = prefilling(shares, [50], "returns", 1.0)
        given += serve(shares, prompts, 1)
    assert given["returns"] == pytest.approx(1500, abs=150)


def test_requests_without_a_name_share_by_request_and_in_order_where_they_are_alike() -> None:
    shares = Shares()
    made = [prefilling(shares, [100], "", 1.0)[0] for _ in range(5)]
    assert list(shares.turns(made, admits=False)) == made
    short = prefilling(shares, [10], "", 1.0)[0]
    assert next(iter(shares.turns([*made, short], admits=False))) is short


def test_a_long_prompt_is_overtaken_by_so_many_tokens_alone() -> None:
    """Each request is a sharer of its own, and a short one comes before every step."""
    shares = Shares()
    long = prefilling(shares, [600], "", 1.0)[0]
    overtaking = 0
    while long.num_computed < long.num_tokens:
        short = prefilling(shares, [40], "", 1.0)[0]
        left = 32
        for seq in shares.turns([s for s in (long, short) if s.status is Status.RUNNING], False):
            chunk = min(left, seq.num_tokens - seq.num_computed)
            shares.charge(seq, chunk)
            seq.num_computed += chunk
            left -= chunk
            overtaking += chunk if seq is short else 0
        shares.leave(short)
    assert overtaking <= 2 * 600


def test_names_that_are_gone_are_forgotten() -> None:
    shares = Shares()
    for number in range(100):
        seq = prefilling(shares, [10], "" if number % 2 else f"n{number}", 1.0)[0]
        shares.charge(seq, 10)
        seq.num_computed = 10
        shares.leave(seq)
    assert len(shares._sharers) <= 2


@pytest.mark.parametrize("field", ["num_waiting", "running", "slots"])
def test_integrity_checks_see_harm(field: str) -> None:
    hall = Hall(4)
    hall.shares.wait(sequence("a"))
    hall.settle()
    hall.shares.check_integrity(hall.running)
    if field == "running":
        hall.running.clear()
    elif field == "slots":
        hall.shares.of(hall.running[0]).slots.clear()
    else:
        hall.shares.num_waiting = 3
    with pytest.raises(RuntimeError):
        hall.shares.check_integrity(hall.running)
