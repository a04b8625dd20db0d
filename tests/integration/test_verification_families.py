"""``opticnerve verify`` finds every family's prompts and rows where the unsplit model has them, and
either half where it is broken."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from gateway.api.schemas.messages import Message
from gateway.job import ChatPrompt
from gateway.prompt.placeholders import ExpandedPrompt
from gateway.prompt.renderer import ChatRenderer
from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.policy.messages import GenerateRequest
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import StartupError
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Overrides, Span, Structure
from opticnerve.models.registry import load_language, load_tower, make_layout, make_preprocessor
from opticnerve.tensors.distance import LIMITS
from opticnerve.verification.cases import Case, make_cases
from opticnerve.verification.comparison import Comparison, Rule, Tally
from opticnerve.verification.split import BEST, Asked, Rows
from opticnerve.verification.whole import WholeModel, load_processor
from tests.checkpoints import FAMILIES
from tests.local_engine import Answer, LocalEngine
from tests.reference import picture

pytestmark = pytest.mark.slow


class Halves:
    """Both halves of a checkpoint, as a stack would use them. Faults can be put between them."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.layout = make_layout(checkpoint)
        self.tower = load_tower(checkpoint, dtype, "cpu")
        self.preprocess = make_preprocessor(checkpoint, self.layout)
        self.dtype = dtype

    def ask(self, case: Case) -> tuple[Asked, ExpandedPrompt]:
        """``case`` as a stack would be asked, with the rows of its pictures, but not answered."""
        images = [Image.open(io.BytesIO(png)).convert("RGB") for png in case.pictures]
        overrides = Overrides(one_of_several=len(images) > 1)
        plans = [self.layout.plan(Structure("png", *image.size), overrides) for image in images]
        pixels = [self.preprocess(*pair) for pair in zip(images, plans, strict=True)]
        renderer = ChatRenderer.load(self.checkpoint.path, self.layout)
        chat = ChatPrompt(messages=list(map(message, case.messages)), size=0)
        prompt = renderer.build(renderer.render(chat), plans)
        names = ("token_offset", "num_tokens", "item", "row_start")
        spans = [{name: getattr(span, name) for name in names} for span in prompt.spans]
        rows = list(self.tower.encode(pixels, plans))
        return Asked(case, list(prompt.token_ids), spans, rows=rows), prompt

    def answer(self, prompt: ExpandedPrompt, rows: Sequence[Rows], layout: Any = None) -> Answer:
        """What the language half says of these rows of pictures, with ``layout``'s positions."""
        language = load_language(self.checkpoint, self.dtype, "cpu", ATTENTION_NAME)
        engine = LocalEngine(language, layout or self.layout)
        items = tuple(f"picture {index}" for index in range(len(rows)))
        engine.rows.items |= dict(zip(items, rows, strict=True))
        sampling = Sampling(max_tokens=8, logprobs=BEST, eos_token_ids=())
        request = GenerateRequest("r", prompt.token_ids, prompt.spans, items, sampling)
        return engine.generate([request])["r", 0]


def with_answer(asked: Asked, answer: Answer) -> Asked:
    logprobs = [[each.logprob for each in (at.sampled, *at.top) if each] for at in answer.logprobs]
    return replace(asked, answers={"alone": answer.token_ids}, logprobs={"alone": logprobs})


def message(given: Any) -> Message:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:,"}} if part["type"] == "image" else part
        for part in given["content"]
    ]
    return Message.model_validate({"role": given["role"], "content": parts})


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_rows_are_the_unsplit_models(family: str, random_checkpoint: Any) -> None:
    path: Path = random_checkpoint(family)
    checkpoint = Checkpoint.open(str(path))
    try:
        processor = load_processor(checkpoint)
    except StartupError as error:
        pytest.skip(error.message)
    whole = WholeModel(checkpoint, processor, "float32", "cpu")
    comparison = Comparison(whole, Rule(max_gap=1e9, max_drift=1e9, rows=LIMITS["float32"]))
    several = next(case for case in make_cases(5, 7) if case.kind == "several pictures")
    asked, _ = Halves(checkpoint).ask(several)
    comparison.add(replace(asked, answers={"alone": [3]}, logprobs={"alone": [[-1.0]]}))
    tally = comparison.tallies[several.kind]
    assert tally.equal and tally.pictures == 3, tally


