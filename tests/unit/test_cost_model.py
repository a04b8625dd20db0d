"""What a step is expected to take: on machines of any speed, and on one that changes."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.policy.budget import CostModel
from llm_service.policy.messages import GenerateRequest
from llm_service.policy.sequence import GenerationState, Sequence
from llm_service.policy.step_plan import StepPlan, Work
from tests.fake_runner import Machine

pytestmark = pytest.mark.slow

TARGET_S = 0.2
MOST_TOKENS = 2048
CPU = Machine(0.015, 0.003, 0.0017)


def sequence() -> Sequence:
    seq = GenerationState(GenerateRequest("a", (1, 2)), 0, 0.0).begin()
    assert seq is not None
    return seq


SEQ = sequence()


def step(decodes: int, prefill_tokens: int, samples: bool = True) -> StepPlan:
    """``decodes`` sequences that decode, and a chunk."""
    works = [Work(SEQ, slot, 2, 1, (), (), 1) for slot in range(decodes)]
    if prefill_tokens:
        works.append(Work(SEQ, decodes, 0, prefill_tokens, (), (), int(samples)))
    return StepPlan(0, tuple(works))


def chunk(costs: CostModel, decodes: int) -> int:
    """As the scheduler cuts them."""
    return min(max(16, costs.prefill_tokens(decodes, TARGET_S)), MOST_TOKENS)


def serve(costs: CostModel, machine: Machine, steps: int, decodes: int = 8) -> None:
    """Decoding, with a chunk in every other step."""
    for index in range(steps):
        plan = step(decodes, chunk(costs, decodes) if index % 2 else 0)
        costs.learn(plan, machine.run(plan))


def trained(machine: Machine = CPU) -> CostModel:
    costs = CostModel()
    serve(costs, machine, 100)
    return costs


@given(st.floats(-4, 0), st.floats(-4, 0), st.floats(-4, 0), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_steps_keep_to_their_time_on_a_machine_of_any_speed(
    step_log: float, decode_log: float, token_log: float, decodes: int
) -> None:
    per_step = 10**step_log
    machine = Machine(per_step, per_step * 10**decode_log, per_step * 10**token_log)
    costs = CostModel()
    plan = step(0, 600)
    costs.learn(plan, machine.run(plan))
    serve(costs, machine, 300, decodes)
    tokens = chunk(costs, decodes)
    seconds, decoding = machine.seconds(decodes, tokens), machine.seconds(decodes, 0)
    if tokens < MOST_TOKENS:  # Else there is nothing to find by its time.
        assert costs.seconds(decodes, tokens) == pytest.approx(seconds, rel=0.15)
    assert seconds < 1.15 * max(TARGET_S, decoding + TARGET_S / 4) or tokens == 16
    if tokens < MOST_TOKENS:  # And it uses the time that it has.
        assert seconds > 0.85 * TARGET_S


def test_the_first_chunk_is_small_and_the_next_ones_fit() -> None:
    costs = CostModel()
    assert chunk(costs, 1) < 32
    plan = step(0, 600)  # A first request, alone.
    costs.learn(plan, CPU.run(plan))
    assert CPU.seconds(1, chunk(costs, 1)) == pytest.approx(TARGET_S, rel=0.1)


@pytest.mark.parametrize("factor", [10, 0.1])
def test_a_machine_that_changes_its_speed_is_followed(factor: float) -> None:
    costs = trained()
    changed = Machine(CPU.per_step * factor, CPU.per_decode * factor, CPU.per_token * factor)
    serve(costs, changed, 40)
    tokens = chunk(costs, 8)
    assert costs.seconds(8, tokens) == pytest.approx(changed.seconds(8, tokens), rel=0.1)


@pytest.mark.parametrize("factor", [1000, 0.001])
def test_one_step_that_stands_out_moves_the_estimate_little(factor: float) -> None:
    costs = trained()
    before = costs.seconds(8, 64)
    costs.learn(step(8, 64), factor * CPU.seconds(8, 64))
    assert costs.seconds(8, 64) == pytest.approx(before, rel=0.3)
    serve(costs, CPU, 20)
    assert costs.seconds(8, 64) == pytest.approx(before, rel=0.05)


def test_noise_is_averaged() -> None:
    chance = Random(1)
    costs = trained()
    for index in range(200):
        plan = step(8, chunk(costs, 8) if index % 2 else 0)
        costs.learn(plan, CPU.run(plan) * chance.uniform(0.7, 1.3))
        assert CPU.seconds(8, chunk(costs, 8)) < 1.4 * TARGET_S


@pytest.mark.parametrize("tokens", [1, 8])
def test_chunks_of_a_few_tokens_tell_nothing_of_longer_ones(tokens: int) -> None:
    """The ends of cached prompts, forked choices: less than what steps vary by."""
    for seed in range(10):
        chance = Random(seed)
        costs = trained()
        for index in range(1000):
            plan = step(8, tokens if index % 2 else 0)
            costs.learn(plan, CPU.run(plan) * chance.uniform(0.7, 1.3))
        assert TARGET_S / 2 < CPU.seconds(8, chunk(costs, 8)) < 2 * TARGET_S


def test_steps_that_sample_nothing_are_measured_with_the_next() -> None:
    """A device may return from them before it has computed anything."""
    costs, plain = trained(), trained()
    costs.learn(step(0, 512, samples=False), 0.001)
    assert costs.seconds(8, 512) == plain.seconds(8, 512)
    late = CPU.seconds(0, 512) + CPU.seconds(0, 512) - 0.001
    costs.learn(step(0, 512), late)
    assert costs.seconds(8, 512) == pytest.approx(plain.seconds(8, 512), rel=0.02)


def test_steps_that_were_not_computed_teach_nothing() -> None:
    costs = trained()
    before = costs.seconds(8, 512)
    costs.learn(step(8, 512), 1e-6, whole=False)
    costs.learn(step(8, 64), CPU.seconds(8, 64))
    assert costs.seconds(8, 512) == pytest.approx(before, rel=0.02)


def test_a_clock_that_stands_still_is_borne() -> None:
    costs = CostModel()
    for _ in range(100):
        costs.learn(step(1, 16), 0.0)
    assert costs.prefill_tokens(1, TARGET_S) > MOST_TOKENS
    serve(costs, CPU, 300)
    assert CPU.seconds(8, chunk(costs, 8)) == pytest.approx(TARGET_S, rel=0.15)


def test_the_speed_is_told_once_it_is_known() -> None:
    assert CostModel().prefill_tokens_per_s == 0
    assert trained().prefill_tokens_per_s == pytest.approx(1 / CPU.per_token, rel=0.05)
    assert trained().total_s > 0
