"""Split equals whole: tower and engine apart say what transformers' unsplit model says.

Greedy ids in fp32. A token may differ only where the unsplit model's two best logits are closer
than MAX_GAP; such places are counted, and the demo checkpoint has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.policy.messages import FinishedEvent, GenerateRequest
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Modality, Overrides, Plan, Span, SpanAttention, Structure
from opticnerve.models.registry import (
    load_language,
    load_tower,
    make_layout,
    make_preprocessor,
)
from tests.checkpoints import DEMO, EOS, FAMILIES, make_checkpoint
from tests.families import samples
from tests.local_engine import LocalEngine
from tests.reference import place

pytestmark = pytest.mark.slow
MAX_GAP = 1e-3
MAX_TOKENS = 20


@dataclass(frozen=True)
class Picture:
    key: str
    plan: Plan
    image: Image.Image = field(compare=False)


@dataclass(frozen=True)
class Prompt:
    """Parts are numbers of text tokens, or pictures."""

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    pictures: tuple[Picture, ...]


class Model:
    """One checkpoint, whole and in halves."""

    def __init__(self, name: str, path: Path) -> None:
        from transformers import AutoModelForImageTextToText

        self.name = name
        self.whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.whole.generation_config.eos_token_id = EOS
        self.whole.generation_config.pad_token_id = EOS
        checkpoint = Checkpoint.open(str(path))
        self.layout = make_layout(checkpoint)
        self.sample = samples()["qwen2_vl" if name == "demo" else name]
        self.processor = self.sample.image_processor(path)
        self.preprocess = make_preprocessor(checkpoint, self.layout)
        self.tower = load_tower(checkpoint, torch.float32, "cpu")
        self.language = load_language(checkpoint, torch.float32, "cpu", ATTENTION_NAME)
        self.close_calls = 0
        self._references: dict[Prompt, list[int]] = {}

    # ---- making prompts

    def picture(self, seed: int, size: tuple[int, int]) -> Picture:
        random = np.random.default_rng(seed)
        blocks = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
        plan = self.layout.plan(Structure("png", *size), Overrides())
        return Picture(f"{seed}-{size}", plan, image)

    def prompt(self, *parts: int | Picture | tuple[int, ...], seed: int = 0) -> Prompt:
        random = np.random.default_rng(seed)
        ids: list[int] = []
        spans: list[Span] = []
        pictures = tuple(part for part in parts if isinstance(part, Picture))
        for part in parts:
            if isinstance(part, Picture):
                before, after = self.sample.around
                ids += before
                tokens, placed = place(self.layout, part.plan, len(ids), pictures.index(part))
                spans += placed
                ids += (*tokens, *after)
            elif isinstance(part, tuple):
                ids += part
            else:
                ids += random.integers(5, 600, part).tolist()
        return Prompt(tuple(ids), tuple(spans), pictures)

    # ---- whole

    def inputs(self, prompt: Prompt, more: list[int] | None = None) -> dict[str, Any]:
        ids = torch.tensor([[*prompt.token_ids, *(more or [])]])
        inputs = self.sample.token_inputs(ids, self.layout.item_token_ids[Modality.IMAGE])
        if prompt.pictures:
            images = [picture.image for picture in prompt.pictures]
            inputs |= self.sample.image_inputs(self.processor, images)
        return inputs

    def reference(self, prompt: Prompt) -> list[int]:
        if prompt not in self._references:
            with torch.inference_mode():
                out = self.whole.generate(
                    **self.inputs(prompt), max_new_tokens=MAX_TOKENS, do_sample=False
                )
            self._references[prompt] = out[0, len(prompt.token_ids) :].tolist()
        return self._references[prompt]

    def check(self, prompt: Prompt, got: list[int]) -> None:
        want = self.reference(prompt)
        if got == want:
            return
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        assert at is not None, f"{len(got)} tokens where {len(want)} were wanted"
        with torch.inference_mode():
            logits = self.whole(**self.inputs(prompt, want[:at])).logits[0, -1]
        best = logits.topk(2).values
        gap = (best[0] - best[1]).item()
        assert gap < MAX_GAP, f"token {at}: {got[at]} for {want[at]}, whose logit leads by {gap}"
        self.close_calls += 1

    # ---- halves

    def engine(self, **settings: Any) -> LocalEngine:
        return LocalEngine(self.language, self.layout, **settings)

    def requests(
        self, engine: LocalEngine, prompts: list[Prompt], tag: str = ""
    ) -> list[GenerateRequest]:
        made = []
        for index, prompt in enumerate(prompts):
            for picture in prompt.pictures:
                if picture.key not in engine.rows.items:
                    pixels = self.preprocess(picture.image, picture.plan)
                    (rows,) = self.tower.encode([pixels], [picture.plan])
                    engine.rows.items[picture.key] = rows
            made.append(
                GenerateRequest(
                    f"{tag}{index}",
                    prompt.token_ids,
                    prompt.spans,
                    tuple(picture.key for picture in prompt.pictures),
                    Sampling(max_tokens=MAX_TOKENS, eos_token_ids=(EOS,)),
                )
            )
        return made

    def check_all(self, engine: LocalEngine, prompts: list[Prompt], tag: str = "") -> None:
        answers = engine.generate(self.requests(engine, prompts, tag))
        for index, prompt in enumerate(prompts):
            self.check(prompt, answers[f"{tag}{index}", 0].token_ids)


@pytest.fixture(scope="module", params=["demo", *FAMILIES])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    name = request.param
    path = DEMO if name == "demo" else make_checkpoint(name, tmp_path_factory.mktemp(name), seed=3)
    loaded = Model(name, path)
    yield loaded
    print(f"\n{name}: {loaded.close_calls} tokens differ where logits nearly tie")
    if name == "demo":
        assert loaded.close_calls == 0


def mixed(model: Model) -> list[Prompt]:
    """Text only; a picture at the start, in the middle, at the end; several of several sizes."""
    one, wide, tall = (
        model.picture(seed, size) for seed, size in ((1, (84, 84)), (2, (140, 84)), (3, (84, 168)))
    )
    return [
        model.prompt(1, seed=1),
        model.prompt(40, seed=2),
        model.prompt(one, 12, seed=3),
        model.prompt(9, wide, 12, seed=4),
        model.prompt(30, tall, seed=5),
        model.prompt(3, one, 5, wide, tall, 8, seed=6),
        model.prompt(3, one, one, 4, seed=7),
    ]


def test_one_by_one(model: Model) -> None:
    engine = model.engine()
    for index, prompt in enumerate(mixed(model)):
        model.check_all(engine, [prompt], tag=f"{index}-")


def test_together(model: Model) -> None:
    model.check_all(model.engine(), mixed(model))


def test_warm_prefix_cache(model: Model) -> None:
    engine = model.engine()
    prompts = [
        *mixed(model),
        model.prompt(70, seed=8),
        model.prompt(50, model.picture(4, (84, 84))),
    ]
    for tag in ("cold", "warm"):
        model.check_all(engine, prompts, tag)
    cached = {
        m.request_id: m.usage.cached_tokens for m in engine.messages if isinstance(m, FinishedEvent)
    }
    assert cached["warm7"] >= 64 and cached["warm8"] >= 48


@pytest.mark.parametrize("budget", [7, 16, 33])
def test_chunks_cut_prompts_and_pictures(model: Model, budget: int) -> None:
    picture = model.picture(5, (168, 168))
    prompts = [
        *mixed(model),
        model.prompt(150, seed=9),
        model.prompt(20, picture, 90, picture, 3, seed=10),
    ]
    spans = [span for prompt in prompts for span in prompt.spans]
    assert budget > 7 or picture.plan.num_tokens > budget
    whole = [s.num_tokens for s in spans if s.attention is SpanAttention.BIDIRECTIONAL]
    model.check_all(model.engine(max_num_batched_tokens=max([budget, *whole])), prompts)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_full_cache_preempts(model: Model, prefix_caching: bool) -> None:
    picture = model.picture(6, (84, 84))
    prompts = [model.prompt(15 + 3 * i, picture, 6 + i, seed=11 + i) for i in range(6)]
    engine = model.engine(
        kv_cache_tokens=160, max_num_batched_tokens=64, prefix_caching=prefix_caching
    )
    model.check_all(engine, prompts)
    assert engine.engine.scheduler.num_preemptions > 0


def test_several_turns(model: Model) -> None:
    engine = model.engine()
    prompt = model.prompt(20, model.picture(7, (140, 84)), 11, seed=20)
    for turn in range(3):
        model.check_all(engine, [prompt], tag=f"turn{turn}-")
        said = (*prompt.token_ids, *model.reference(prompt))
        more = (model.picture(8, (84, 84)),) if turn == 0 else ()
        following = model.prompt(said, 7, *more, 5, seed=21 + turn)
        prompt = Prompt(
            following.token_ids,
            (*prompt.spans, *_shifted(following.spans, len(prompt.pictures))),
            (*prompt.pictures, *following.pictures),
        )


def _shifted(spans: tuple[Span, ...], items: int) -> tuple[Span, ...]:
    return tuple(replace(span, item=span.item + items) for span in spans)


def test_same_placeholders_other_picture(model: Model) -> None:
    """The token ids are equal: only the picture's identity keeps the cached pages apart."""
    engine = model.engine()
    first, second = model.picture(30, (84, 84)), model.picture(31, (84, 84))
    prompts = [model.prompt(25, picture, 9, seed=30) for picture in (first, second, first, second)]
    assert prompts[0].token_ids == prompts[1].token_ids
    for index, prompt in enumerate(prompts):
        model.check_all(engine, [prompt], tag=f"{index}-")
    model.check_all(engine, prompts, tag="together")
    if model.name != "demo":
        assert model.reference(prompts[0]) != model.reference(prompts[1])