# ---- one half is broken


@dataclass(frozen=True)
class Served:
    """A chat of two pictures, and what sound halves say of it."""

    halves: Halves
    whole: WholeModel
    asked: Asked
    prompt: ExpandedPrompt

    def compared(self, asked: Asked) -> Tally:
        comparison = Comparison(self.whole, Rule.of(self.whole.dtype))
        comparison.add(asked)
        return comparison.tallies[asked.case.kind]


@pytest.fixture(scope="module")
def served(random_checkpoint: Any) -> Served:
    """Qwen3-VL: it has positions of three dimensions and two DeepStack levels."""
    checkpoint = Checkpoint.open(str(random_checkpoint("qwen3_vl")))
    whole = WholeModel(checkpoint, load_processor(checkpoint), "float32", "cpu")
    halves = Halves(checkpoint)
    pictures = []
    for seed, size in enumerate([(96, 160), (192, 96)]):
        pictures.append(io.BytesIO())
        picture(*size, seed).save(pictures[-1], "PNG")
    text = {"type": "text", "text": "What do you see?"}
    messages = ({"role": "user", "content": [{"type": "image"}, {"type": "image"}, text]},)
    case = Case("two", messages, tuple(each.getvalue() for each in pictures))
    asked, prompt = halves.ask(case)
    answered = with_answer(asked, halves.answer(prompt, asked.rows or []))
    return Served(halves, whole, answered, prompt)


def swapped(rows: Rows) -> Rows:
    order = torch.arange(len(rows["rows"]))
    order[[2, 3]] = order[[3, 2]]
    return {**rows, "rows": rows["rows"][order]}


def rescaled(rows: Rows) -> Rows:
    return {**rows, "rows": rows["rows"] * 1.05}


def not_a_number(rows: Rows) -> Rows:
    return {**rows, "rows": rows["rows"].index_fill(0, torch.tensor([4]), math.nan)}


def other_level(rows: Rows) -> Rows:
    return {**rows, "deepstack.0": rows["deepstack.1"], "deepstack.1": rows["deepstack.0"]}


def test_sound_halves_are_equal(served: Served) -> None:
    tally = served.compared(served.asked)
    assert tally.equal and tally.tokens == 8 and tally.pictures == 2, tally
    assert 0 < tally.largest_drift < 1e-3


@pytest.mark.parametrize("fault", [swapped, rescaled, not_a_number, other_level])
def test_wrong_rows_are_found(served: Served, fault: Callable[[Rows], Rows]) -> None:
    assert served.asked.rows is not None
    first, second = served.asked.rows
    tally = served.compared(replace(served.asked, rows=[first, fault(second)]))
    assert not tally.equal and tally.wrong_pictures == 1, tally
    assert not (tally.wrong_tokens or tally.wrong_logprobs)
    assert any("picture 1" in fault for fault in tally.faults)


@pytest.mark.parametrize("fault", [swapped, rescaled, other_level])
def test_rows_that_are_read_wrongly_are_found_by_the_answer(
    served: Served, fault: Callable[[Rows], Rows]
) -> None:
    assert served.asked.rows is not None
    first, second = served.asked.rows
    answer = served.halves.answer(served.prompt, [first, fault(second)])
    tally = served.compared(with_answer(served.asked, answer))
    assert not tally.equal and tally.wrong_logprobs and not tally.wrong_pictures, tally
    assert any("log-probabilities" in fault for fault in tally.faults)


def test_positions_of_exchanged_dimensions_are_found(served: Served) -> None:
    layout = copy.copy(served.halves.layout)

    def exchanged(num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        positions, delta = served.halves.layout.positions(num_tokens, spans)
        return positions[[0, 2, 1]], delta

    layout.positions = exchanged  # type: ignore[method-assign]
    answer = served.halves.answer(served.prompt, served.asked.rows or [], layout)
    tally = served.compared(with_answer(served.asked, answer))
    assert not tally.equal and tally.wrong_logprobs and not tally.wrong_pictures, tally
