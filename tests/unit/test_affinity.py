"""The choice of an LLM worker by what its prefix cache probably has."""

import copy
import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.clock import Deadline
from gateway.workers import affinity as policy
from gateway.workers.affinity import ENDS, Affinity, PromptChain, Reason
from gateway.workers.dispatch import Dispatcher, LeaseRequest
from gateway.workers.worker import Description, WorkerState
from opticnerve.media.plan import Grid, Modality, Span

SYSTEM = tuple(range(1000, 1320))


@dataclass(eq=False)
class Machine:
    """A worker that takes any work."""

    address: str
    description: Description = field(
        default_factory=lambda: Description(
            limits={"prefix_cache_tokens": 100_000}, instance_id="1"
        )
    )
    pending: int = 0
    cost_of_other_gateways: int = 0
    last_picked: int = 0
    cost_per_s = 0.0
    state = WorkerState.SERVING

    def has_room(self, cost, heavy):
        return True

    def lend(self, cost, heavy):
        self.pending += cost

    def take_back(self, cost, heavy, done):
        self.pending -= cost


def machines(count):
    return [Machine(f"10.0.0.{number}:7002") for number in range(count)]


def picture(offset, key=0, num_tokens=64):
    return Span(offset, num_tokens, key, 0, Modality.IMAGE, Grid(1, 16, 16))


def text(*parts):
    """A prompt of ``parts``: numbers of 40 tokens each, after the system prompt."""
    return PromptChain.of((*SYSTEM, *(part * 50 + i for part in parts for i in range(40))))


def lend(dispatcher, prompt, **fields):
    request = LeaseRequest(1, Deadline(0.0), prompt=prompt, **fields)
    dispatcher.add(request)
    assert request.worker is not None
    return request


def served(dispatcher, prompt):
    """The worker that a prompt is lent, and why; it has answered."""
    request = lend(dispatcher, prompt)
    dispatcher.end(request)
    return request.worker, request.reason


def warm(dispatcher, count=40):
    """So many conversations of one turn, so that the system prompt is known to be common."""
    for number in range(count):
        served(dispatcher, text(100_000 + number))


# ---- chains


def test_links_are_whole_units_and_at_most_an_eighth_of_what_is_before_them():
    for start, end in itertools.pairwise((0, *ENDS)):
        assert (end - start) % 16 == 0
        assert 0 < end - start <= max(16, start / 8)
    assert len(PromptChain.of(range(32_768)).links) < 80


@given(st.integers(0, 900), st.integers(0, 900))
def test_a_token_is_in_the_links_from_its_own_on(length, place):
    tokens = list(range(length))
    before = PromptChain.of(tokens).links
    if place < length:
        tokens[place] += 1
    after = PromptChain.of(tokens).links
    assert len(before) == len(after) == sum(end <= length for end in ENDS)
    for end, one, other in zip(ENDS, before, after, strict=False):
        assert (one == other) == (end <= place or place >= length)


def test_links_cover_the_pictures_and_the_salt():
    tokens = (*range(40), *[7] * 64, *range(60))
    spans, keys = (picture(40),), ("a" * 64,)
    plain = PromptChain.of(tokens, spans, keys).links
    others = [
        PromptChain.of(tokens, spans, ("b" * 64,)),
        PromptChain.of(tokens, (replace(spans[0], grid_thw=Grid(1, 8, 32)),), keys),
        PromptChain.of(tokens, (replace(spans[0], row_start=1),), keys),
        PromptChain.of(tokens, (replace(spans[0], token_offset=41, num_tokens=63),), keys),
    ]
    for other in others:
        assert other.links[:2] == plain[:2] and not set(other.links[2:]) & set(plain[2:])
    salted = PromptChain.of(tokens, spans, keys, "tenant").links
    assert not set(salted) & set(plain)


# ---- what is remembered


prompts = st.lists(
    st.lists(st.integers(0, 3), max_size=8).map(
        lambda parts: PromptChain.of([part for part in parts for _ in range(20)])
    ),
    max_size=12,
)


