"""Pictures take their places in the prompt: ids are Hugging Face's, spans cover the right rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway import placeholders
from gateway.chat import ChatRenderer
from gateway.schemas import ApplyTemplateRequest, parse
from opticnerve.errors import ContextLengthExceeded, InvalidRequest
from opticnerve.media.plan import Grid, Modality, Plan, Structure
from opticnerve.models.checkpoint import Checkpoint
from opticnerve.models.family import Expansion, Run
from opticnerve.models.registry import make_layout
from tests.checkpoints import make_checkpoint

IMAGE = {"type": "image", "image": "https://example.com/a.png"}
SIZES = [(336, 336), (448, 336), (56, 90)]


def chat(*contents: Any) -> ApplyTemplateRequest:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return parse(ApplyTemplateRequest, {"messages": messages})[0]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


CHATS = {
    "start": [[IMAGE, text("What is this?")]],
    "end": [[text("What is this?"), IMAGE]],
    "middle": [[text("Here, "), IMAGE, text(" is what?")]],
    "several": [[IMAGE, text("and"), IMAGE, IMAGE, text("?")]],
    "turns": [[IMAGE, text("a?")], "A cat.", [text("and this <|image_pad|><image>?"), IMAGE]],
    "none": ["hello"],
}


@dataclass(frozen=True)
class Made:
    path: Path
    renderer: ChatRenderer


@pytest.fixture(scope="module", params=["demo", "qwen2_5_vl", "llava"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = None
    if request.param != "demo":
        model = str(make_checkpoint(request.param, tmp_path_factory.mktemp(request.param)))
    checkpoint = Checkpoint.open(model)
    return Made(checkpoint.path, ChatRenderer.load(checkpoint.path, make_layout(checkpoint)))


def plans_for(renderer: ChatRenderer, count: int) -> list[Plan]:
    return [renderer.layout.plan(Structure("png", *size)) for size in SIZES[:count]]


def expected_ids(made: Made, prompt: str, plans: list[Plan]) -> list[int]:
    """As the processors do it: the placeholder is repeated in the string, then all is encoded."""
    tokenizer = AutoTokenizer.from_pretrained(made.path)
    token = made.renderer.layout.image_token
    pieces = prompt.split(token)
    for i, plan in enumerate(plans):
        pieces[i] += token * plan.num_tokens
    return list(tokenizer("".join(pieces))["input_ids"])


@pytest.mark.parametrize("name", ["start", "end", "middle", "several", "none"])
def test_ids_and_spans(made: Made, name: str) -> None:
    renderer = made.renderer
    rendered = renderer.render(chat(*CHATS[name]))
    plans = plans_for(renderer, rendered.num_images)
    prompt = renderer.build(rendered, plans)
    assert list(prompt.token_ids) == expected_ids(made, rendered.prompt, plans)
    check_spans(renderer, prompt, plans)


def check_spans(renderer: ChatRenderer, prompt: placeholders.Prompt, plans: list[Plan]) -> None:
    token_id = renderer.layout.image_token_id
    places = [i for i, t in enumerate(prompt.token_ids) if t == token_id]
    covered = [
        i for s in prompt.spans for i in range(s.token_offset, s.token_offset + s.num_tokens)
    ]
    assert covered == places
    assert [span.item for span in prompt.spans] == list(range(len(plans)))
    assert [span.num_tokens for span in prompt.spans] == [plan.num_tokens for plan in plans]
    assert [span.grid_thw for span in prompt.spans] == [plan.grid for plan in plans]
    assert prompt.num_image_tokens == sum(plan.num_tokens for plan in plans)


def test_typed_placeholders_take_no_picture(made: Made) -> None:
    renderer = made.renderer
    rendered = renderer.render(chat(*CHATS["turns"]))
    plans = plans_for(renderer, 2)
    check_spans(renderer, renderer.build(rendered, plans), plans)
    assert renderer.layout.image_token in rendered.prompt


# ---- expansions of families to come: markers between rows, several spans an item


def plan(tokens: int) -> Plan:
    return Plan(Modality.IMAGE, "png", 8, 8, 1, 8, 8, Grid(1, 2, 2), tokens, 4)


class Rows:
    """A family that closes each row of two placeholders (9) with a break (7)."""

    image_token_id = 9

    def expand(self, plan: Plan) -> Expansion:
        rows = plan.num_tokens // 2
        return Expansion((9, 9, 7) * rows, tuple(Run(3 * r, 2, 2 * r) for r in range(rows)))


def test_one_item_may_have_many_spans() -> None:
    prompt = placeholders.expand(Rows(), "p", [1, 9, 2, 9], [plan(4), plan(2)], 11)
    assert prompt.token_ids == (1, 9, 9, 7, 9, 9, 7, 2, 9, 9, 7)
    assert [(s.token_offset, s.num_tokens, s.item, s.row_start) for s in prompt.spans] == [
        (1, 2, 0, 0),
        (4, 2, 0, 2),
        (8, 2, 1, 0),
    ]


def test_time_travels_with_the_span() -> None:
    timed = replace(plan(2), seconds_per_grid=0.5)
    (span,) = placeholders.expand(Rows(), "p", [9], [timed], 99).spans
    assert span.seconds_per_grid == 0.5


@pytest.mark.parametrize(("ids", "count"), [([1], 1), ([9, 9], 1), ([9], 0)])
def test_numbers_must_agree(ids: list[int], count: int) -> None:
    with pytest.raises(InvalidRequest, match=r"wrote \d places? for pictures.* bring \d picture"):
        placeholders.expand(Rows(), "p", ids, [plan(2)] * count, 99)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Rows, "expand", lambda self, plan: pytest.fail("it was built"))
    with pytest.raises(ContextLengthExceeded, match=r"takes 7 .* need 8 \(6 of .* min_pixels"):
        placeholders.expand(Rows(), "p", [1, 9, 2, 9], [plan(4), plan(2)], 7)


def test_layouts_fit_the_interface() -> None:
    layout = SimpleNamespace(image_token_id=9, expand=Rows().expand)
    assert placeholders.expand(layout, "p", [9], [plan(2)], 99).token_ids == (9, 9, 7)
