"""What requests forbid and shift: equal to a plain statement of it, read once, freed at the end."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_service.device.constraints import Constraints, constrains
from llm_service.device.sampler import Sampler
from opticnerve.generation.values import Sampling

VOCAB = 12
CPU = torch.device("cpu")


# ---- equal to a plain statement


@dataclass(slots=True)
class Running:
    """One sequence, as the reference sees it."""

    params: Sampling
    text: list[int]
    position: int = 0


def expected(logits: torch.Tensor, seq: Running) -> torch.Tensor:
    """One row, as llm.proto states it."""
    row, params = logits.clone(), seq.params
    for token, value in params.logit_bias.items():
        if token < VOCAB:
            row[token] += value
    forbidden = set()
    if params.allowed_token_ids:
        forbidden = set(range(VOCAB)) - set(params.allowed_token_ids)
    for *beginning, end in params.bad_words:
        if seq.text[len(seq.text) - len(beginning) :] == beginning:
            forbidden.add(end)
    if seq.position < params.min_tokens:
        forbidden.update(params.stop_token_ids)
        forbidden.update(() if params.ignore_eos else params.eos_token_ids or ())
    row[[token for token in forbidden if token < VOCAB]] = -torch.inf
    return row


# Few of them, so that words begin often; the last two are in no vocabulary.
FEW = st.sampled_from([0, 1, 1, 1, 2, VOCAB, VOCAB + 7])
ANY = st.integers(0, VOCAB + 2)
PARAMS = st.builds(
    Sampling,
    logit_bias=st.dictionaries(ANY, st.sampled_from([-2.0, 0.5, 3.0])),
    allowed_token_ids=st.lists(ANY, max_size=6).map(tuple),
    bad_words=st.lists(st.lists(FEW, min_size=1, max_size=5).map(tuple), max_size=9).map(tuple),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.lists(ANY, max_size=2).map(tuple),
    eos_token_ids=st.lists(ANY, max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=7)


def check_step(
    constraints: Constraints, running: dict[int, Running], slots: list[int], drawn: list[int]
) -> None:
    """All rows of a batch are as the reference has them; then each takes one more token."""
    rows = np.array(slots, dtype=np.int64)
    logits = torch.randn(len(slots), VOCAB)
    want = torch.stack([expected(logits[row], running[slot]) for row, slot in enumerate(slots)])
    constraints.apply(logits, rows, np.array([running[slot].position for slot in slots]))
    assert torch.equal(logits, want)
    constraints.observe(rows, drawn)
    for slot, token in zip(slots, drawn, strict=True):
        running[slot].text.append(token)
        running[slot].position += 1


@pytest.mark.slow
@given(st.lists(st.tuples(PARAMS, TEXT), min_size=1, max_size=3), st.data())
def test_steps_equal_the_reference_whatever_comes_and_goes(
    starts: list[tuple[Sampling, list[int]]], data: st.DataObject
) -> None:
    """Sequences begin, fork, move to another slot and end, between steps of any of them."""
    constraints = Constraints(VOCAB, CPU)
    running: dict[int, Running] = {}
    free = list(range(8))

    def admit(seq: Running) -> None:
        slot = free.pop(0)
        if constrains(seq.params):
            constraints.admit(slot, seq.params, seq.text)
        running[slot] = seq

    def release(slot: int) -> Running:
        constraints.release(slot)
        free.append(slot)
        return running.pop(slot)

    for params, text in starts:
        admit(Running(params, list(text)))
    for _ in range(data.draw(st.integers(1, 8))):
        slot = data.draw(st.sampled_from(sorted(running)))
        match data.draw(st.sampled_from(["step", "step", "step", "move", "fork", "end"])):
            case "move":
                admit(release(slot))
            case "fork" if free:
                admit(replace(running[slot], text=list(running[slot].text)))
            case "end" if len(running) > 1:
                release(slot)
            case _:
                slots = data.draw(st.permutations(sorted(running)))
                slots = slots[: data.draw(st.integers(1, len(slots)))]
                drawn = [data.draw(st.integers(0, 2)) for _ in slots]
                check_step(constraints, running, slots, drawn)


def test_nested_words_are_found_however_long_the_text() -> None:
    words = tuple((*[1] * length, 2 + length) for length in range(1, 9))
    constraints = Constraints(VOCAB, CPU)
    running = {0: Running(Sampling(bad_words=words), [0])}
    constraints.admit(0, running[0].params, running[0].text)
    for token in [1] * 12 + [0] + [1] * 3:
        check_step(constraints, running, [0], [token])


# ---- read once, freed at the end


class Read(tuple[Any, ...]):
    """A tuple that counts how often it is gone through or looked into."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.count += 1
        return super().__getitem__(index)

    def __contains__(self, item: object) -> bool:
        self.count += 1
        return super().__contains__(item)


class ReadMapping(dict[int, float]):
    """A dict that counts how often it is gone through."""

    count = 0

    def __iter__(self) -> Iterator[int]:
        self.count += 1
        return super().__iter__()

    def values(self) -> Any:
        self.count += 1
        return super().values()

    def items(self) -> Any:
        self.count += 1
        return super().items()


def test_lists_are_read_once_for_all_choices_and_never_by_a_step() -> None:
    params = Sampling(
        temperature=1.0,
        logit_bias=ReadMapping({3: 1.0, 4: -1.0}),
        bad_words=Read([(5,), (6, 7), (1, 1, 8)]),
        allowed_token_ids=Read(range(10)),
        min_tokens=3,
        stop_token_ids=Read([9]),
        eos_token_ids=Read([2]),
    )
    values = map(params.__getattribute__, params.__slots__)
    lists = [each for each in values if isinstance(each, Read | ReadMapping)]
    assert len(lists) == 5
    sampler = Sampler(VOCAB, 3, CPU)
    sampler.admit(0, params, 0, [1, 2], 2)
    once = [each.count for each in lists]
    assert all(count > 0 for count in once)
    sampler.admit(2, params, 1, [1, 2], 2)
    slots = np.array([2, 0])
    for position in range(6):
        drawn = sampler.sample(torch.randn(2, VOCAB), slots, np.full(2, position))
        sampler.observe(slots, drawn.token_ids.tolist())
    assert [each.count for each in lists] == once


LARGE = 100_000


def large() -> Sampling:
    return Sampling(
        logit_bias=dict.fromkeys(range(1000), 1.0),
        bad_words=tuple((token, token + 1, token + 2) for token in range(1000)),
        allowed_token_ids=tuple(range(0, LARGE, 2)),
        min_tokens=1,
        stop_token_ids=tuple(range(300)),
    )


def test_memory_goes_back_with_the_slot_and_choices_share_it() -> None:
    sampler = Sampler(LARGE, 3, CPU)
    sampler.admit(0, large(), 0, [1, 2], 2)  # Whatever the first use loads is not counted.
    sampler.release(0)
    tracemalloc.start()
    try:
        empty, _ = tracemalloc.get_traced_memory()

        def held() -> int:
            return tracemalloc.get_traced_memory()[0] - empty

        params = large()
        lists = held()
        sampler.admit(0, params, 0, [1, 2], 2)
        one = held() - lists
        assert one > 4 * LARGE
        for slot in (1, 2):
            sampler.admit(slot, params, slot, [1, 2], 2)
        assert held() - lists < 1.1 * one
        del params
        for slot in (0, 1):
            sampler.release(slot)
        assert held() > one  # The last choice still has it.
        sampler.release(2)
        assert held() < one / 4  # Python keeps some small tuples for later.
    finally:
        tracemalloc.stop()
