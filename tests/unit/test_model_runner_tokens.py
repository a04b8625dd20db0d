"""The model runner on the demo checkpoint: which tokens it samples, and their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from llm_service.policy.messages import FinishedEvent
from opticnerve.generation.values import ChoiceOutput, PositionLogprobs
from tests.checkpoints import DEMO
from tests.local_engine import LocalEngine
from tests.runners import ids_of, load_demo, request, rows, tokens, with_picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_demo()


@pytest.fixture(scope="module")
def whole() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()


# ---- randomness, penalties, choices

CONSTRAINED = {
    "allowed_token_ids": tuple(range(50, 90)),
    "logit_bias": dict.fromkeys(range(60, 70), 2.0),
    "bad_words": ((61,), (62, 63), *((token, 64) for token in range(60, 70))),
}

SAMPLED = (
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.3, "seed": 4, "top_k": 30, "repetition_penalty": 1.2},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9, "frequency_penalty": 0.6},
    {
        "temperature": 1.0,
        "seed": 6,
        "min_p": 0.02,
        "presence_penalty": 0.4,
        "min_tokens": 5,
        "eos_token_ids": (629,),
    },
    {"repetition_penalty": 1.4, "bad_words": ((100,), (7, 8))},
    {"temperature": 1.0, "seed": 7, **CONSTRAINED},
    {},
)


def test_the_same_tokens_alone_together_continued_and_preempted(demo: tuple[Any, Any]) -> None:
    asks = [
        request(str(i), tokens(20 + 3 * i, i), max_tokens=24, **each)
        for i, each in enumerate(SAMPLED)
    ]
    alone: dict[str, list[int]] = {}
    for ask in asks:
        alone |= ids_of(LocalEngine(*demo), [ask])
    assert ids_of(LocalEngine(*demo), asks) == alone
    assert ids_of(LocalEngine(*demo, max_num_batched_tokens=9), asks) == alone
    tight = LocalEngine(*demo, kv_cache_tokens=128)
    assert ids_of(tight, asks) == alone
    assert tight.engine.scheduler.num_preemptions > 0
    continued = [
        replace(ask, outputs=(ChoiceOutput(0, tuple(alone[f"{ask.request_id}/0"][:9])),))
        for ask in asks
    ]
    rest = ids_of(LocalEngine(*demo), continued)
    assert rest == {name: ids[9:] for name, ids in alone.items()}


@pytest.mark.parametrize("fields", [{}, CONSTRAINED], ids=["free", "constrained"])
def test_choices_are_those_of_single_requests(
    demo: tuple[Any, Any], fields: dict[str, Any]
) -> None:
    ask = request("n", tokens(20), temperature=1.2, seed=8, n=4, **fields)
    together = ids_of(LocalEngine(*demo), [ask])
    assert len({tuple(ids) for ids in together.values()}) > 1
    for choice in range(4):
        others = (ChoiceOutput(other, finished=True) for other in range(4) if other != choice)
        single = replace(ask, outputs=tuple(others))
        assert ids_of(LocalEngine(*demo), [single]) == {f"n/{choice}": together[f"n/{choice}"]}


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_continue_as_if_nothing_had_happened(
    demo: tuple[Any, Any], prefix_caching: bool
) -> None:
    """One choice has ended, the others were cut at different places; tokens and their
    log-probabilities are those of the run that was not cut."""
    fields = {"temperature": 1.2, "seed": 11, "frequency_penalty": 0.7, "presence_penalty": 0.3}
    ask = request("c", tokens(40), max_tokens=30, n=3, logprobs=2, repetition_penalty=1.1, **fields)
    whole = LocalEngine(*demo).generate([ask])
    ids = [tuple(whole["c", choice].token_ids) for choice in range(3)]
    assert len({*ids}) == 3 and all(len(each) == 30 for each in ids)
    for cuts in ((30, 7, 19), (3, 30, 1), (0, 29, 30)):
        sent = [
            ChoiceOutput(choice, ids[choice][:cut], finished=cut == 30)
            for choice, cut in enumerate(cuts)
            if cut
        ]
        engine = LocalEngine(*demo, prefix_caching=prefix_caching)
        rest = engine.generate([replace(ask, outputs=tuple(sent))])
        assert {choice for _, choice in rest} == {c for c, cut in enumerate(cuts) if cut < 30}
        for (_, choice), answer in rest.items():
            cut = cuts[choice]
            assert tuple(answer.token_ids) == ids[choice][cut:]
            expected = whole["c", choice].logprobs[cut:]
            assert [each.sampled[1] for each in answer.logprobs] == pytest.approx(
                [each.sampled[1] for each in expected], abs=1e-4
            )
        finished = [m for m in engine.messages if isinstance(m, FinishedEvent)]
        assert [event.usage.completion_tokens for event in finished] == [90]


# ---- log-probabilities


def values_of(entries: Sequence[PositionLogprobs]) -> list[tuple[bool, float, list[float]]]:
    return [
        (
            each.sampled is None,
            0.0 if each.sampled is None else each.sampled.logprob,
            [token.logprob for token in each.top],
        )
        for each in entries
    ]


def close(
    one: Sequence[PositionLogprobs], two: Sequence[PositionLogprobs], tolerance: float = 1e-4
) -> None:
    assert len(one) == len(two)
    for (gone, first, top), (also, second, others) in zip(
        values_of(one), values_of(two), strict=True
    ):
        assert gone == also
        assert first == pytest.approx(second, abs=tolerance)
        assert top == pytest.approx(others, abs=tolerance)


def test_log_probabilities_are_transformers_own(demo: tuple[Any, Any], whole: Any) -> None:
    """Of raw logits: temperature, penalties and masks leave them alone."""
    prompt = tokens(41)
    ask = request(
        "x",
        prompt,
        logprobs=4,
        prompt_logprobs=3,
        temperature=1.4,
        seed=1,
        repetition_penalty=1.3,
        logit_bias={50: 3.0},
        top_k=40,
    )
    engine = LocalEngine(*demo)
    answer = engine.generate([ask])["x", 0]
    with torch.inference_mode():
        text = torch.tensor([[*prompt, *answer.token_ids]])
        want = whole(input_ids=text).logits[0].float().log_softmax(-1)
    found = engine.prompt_logprobs()["x"]
    assert (
        len(found) == len(prompt) and found[0].sampled is None and all(e.sampled for e in found[1:])
    )
    whole_text = [*prompt, *answer.token_ids]
    for position, entry in enumerate([*found[1:], *answer.logprobs], start=1):
        predicted = want[position - 1]
        token, value, rank = entry.sampled
        assert token == whole_text[position]
        assert value == pytest.approx(predicted[token].item(), abs=1e-4)
        assert rank == int((predicted > predicted[token]).sum()) + 1
        best = predicted.topk(len(entry.top))
        assert [value for _, value, _ in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert len(entry.top) == (3 if position < len(prompt) else 4)


def test_log_probabilities_do_not_depend_on_company_or_chunks(demo: tuple[Any, Any]) -> None:
    picture = with_picture(before=14, after=20)
    asks = [
        request("p", picture, logprobs=2, prompt_logprobs=2),
        request("q", tokens(33), logprobs=2, prompt_logprobs=2),
    ]
    others = [request(f"o{i}", tokens(17 + i, i)) for i in range(4)]
    results = []
    for settings, company in (
        ({}, []),
        ({}, others),
        ({"max_num_batched_tokens": 7}, []),
        ({"max_num_batched_tokens": 20}, others),
    ):
        engine = LocalEngine(*demo, **settings)
        engine.rows.items[picture["items"][0]] = {"rows": rows()}
        engine.generate([replace(ask, request_id=f"cold-{ask.request_id}") for ask in asks])
        answers = engine.generate([*asks, *company])
        prompts = engine.prompt_logprobs()
        for ask in asks:
            close(prompts[ask.request_id], prompts[f"cold-{ask.request_id}"])
        results.append([(answers[name, 0].logprobs, prompts[name]) for name in ("p", "q")])
        absent = [i for i, each in enumerate(prompts["p"]) if each.sampled is None]
        assert absent == [0, *range(14, 23)]
    for other in results[1:]:
        for (output, prompt), (output_also, prompt_also) in zip(results[0], other, strict=True):
            close(output, output_also)
            close(prompt, prompt_also)