@given(prompts, st.sampled_from([0, 100, 300, 10_000]))
def test_memory_is_bounded_and_never_has_a_link_without_those_before_it(sent, capacity):
    machine = Machine("a", Description(limits={"prefix_cache_tokens": capacity}))
    affinity = Affinity()
    for number, prompt in enumerate(sent):
        affinity.begin(prompt, machine)
        affinity.computed(prompt, machine)
        state = affinity._sent[machine]
        assert state.tokens == sum(state.links.values()) <= capacity
        assert state.backlog == 0 and not state.computing
        for other in sent[: number + 1]:
            here = [link in state.links for link in other.links]
            assert here == sorted(here, reverse=True)
            assert policy._tokens(state.matched(other)) == sum(
                state.links[link] for link in other.links if link in state.links
            )


def test_the_number_of_links_is_bounded_too(monkeypatch):
    monkeypatch.setattr(policy, "MAX_LINKS", 40)
    machine, affinity = Machine("a"), Affinity()
    for number in range(50):
        affinity.begin(text(number), machine)
    assert len(affinity._sent[machine].links) == 40
    monkeypatch.setattr(policy, "MAX_LINKS_OF_ALL", 60)
    others = machines(5)
    for number in range(50):
        for other in (machine, *others):
            affinity.begin(text(number), other)
    assert [len(affinity._sent[each].links) for each in (machine, *others)] == [10] * 6


def test_traffic_is_measured_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(policy, "WINDOW", 10)
    traffic = Affinity()._traffic
    for number in range(100):
        traffic.add(text(number))
    assert len(traffic._uses) + len(traffic._uses_before) < 20 * len(text(1).links)
    assert policy._tokens(traffic.common(text(3000), 4)) == 320


def test_a_worker_that_is_gone_is_forgotten():
    affinity = Affinity()
    affinity.begin(text(1), Machine("a"))
    assert not affinity._sent


@settings(max_examples=30)
@given(prompts, prompts)
def test_choosing_changes_nothing(sent, asked):
    pool = machines(3)
    dispatcher = Dispatcher(pool)
    for prompt in sent:
        served(dispatcher, prompt)
    affinity = dispatcher.affinity
    before = [copy.deepcopy(affinity._sent.get(machine)) for machine in pool]
    chosen = [affinity.choose(prompt, pool) for prompt in asked]
    assert chosen == [affinity.choose(prompt, pool) for prompt in asked]
    for machine, state in zip(pool, before, strict=True):
        now = affinity._sent.get(machine)
        assert now is state is None or (now.links == state.links and now.backlog == state.backlog)


# ---- the choice


def test_a_follow_up_goes_where_its_prefix_is():
    dispatcher = Dispatcher(machines(4))
    warm(dispatcher)
    for number in range(20):
        first, reason = served(dispatcher, text(number))
        assert reason is Reason.RENDEZVOUS
        warm(dispatcher, 3)
        assert served(dispatcher, text(number, 7, 8)) == (first, Reason.PREFIX)


def test_a_system_prompt_that_everybody_has_pulls_nobody():
    pool = machines(4)
    dispatcher = Dispatcher(pool)
    warm(dispatcher)
    chosen = Counter(served(dispatcher, text(number))[0].address for number in range(400))
    assert max(chosen.values()) <= 1.3 * 100


def test_one_prompt_again_and_again_goes_to_all_workers_in_turn():
    pool = machines(4)
    dispatcher = Dispatcher(pool)
    chosen = Counter(served(dispatcher, text(1))[0].address for _ in range(108))
    assert max(chosen.values()) <= 25 + policy.MIN_USES
    assert served(dispatcher, text(1))[1] is Reason.LOAD


