"""``opticnerve verify`` finds prompts and rows of every family where the unsplit model has them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.api.schemas.messages import Message
from gateway.job import ChatPrompt
from gateway.prompt.renderer import ChatRenderer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import StartupError
from opticnerve.media.plan import Overrides, Structure
from opticnerve.models.registry import load_tower, make_layout, make_preprocessor
from opticnerve.verification.cases import Case, make_cases
from opticnerve.verification.comparison import Comparison, Rule
from opticnerve.verification.split import Asked
from opticnerve.verification.whole import WholeModel
from tests.checkpoints import FAMILIES

pytestmark = pytest.mark.slow


def asked(case: Case, checkpoint: Checkpoint) -> Asked:
    """A case as a stack would be asked and answer, but for its tokens."""
    layout = make_layout(checkpoint)
    tower, preprocess = (
        load_tower(checkpoint, "float32", "cpu"),
        make_preprocessor(checkpoint, layout),
    )
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in case.pictures]
    overrides = Overrides(one_of_several=len(images) > 1)
    plans = [layout.plan(Structure("png", *image.size), overrides) for image in images]
    rows = tower.encode([preprocess(*pair) for pair in zip(images, plans, strict=True)], plans)
    renderer = ChatRenderer.load(checkpoint.path, layout)
    rendered = renderer.render(ChatPrompt(messages=list(map(message, case.messages)), size=0))
    prompt = renderer.build(rendered, plans)
    spans: list[dict[str, Any]] = [
        {name: getattr(span, name) for name in ("token_offset", "num_tokens", "item", "row_start")}
        for span in prompt.spans
    ]
    return Asked(case, list(prompt.token_ids), list(spans), {"alone": [3]}, list(rows))


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
        whole = WholeModel(checkpoint, "float32", "cpu")
    except StartupError as error:
        pytest.skip(error.message)
    comparison = Comparison(whole, Rule(max_gap=1e9, min_cosine=0.99999))
    several = next(case for case in make_cases(5, 7) if case.kind == "several pictures")
    comparison.add(asked(several, checkpoint))
    tally = comparison.tallies[several.kind]
    assert tally.equal and tally.pictures == 3, tally
