"""What the sampler keeps, takes away and draws, each rule against its own plain statement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_service.device import sampler as sampler_module
from llm_service.device.sampler import (
    Sampler,
    UniformCache,
    invert,
    keep_top_k,
    nucleus_border,
    position_logprobs,
    uniforms,
)
from opticnerve.generation.values import Sampling

VOCAB = 50
CPU = torch.device("cpu")


def make(
    *params: Sampling,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    vocab: int = VOCAB,
) -> Sampler:
    sampler = Sampler(vocab, len(params) + 3, CPU)
    prompt = prompt or [1, 2, 3]
    for slot, each in enumerate(params):
        sampler.admit(slot, each, 0, [*prompt, *(output or [])], len(prompt))
    return sampler


def run(
    sampler: Sampler,
    logits: torch.Tensor,
    positions: list[int] | None = None,
    slots: list[int] | None = None,
) -> list[int]:
    rows = np.array(slots if slots is not None else range(len(logits)), dtype=np.int64)
    at = np.array(positions if positions is not None else [0] * len(logits), dtype=np.int64)
    before = logits.clone()
    drawn = sampler.sample(logits, rows, at)
    assert torch.equal(before, logits), "the raw logits are the log-probabilities' too"
    ids: list[int] = drawn.token_ids.tolist()
    sampler.observe(rows, ids)
    return ids


def logits_of(*rows: dict[int, float], rest: float = 0.0) -> torch.Tensor:
    made = torch.full((len(rows), VOCAB), rest)
    for index, row in enumerate(rows):
        for token, value in row.items():
            made[index, token] = value
    return made


# ---- randomness


def test_the_numbers_of_a_seed_are_known() -> None:
    """Every worker and every release draws the same ones."""
    assert uniforms(0, 0, 0, 3).tolist() == [
        0.011546754286331451,
        0.24154919656271812,
        0.11142585551493811,
    ]
    late = uniforms(2**64 - 1, 3, 2**33 + 1, 2)
    assert late.tolist() == [0.6418918650815617, 0.3945718621126961]


def test_uniforms_are_uniform_and_differ_by_stream() -> None:
    values = uniforms(12345, 0, 0, 20_000)
    assert values.min() >= 0.0 and values.max() < 1.0
    observed, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((observed - 1000) ** 2 / 1000).sum() < 43.8  # Chi-square, 19 degrees, p = 0.001.
    for other in (uniforms(12346, 0, 0, 20_000), uniforms(12345, 1, 0, 20_000)):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert uniforms(2**64 - 1, 3, 2**33, 4).shape == (4,)
    np.testing.assert_array_equal(uniforms(7, 1, 100, 50), uniforms(7, 1, 0, 200)[100:150])


def test_cached_uniforms_are_the_same_in_any_order() -> None:
    cache = UniformCache(3)
    cache.admit(0, 5, 0)
    cache.admit(2, 9, 1)
    for positions in ([0, 0], [63, 200], [64, 199], [3, 10_000]):
        got = cache.take(np.array([0, 2]), np.array(positions))
        assert got[0] == uniforms(5, 0, positions[0], 1)[0]
        assert got[1] == uniforms(9, 1, positions[1], 1)[0]
    cache.admit(0, 6, 0)
    assert cache.take(np.array([0]), np.array([3]))[0] == uniforms(6, 0, 3, 1)[0]


# ---- greedy and masks


def test_greedy_batches_take_the_best() -> None:
    sampler = make(Sampling(), Sampling(temperature=1e-9))
    assert run(sampler, logits_of({4: 2.0}, {9: 1.0})) == [4, 9]


def test_not_finite_rows_are_reported() -> None:
    logits = logits_of({4: 2.0}, {9: float("nan")}, {3: float("inf")})
    drawn = make(Sampling(), Sampling(), Sampling()).sample(
        logits, np.arange(3), np.zeros(3, dtype=np.int64)
    )
    assert drawn.best.isfinite().tolist() == [True, False, False]


def test_logit_bias_and_masks_touch_their_row_alone() -> None:
    sampler = make(
        Sampling(logit_bias={7: 5.0, 4: -3.0, 10_000: 9.0}),
        Sampling(allowed_token_ids=(11, 12)),
        Sampling(),
    )
    row = {4: 2.0, 11: -1.0, 12: -0.5}
    assert run(sampler, logits_of(row, row, row)) == [7, 12, 4]


def test_bad_words_of_one_and_of_several_tokens() -> None:
    params = Sampling(bad_words=((4,), (5, 6, 7), (3, 8)))
    sampler = make(params, prompt=[1, 2, 3])
    assert run(sampler, logits_of({4: 9.0, 8: 5.0, 5: 4.0})) == [5]  # 8 would complete (3, 8).
    assert run(sampler, logits_of({8: 9.0})) == [8]
    assert run(sampler, logits_of({5: 9.0})) == [5]
    assert run(sampler, logits_of({6: 9.0})) == [6]
    assert run(sampler, logits_of({7: 9.0, 2: 1.0})) == [2]
    assert run(sampler, logits_of({7: 9.0, 2: 1.0})) == [7]


def test_bad_words_agree_with_transformers() -> None:
    words = [[4], [5, 6, 7], [3, 8]]
    theirs = NoBadWordsLogitsProcessor(bad_words_ids=words)
    rng = np.random.default_rng(0)
    for _ in range(20):
        text = rng.integers(3, 9, size=6).tolist()
        logits = torch.randn(1, VOCAB)
        logits[0, 3:9] += 5.0
        sampler = make(
            Sampling(bad_words=tuple(map(tuple, words))), prompt=text[:3], output=text[3:]
        )
        want = theirs(torch.tensor([text]), logits.clone()).argmax().item()
        assert run(sampler, logits) == [want]


def test_min_tokens_masks_what_would_end_it() -> None:
    ends = Sampling(min_tokens=2, eos_token_ids=(9,), stop_token_ids=(8,))
    row = {9: 5.0, 8: 4.0, 3: 1.0}
    assert run(make(ends), logits_of(row), [0]) == [3]
    assert run(make(ends), logits_of(row), [1]) == [3]
    assert run(make(ends), logits_of(row), [2]) == [9]
    ignoring = Sampling(min_tokens=2, ignore_eos=True, eos_token_ids=(9,), stop_token_ids=(8,))
    assert run(make(ignoring), logits_of(row), [0]) == [9]


def test_masks_that_leave_nothing_are_reported() -> None:
    params = Sampling(min_tokens=1, eos_token_ids=(9,), allowed_token_ids=(9,))
    for each in (params, replace(params, temperature=1.0)):
        drawn = make(each, Sampling()).sample(
            torch.zeros(2, VOCAB), np.arange(2), np.zeros(2, dtype=np.int64)
        )
        assert drawn.best_left is not None
        assert drawn.best_left.tolist() == [-torch.inf, 0.0]
        assert drawn.best.isfinite().all()


# ---- penalties


def test_repetition_penalty_agrees_with_transformers() -> None:
    prompt, output = [1, 2, 2, 30], [4, 5]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB)
    sampler = make(Sampling(repetition_penalty=1.7), prompt=prompt, output=output)
    want = theirs(torch.tensor([prompt + output]), logits.clone())
    got = sampler._penalise(logits.clone(), np.array([0]))
    torch.testing.assert_close(got, want)


def test_frequency_and_presence_count_output_alone() -> None:
    params = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    sampler = make(params, Sampling(), prompt=[7, 7, 7], output=[4, 4, 5])
    got = sampler._penalise(torch.zeros(2, VOCAB), np.array([0, 1]))
    assert got[0, 7] == 0.0 and got[0, 4] == -1.25 and got[0, 5] == -0.75
    assert got[1].abs().sum() == 0


def test_drawn_tokens_count_and_a_readmitted_slot_forgets() -> None:
    params = Sampling(frequency_penalty=1.0)
    sampler = make(params)
    row = {4: 1.5, 5: 1.0}
    assert [run(sampler, logits_of(row))[0] for _ in range(3)] == [4, 5, 4]
    sampler.release(0)
    sampler.admit(0, params, 0, [1, 2], 2)
    assert run(sampler, logits_of(row)) == [4]
    sampler.release(0)
    sampler.admit(0, Sampling(), 0, [1, 2], 2)
    assert run(sampler, logits_of(row)) == [4]


def test_counts_continue_with_given_output() -> None:
    params = Sampling(frequency_penalty=0.4, repetition_penalty=1.2)
    torch.manual_seed(0)
    rows = torch.randn(12, 1, VOCAB)
    whole = make(params)
    first = [run(whole, row)[0] for row in rows]
    resumed = make(params, output=first[:5])
    assert [run(resumed, row)[0] for row in rows[5:]] == first[5:]


# ---- truncation and draws


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_truncation_agrees_with_transformers(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 200) * 3
    for top_k, top_p, min_p in [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (20, 0.9, 0.02)]:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        want = warpers(torch.zeros(64, 1, dtype=torch.long), logits.clone()) > -torch.inf
        scaled = logits / temperature
        if top_k:
            limits = torch.full((64, 1), top_k)
            scaled = keep_top_k(scaled, limits, top_k)
        probs = scaled.softmax(-1)
        if top_p < 1:
            probs = probs.masked_fill(probs < nucleus_border(probs, torch.full((64, 1), top_p)), 0)
        if min_p:
            probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        assert torch.equal(probs > 0, want)


def test_large_vocabularies_have_the_same_border_either_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    probs = (torch.randn(6, 3000) * 2).softmax(-1)
    for top_p in (0.1, 0.6, 0.999):
        limits = torch.full((6, 1), top_p)
        want = nucleus_border(probs, limits)
        monkeypatch.setattr(sampler_module, "NUCLEUS_CANDIDATES", 500)
        assert torch.equal(nucleus_border(probs, limits), want)
        monkeypatch.undo()


@pytest.mark.parametrize("vocab", [50, 8192])
def test_a_row_without_top_p_keeps_everything_beside_one_with_it(vocab: int) -> None:
    """In fp32 the best token alone makes 1; what is left is unlikely, and not forbidden."""
    probs = torch.full((2, vocab), 1e-12)
    probs[:, 3] = 1.0
    kept = probs >= nucleus_border(probs, torch.tensor([[1.0], [0.9]]))
    assert kept.sum(dim=-1).tolist() == [vocab, 1]


def test_invert_never_takes_what_has_no_probability() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for uniform, want in [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2.0**-52, 3)]:
        assert invert(probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [want]


def test_draws_follow_the_distribution() -> None:
    wanted = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = torch.full((1, VOCAB), -1e9)
    logits[0, :4] = wanted.log() * 0.7  # The temperature undoes it.
    sampler = make(Sampling(temperature=0.7, seed=99))
    drawn = [run(sampler, logits, [position])[0] for position in range(4000)]
    observed = np.bincount(drawn, minlength=4)
    expected = wanted.numpy() * 4000
    assert len(observed) == 4
    assert ((observed - expected) ** 2 / expected).sum() < 16.3  # 3 degrees, p = 0.001.


MIXED = (
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, seed=1, top_k=7),
    Sampling(temperature=1.2, seed=2, top_p=0.8, repetition_penalty=1.3),
    Sampling(temperature=0.9, seed=3, min_p=0.05, frequency_penalty=0.4),
    Sampling(temperature=1.5, seed=4, logit_bias={3: 1.0}, bad_words=((1,), (2, 3))),
    Sampling(temperature=1.0, seed=5, top_k=20, top_p=0.9, allowed_token_ids=tuple(range(9))),
    Sampling(temperature=1.0, seed=6, min_tokens=8, eos_token_ids=(0, 1, 2)),
)


def test_a_request_draws_the_same_alone_in_a_batch_and_continued() -> None:
    torch.manual_seed(0)
    steps = torch.randn(24, len(MIXED), VOCAB) * 2
    batch = make(*MIXED)
    together = [
        run(batch, logits, [position] * len(MIXED)) for position, logits in enumerate(steps)
    ]
    for row, params in enumerate(MIXED):
        alone = make(params)
        apart = [run(alone, logits[row : row + 1], [at])[0] for at, logits in enumerate(steps)]
        assert apart == [ids[row] for ids in together]
        resumed = make(params, output=apart[:11])
        rest = [
            run(resumed, logits[row : row + 1], [at])[0]
            for at, logits in enumerate(steps[11:], start=11)
        ]
        assert rest == apart[11:]
    order = [5, 2, 7, 0, 3]
    shuffled = make(*MIXED)
    for position, logits in enumerate(steps):
        got = run(shuffled, logits[order], [position] * len(order), slots=order)
        assert got == [together[position][row] for row in order]


def test_choices_of_one_seed_differ() -> None:
    params = Sampling(temperature=1.0, seed=4)
    sampler = Sampler(VOCAB, 2, CPU)
    for choice in (0, 1):
        sampler.admit(choice, params, choice, [1], 1)
    drawn = [run(sampler, torch.zeros(2, VOCAB), [at, at]) for at in range(20)]
    assert [a for a, _ in drawn] != [b for _, b in drawn]


# ---- log-probabilities


def test_logprobs_name_the_sampled_token_and_the_best() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    ids = torch.tensor([4, int(logits[1].argmax()), 7])
    described = position_logprobs(logits, ids, [3, 0, 1])
    want = logits.log_softmax(-1)
    for row, each in enumerate(described):
        token, value, rank = each.sampled
        assert token == ids[row]
        assert value == pytest.approx(want[row, token].item(), abs=1e-5)
        assert rank == int((want[row] > want[row, token]).sum()) + 1
    assert described[1].sampled[2] == 1 and described[1].top == ()
    best = want[0].topk(3)
    assert [token for token, _, _ in described[0].top] == best.indices.tolist()
    assert [rank for _, _, rank in described[0].top] == [1, 2, 3]
    assert [value for _, value, _ in described[0].top] == pytest.approx(
        best.values.tolist(), abs=1e-5
    )
    assert len(described[2].top) == 1