def test_a_busy_worker_is_passed_over_and_the_new_one_remembered():
    pool = machines(2)
    dispatcher = Dispatcher(pool)
    warm(dispatcher)
    first, _ = served(dispatcher, text(1, 2, 3))
    other = next(machine for machine in pool if machine is not first)
    long = PromptChain.of(range(50_000, 52_000))
    queued = lend(dispatcher, long, accepts=lambda worker: worker is first)
    assert served(dispatcher, text(1, 2, 3, 4)) == (other, Reason.LOAD)
    dispatcher.prompt_computed(queued)
    assert served(dispatcher, text(1, 2, 3, 4, 5)) == (other, Reason.PREFIX)
    dispatcher.end(queued)
    assert dispatcher.affinity._sent[first].backlog == 0


def test_a_wait_shorter_than_the_recomputation_is_waited_for():
    dispatcher = Dispatcher(machines(2))
    warm(dispatcher)
    conversation = tuple(range(10, 40))
    first, _ = served(dispatcher, text(*conversation))
    lend(dispatcher, text(5), accepts=lambda worker: worker is first)
    assert served(dispatcher, text(*conversation, 1)) == (first, Reason.PREFIX)


def test_a_worker_that_started_again_is_empty():
    dispatcher = Dispatcher(machines(2))
    warm(dispatcher)
    first, _ = served(dispatcher, text(1))
    first.description = replace(first.description, instance_id="2")
    assert served(dispatcher, text(1, 2))[1] is Reason.RENDEZVOUS


def test_a_request_that_reads_no_cache_and_a_worker_without_one_are_chosen_by_load():
    pool = machines(3)
    dispatcher = Dispatcher(pool)
    served(dispatcher, text(1))
    blind = PromptChain.of(range(400), reads_cache=False)
    pool[0].pending = pool[1].pending = 1
    assert served(dispatcher, blind) == (pool[2], Reason.LOAD)
    for machine in pool:
        machine.description = Description(instance_id="2")
    assert served(dispatcher, text(1)) == (pool[2], Reason.LOAD)


def test_a_prompt_too_short_to_tell_goes_by_load():
    assert served(Dispatcher(machines(3)), PromptChain.of(range(15)))[1] is Reason.LOAD


# ---- agreement and churn


def first_turns(count):
    """With a picture, and of text alone."""
    for number in range(count):
        tokens = (*SYSTEM, *[7] * 64, *range(number, number + 40))
        yield PromptChain.of(tokens, (picture(320),), (f"{number:064x}",))
        yield text(number)


def test_gateways_agree_on_conversations_whatever_each_has_served():
    one, other = Dispatcher(machines(8)), Dispatcher(machines(8))
    for dispatcher in (one, other):
        warm(dispatcher)
    for number, prompt in enumerate(first_turns(40)):
        there = one.affinity.choose(prompt, list(one._workers))
        here = other.affinity.choose(prompt, list(other._workers))
        assert there[0].address == here[0].address
        assert there[1] is here[1] is Reason.RENDEZVOUS
        served(one, text(200_000 + number))  # The other one learns nothing of these.


def test_all_turns_of_a_conversation_agree_at_a_gateway_that_has_seen_none():
    pool = machines(8)
    for number in range(30):
        key = f"{number:064x}"
        start = (*SYSTEM[:100], *[7] * 64)
        turns = [PromptChain.of((*start, *range(n)), (picture(100),), (key,)) for n in (9, 99, 999)]
        assert len({Affinity().choose(turn, pool)[0] for turn in turns}) == 1


@pytest.mark.parametrize("count", [2, 5, 16])
def test_removing_a_worker_moves_its_own_conversations_alone(count):
    pool, affinity = machines(count), Affinity()
    turns = list(first_turns(100))
    before = [affinity.choose(turn, pool)[0] for turn in turns]
    gone = pool[count // 2]
    rest = [machine for machine in pool if machine is not gone]
    after = [affinity.choose(turn, rest)[0] for turn in turns]
    moved = [old for old, new in zip(before, after, strict=True) if old is not new]
    assert set(moved) <= {gone}
    assert len(moved) == before.count(gone)
