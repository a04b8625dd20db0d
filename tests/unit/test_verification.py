"""What `opticnerve verify` counts as equal, and what it refuses before it starts anything."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from opticnerve.cli import commands, verify
from opticnerve.media.decode import decode
from opticnerve.tensors.distance import LIMITS
from opticnerve.verification import whole
from opticnerve.verification.cases import KINDS, make_cases
from opticnerve.verification.comparison import Comparison, Rule
from opticnerve.verification.split import Asked
from opticnerve.verification.whole import Prefill

IDS = [7, 1, 1, 8, 1, 9]  # 1 stands for a picture's rows: two of the first, one of the second.
LOGITS = torch.tensor([0.0, 1.0, 4.9999, 5.0])
SPANS = [
    {"token_offset": 1, "num_tokens": 2, "item": 0, "row_start": 0},
    {"token_offset": 4, "num_tokens": 1, "item": 1, "row_start": 0},
]


class Whole:
    """An unsplit model that always says 3, with 2 close behind and 0 far."""

    def inputs(self, case: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([IDS])}

    def prefill(self, inputs: Any, answer: list[int]) -> Prefill:
        logits = LOGITS.repeat(len(answer), 1)
        rows = torch.arange(12.0).reshape(6, 2)
        return Prefill(logits, rows, (rows[:3] + 100,))


def compared(case: Any = None, **said: Any) -> Any:
    case = case or make_cases(1, 0)[0]
    comparison = Comparison(Whole(), Rule.of(torch.float32))  # type: ignore[arg-type]
    answers = said.get("answers", {})
    logprobs = {way: [scores(token) for token in ids] for way, ids in answers.items()}
    usual = {"prompt_ids": IDS, "spans": SPANS, "logprobs": logprobs}
    comparison.add(Asked(case, **(usual | said)))
    return comparison.tallies[case.kind]


def scores(token: int, best: int = 2) -> list[float]:
    """What ``Whole`` says of a token: its log-probability, and those of the best."""
    wanted = LOGITS.log_softmax(-1)
    return [float(wanted[token]), *wanted.topk(best).values.tolist()]


def test_a_token_may_differ_only_where_logits_nearly_tie() -> None:
    tally = compared(answers={"alone": [3, 3], "again": [3, 2]})
    assert tally.equal and (tally.tokens, tally.close_calls) == (4, 1)
    tally = compared(answers={"alone": [3, 1, 3], "again": [3, 1, 3]})
    assert not tally.equal and tally.wrong_tokens == 2
    assert tally.faults == [
        "asked alone, again: token 1 of the answer is 1, the unsplit model's is 3, whose logit "
        "leads by 4"
    ]


def test_another_prompt_is_told_and_its_answers_are_not_compared() -> None:
    tally = compared(prompt_ids=[7, 1, 1, 6], answers={"alone": [0]})
    assert not tally.equal and tally.tokens == 0
    assert tally.faults == ["token 3 of the prompt is 6, transformers' is 8"]
    assert "has 2 tokens, transformers' 6" in compared(prompt_ids=IDS[:2]).faults[0]


def rows(*pictures: tuple[int, int], shift: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """The rows of ``Whole`` at places [first, end) of each picture, and among placeholders."""
    all_rows, found, seen = torch.arange(12.0).reshape(6, 2), [], 0
    for first, end in pictures:
        level = all_rows[seen : seen + end - first] + 100
        seen += end - first
        found.append({"rows": all_rows[first:end] + shift, "deepstack.0": level})
    return found


def test_log_probabilities_may_not_drift() -> None:
    near = [scores(3), [at + 9e-4 for at in scores(3)]]
    tally = compared(answers={"alone": [3, 3]}, logprobs={"alone": near})
    assert tally.equal and tally.largest_drift == pytest.approx(9e-4, rel=1e-3)
    for index in range(3):  # Of the token itself, of the best, of the second.
        for wrong in (0.002, -0.002, math.nan, -math.inf):
            far = [scores(3), scores(3)]
            far[1][index] += wrong
            tally = compared(answers={"alone": [3, 3]}, logprobs={"alone": far})
            assert not tally.equal and tally.wrong_logprobs == 1, wrong
            assert math.isfinite(tally.largest_drift)
            assert "asked alone: of the log-probabilities, token 1" in tally.faults[0]


def test_every_token_and_every_way_of_asking_needs_log_probabilities() -> None:
    answers = {"alone": [3, 3], "again": [3, 3]}
    tally = compared(answers=answers, logprobs={"alone": [scores(3)] * 2, "again": [scores(3)]})
    assert not tally.equal and tally.wrong_logprobs == 2
    assert tally.faults == ["asked again: 2 tokens, 1 log-probabilities"]


def test_what_is_granted_depends_on_the_type_of_weights() -> None:
    exact, half, brain = map(Rule.of, (torch.float32, torch.float16, torch.bfloat16))
    assert (exact.max_gap, exact.max_drift) == (1e-3, 1e-3)
    assert exact.max_drift < half.max_drift < brain.max_drift
    assert [rule.rows for rule in (exact, half, brain)] == list(LIMITS.values())


def test_rows_are_compared_where_the_model_reads_them() -> None:
    answers = {"alone": [3]}
    tally = compared(answers=answers, rows=rows((1, 3), (4, 5)))
    assert tally.equal and tally.pictures == 2 and tally.largest_difference == 0
    assert tally.least_cosine == 1
    for wrong, pictures in (
        (rows((1, 3), (4, 5), shift=-9), 2),  # Other rows.
        (rows((1, 3), (4, 6)), 1),  # Too many.
        ([{"rows": each["rows"]} for each in rows((1, 3), (4, 5))], 2),  # A level is missing.
    ):
        tally = compared(answers=answers, rows=wrong)
        assert not tally.equal and tally.wrong_pictures == pictures


@pytest.mark.parametrize("name", ["rows", "deepstack.0"])
@pytest.mark.parametrize(
    "fault",
    [
        lambda rows: rows * 1.01,
        lambda rows: rows.flip(0),
        lambda rows: rows * torch.tensor([[1.0], [math.nan]]),
        lambda rows: rows / torch.tensor([[1.0], [0.0]]),
    ],
    ids=["rescaled", "swapped", "not numbers", "infinite"],
)
def test_wrong_rows_of_one_picture_are_found(name: str, fault: Any) -> None:
    said = rows((1, 3), (4, 5))
    said[0][name] = fault(said[0][name])
    tally = compared(answers={"alone": [3]}, rows=said)
    assert not tally.equal and tally.wrong_pictures == 1 and tally.pictures == 2
    assert tally.faults[0].startswith(f"picture 0 has wrong {name}: ")
    assert math.isfinite(tally.largest_difference)


def test_cases_are_of_every_kind_and_the_same_for_one_seed() -> None:
    cases = make_cases(2 * len(KINDS), 3)
    assert {case.kind for case in cases} == set(KINDS)
    assert cases == make_cases(2 * len(KINDS), 3) != make_cases(2 * len(KINDS), 4)
    for case in cases:
        parts = [part for message in case.messages for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(case.pictures)


def test_a_transparent_picture_is_seen_as_transformers_shows_it() -> None:
    """Its image processors, given the file as it stands, and ours by default: on white."""
    [case] = [case for case in make_cases(len(KINDS), 3) if case.kind == "transparent picture"]
    [png] = case.pictures
    stored = Image.open(io.BytesIO(png))
    assert stored.mode == "RGBA" and stored.getchannel("A").getextrema() == (0, 255)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    theirs = processor(stored)["pixel_values"][0]
    shown = whole.with_picture({"type": "image"}, iter([png]))["image"]
    plan = SimpleNamespace(
        format="png", width=stored.width, height=stored.height, orientation=1, frames=1
    )
    for mine in (shown, decode(png, plan)):  # type: ignore[arg-type]
        assert np.array_equal(processor(mine)["pixel_values"][0], theirs)
    hidden = decode(png, plan, background=None)  # type: ignore[arg-type]
    assert not np.array_equal(processor(hidden)["pixel_values"][0], theirs)


def test_it_refuses_to_begin_without_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "serve", None)
    monkeypatch.setattr(verify, "_free_memory", lambda device: 2**20)
    assert commands.main(["verify"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("this takes about ") and "1 MiB are free" in told[0]
    assert "too little memory" in told[1] and "--force" in told[1]


def test_a_missing_package_is_said_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NotThere:
        is_dummy = True

    monkeypatch.setattr(verify, "serve", None)
    monkeypatch.setattr(whole, "_processor_class", lambda checkpoint: NotThere)
    assert commands.main(["verify"]) == 2
    assert "NotThere needs torchvision: pip install torchvision" in capsys.readouterr().err


@pytest.mark.parametrize("cases", ["19", "1001"])
def test_the_number_of_cases_is_bounded(cases: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["verify", "--cases", cases])
    assert "--cases" in capsys.readouterr().err
