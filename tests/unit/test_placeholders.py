"""Pictures take their places in the prompt: ids are Hugging Face's, spans cover the right rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gateway.api.apply_template import ApplyTemplateRequest
from gateway.api.schemas.parsing import parse
from gateway.job import TextPrompt
from gateway.prompt import placeholders
from gateway.prompt.completion_prompt import read_plain
from gateway.prompt.renderer import ChatRenderer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, ContextLengthExceeded, InvalidRequest
from opticnerve.media.plan import Grid, Modality, Plan, SpanAttention, Structure
from opticnerve.models.family import Expansion, Rewrite, RowRun
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

    @property
    def image_token(self) -> str:
        placeholder = self.renderer.layout.item_token_ids[Modality.IMAGE]
        token = self.renderer.tokenizer.token_of(placeholder)
        assert token is not None
        return token


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
    token = made.image_token
    pieces = prompt.split(token)
    for i, plan in enumerate(plans):
        pieces[i] += token * plan.num_tokens
    return list(tokenizer("".join(pieces))["input_ids"])


@pytest.mark.parametrize("name", ["start", "end", "middle", "several", "none"])
def test_ids_and_spans(made: Made, name: str) -> None:
    renderer = made.renderer
    rendered = renderer.render(chat(*CHATS[name]))
    plans = plans_for(renderer, rendered.num_items)
    prompt = renderer.build(rendered, plans)
    assert list(prompt.token_ids) == expected_ids(made, rendered.prompt, plans)
    check_spans(renderer, prompt, plans)


def check_spans(
    renderer: ChatRenderer, prompt: placeholders.ExpandedPrompt, plans: list[Plan]
) -> None:
    token_id = renderer.layout.item_token_ids[Modality.IMAGE]
    places = [i for i, t in enumerate(prompt.token_ids) if t == token_id]
    covered = [
        i for s in prompt.spans for i in range(s.token_offset, s.token_offset + s.num_tokens)
    ]
    assert covered == places
    assert [span.item for span in prompt.spans] == list(range(len(plans)))
    assert [span.num_tokens for span in prompt.spans] == [plan.num_tokens for plan in plans]
    assert [span.grid_thw for span in prompt.spans] == [plan.grid for plan in plans]
    assert prompt.num_item_tokens == sum(plan.num_tokens for plan in plans)


def test_typed_placeholders_take_no_picture(made: Made) -> None:
    renderer = made.renderer
    rendered = renderer.render(chat(*CHATS["turns"]))
    plans = plans_for(renderer, 2)
    check_spans(renderer, renderer.build(rendered, plans), plans)
    assert made.image_token in rendered.prompt


# ---- text around placeholders

AROUND = ("\n\n", "\n\n")
REWRITE = Rewrite("image_token", "{image_token}".join(AROUND))


def test_what_is_written_around_a_placeholder_is_tokenized_with_its_neighbours(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As processors do it that write more than the placeholder into the text."""
    renderer = made.renderer
    monkeypatch.setattr(type(renderer.layout), "rewrite", REWRITE)
    rendered = renderer.render(chat([text("one\n"), IMAGE, IMAGE, text("\n\ntwo")]))
    assert AROUND[0] + made.image_token not in rendered.prompt
    plans = plans_for(renderer, 2)
    prompt = renderer.build(rendered, plans)
    written = rendered.prompt.replace(made.image_token, made.image_token.join(AROUND))
    assert list(prompt.token_ids) == expected_ids(made, written, plans)
    check_spans(renderer, prompt, plans)


def test_tokens_of_what_is_written_around_a_mark_begin_where_the_mark_does(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = made.renderer
    layout, tokenizer = renderer.layout, renderer.tokenizer
    plans = plans_for(renderer, 1)
    asked = TextPrompt("one\n<mark>\ntwo", sources=(IMAGE,), marker="<mark>")
    without = read_plain(asked, tokenizer, layout, plans=plans, locate=True)
    monkeypatch.setattr(type(layout), "rewrite", REWRITE)
    found = read_plain(asked, tokenizer, layout, plans=plans, locate=True)
    assert len(found.token_ids) >= len(without.token_ids) and found.starts is not None
    (span,) = found.spans
    assert set(found.starts[span.token_offset : span.token_offset + span.num_tokens]) == {4}
    assert list(found.starts) == sorted(found.starts)
    last = found.starts[-1]
    assert asked.text[last:] in "two" and last == (without.starts or ())[-1]


# ---- placeholders of other names

IMAGE_ID, VIDEO_ID = 637, 639
RENAMED = {
    "<image>": "<|img|>",
    "<|image_pad|>": "<|img|>",
    "<|video_pad|>": "<|vid|>",
    "<|vision_start|>": "<|see|>",
    "<|vision_end|>": "<|seen|>",
}


def renamed(path: Path, family: str, said_by: str) -> Path:
    """A checkpoint whose placeholders have other names and ids than the published ones.

    ``said_by``: "processor" and "tokenizer" name them, "id": only their ids tell.
    """
    make_checkpoint(family, path)
    edit(path / "config.json", _renumber)
    edit(path / "tokenizer.json", _rename_tokens)
    template = path / "chat_template.jinja"
    for old, new in RENAMED.items():
        template.write_text(template.read_text().replace(old, new))
    names = {"image_token": "<|img|>"} if family == "llava" else {}
    edit(path / "processor_config.json", lambda it: it.pop("image_token", None))
    edit(path / "tokenizer_config.json", lambda it: it.update(extra_special_tokens={}))
    if said_by == "processor":
        edit(path / "processor_config.json", lambda it: it.update(names))
    elif said_by == "tokenizer":
        names = {"image_token": "<|img|>"}
        edit(path / "tokenizer_config.json", lambda it: it.update(extra_special_tokens=names))
    return path


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    if file.is_file() or file.name == "processor_config.json":
        value = json.loads(file.read_text()) if file.is_file() else {}
        change(value)
        file.write_text(json.dumps(value))


def _renumber(config: dict[str, Any]) -> None:
    name = "image_token_index" if "image_token_index" in config else "image_token_id"
    config[name] = IMAGE_ID
    if "video_token_id" in config:
        config["video_token_id"] = VIDEO_ID


def _rename_tokens(tokenizer: dict[str, Any]) -> None:
    """The pads go behind all other tokens; strangers take the places that they leave."""
    added = tokenizer["added_tokens"]
    model = dict(added[0])
    for token in added:
        token["content"] = RENAMED.get(token["content"], token["content"])
        if token["content"] in ("<|img|>", "<|vid|>"):
            token["content"] = f"<old {token['id']}>"
    taken = {token["id"] for token in added}
    fresh = {IMAGE_ID: "<|img|>", VIDEO_ID: "<|vid|>"}
    for token_id in range(632, 640):
        if token_id not in taken:
            content = fresh.get(token_id, f"<new {token_id}>")
            added.append({**model, "id": token_id, "content": content})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("said_by", ["processor", "tokenizer", "id"])
def test_placeholders_are_what_the_checkpoint_calls_them(
    tmp_path: Path, family: str, said_by: str
) -> None:
    checkpoint = Checkpoint.open(str(renamed(tmp_path, family, said_by)))
    made = Made(tmp_path, ChatRenderer.load(tmp_path, make_layout(checkpoint)))
    assert made.image_token == "<|img|>"
    for name in ("several", "turns"):
        rendered = made.renderer.render(chat(*CHATS[name]))
        plans = plans_for(made.renderer, rendered.num_items)
        prompt = made.renderer.build(rendered, plans)
        check_spans(made.renderer, prompt, plans)
        assert {prompt.token_ids[span.token_offset] for span in prompt.spans} == {IMAGE_ID}
        assert list(prompt.token_ids) == expected_ids(made, rendered.prompt, plans)
    typed = made.renderer.render(chat([IMAGE, text("<|img|><|see|><image><|image_pad|>")]))
    assert typed.token_ids.count(IMAGE_ID) == 1
    assert "<|img|><|see|><image><|image_pad|>" in typed.prompt


@pytest.mark.parametrize("said_by", ["processor", "tokenizer"])
def test_ids_of_a_renamed_placeholder_are_those_of_the_processor(
    tmp_path: Path, said_by: str
) -> None:
    path = renamed(tmp_path, "llava", said_by)
    renderer = ChatRenderer.load(path, make_layout(Checkpoint.open(str(path))))
    said = json.loads((path / "processor_config.json").read_text())
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(path), AutoTokenizer.from_pretrained(path), **said
    )
    rendered = renderer.render(chat(*CHATS["several"]))
    plans = plans_for(renderer, rendered.num_items)
    images = [Image.new("RGB", size) for size in SIZES]
    expected = processor(text=rendered.prompt, images=images)["input_ids"]
    assert list(renderer.build(rendered, plans).token_ids) == list(expected[0])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("processor_config.json", {"image_token": "<|other|>"}),
        ("processor_config.json", {"image_token": "<|see|>"}),
        ("tokenizer_config.json", {"image_token": "<|vid|>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<|vid|>"}}),
        ("config.json", {"image_token_id": 5}),
        ("config.json", {"image_token_id": 632}),
    ],
)
def test_files_that_disagree_on_the_placeholder(
    tmp_path: Path, file: str, said: dict[str, Any]
) -> None:
    path = renamed(tmp_path, "qwen2_vl", "processor")
    edit(path / "processor_config.json", lambda it: it.update(image_token="<|img|>"))
    edit(path / file, lambda it: it.update(said))
    with pytest.raises(CheckpointError, match=r"image_token is .*config\.json.*one checkpoint"):
        ChatRenderer.load(path, make_layout(Checkpoint.open(str(path))))


def test_a_placeholder_that_no_file_spells(tmp_path: Path) -> None:
    path = renamed(tmp_path, "llava", "id")
    edit(path / "config.json", lambda it: it.update(image_token_index=700))
    with pytest.raises(CheckpointError, match="token 700 stands for a picture"):
        ChatRenderer.load(path, make_layout(Checkpoint.open(str(path))))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_placeholder_that_stands_in_the_vocabulary_alone(tmp_path: Path, family: str) -> None:
    path = renamed(tmp_path, family, "id")
    found: list[int] = []

    def move(tokenizer: dict[str, Any]) -> None:
        """To the place of a byte that no text here has."""
        [token] = [token for token in tokenizer["added_tokens"] if token["content"] == "<|img|>"]
        token["content"] = "<old>"
        found.append(tokenizer["model"]["vocab"].pop("\u0100"))
        tokenizer["model"]["vocab"]["<|img|>"] = found[0]

    edit(path / "tokenizer.json", move)
    config = json.loads((path / "config.json").read_text())
    name = "image_token_index" if "image_token_index" in config else "image_token_id"
    edit(path / "config.json", lambda it: it.update({name: found[0]}))
    renderer = ChatRenderer.load(path, make_layout(Checkpoint.open(str(path))))
    typed = renderer.render(chat([IMAGE, text("<|img|>")]))
    assert typed.token_ids.count(found[0]) == 1


@pytest.mark.parametrize(("old", "new"), [('"special":', '"spezial":'), ('"content":', "content:")])
def test_added_tokens_that_cannot_be_read(tmp_path: Path, old: str, new: str) -> None:
    path = make_checkpoint("llava", tmp_path)
    file = path / "tokenizer.json"
    broken = file.read_text().replace(old, new)
    assert broken != file.read_text()
    file.write_text(broken)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        ChatRenderer.load(path, make_layout(Checkpoint.open(str(path))))


# ---- expansions of families to come: markers between rows, several spans an item


def plan(tokens: int) -> Plan:
    return Plan(Modality.IMAGE, "png", 8, 8, 1, 8, 8, Grid(1, 2, 2), tokens, 4)


class Rows:
    """A family that closes each row of two placeholders (9) with a break (7)."""

    item_token_ids: ClassVar = {Modality.IMAGE: 9}

    def expand(self, plan: Plan) -> Expansion:
        rows = plan.num_tokens // 2
        return Expansion((9, 9, 7) * rows, tuple(RowRun(3 * r, 2, 2 * r) for r in range(rows)))


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


def test_attention_travels_with_the_span() -> None:
    plans = [plan(2), replace(plan(4), attention=SpanAttention.BIDIRECTIONAL)]
    spans = placeholders.expand(Rows(), "p", [9, 9], plans, 99).spans
    causal, both = SpanAttention.CAUSAL, SpanAttention.BIDIRECTIONAL
    assert [span.attention for span in spans] == [causal, both, both]


@pytest.mark.parametrize(("ids", "count"), [([1], 1), ([9, 9], 1), ([9], 0)])
def test_numbers_must_agree(ids: list[int], count: int) -> None:
    counts = r"wrote \d placeholders? for pictures.* contain \d picture"
    with pytest.raises(InvalidRequest, match=counts):
        placeholders.expand(Rows(), "p", ids, [plan(2)] * count, 99)


def test_a_place_is_of_its_items_kind() -> None:
    layout = SimpleNamespace(
        item_token_ids={Modality.IMAGE: 9, Modality.VIDEO: 8}, expand=Rows().expand
    )
    video = replace(plan(2), modality=Modality.VIDEO)
    with pytest.raises(InvalidRequest, match="no placeholder for a video"):
        placeholders.expand(layout, "p", [9], [video], 99)
    assert placeholders.expand(layout, "p", [8], [video], 99).token_ids == (9, 9, 7)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Rows, "expand", lambda self, plan: pytest.fail("it was built"))
    with pytest.raises(ContextLengthExceeded, match=r"7 tokens; .* needs 8 \(6 of .* min_pixels"):
        placeholders.expand(Rows(), "p", [1, 9, 2, 9], [plan(4), plan(2)], 7)


def test_separators_of_rows_count_too() -> None:
    assert len(placeholders.expand(Rows(), "p", [1, 9], [plan(4)], 7).token_ids) == 7
    with pytest.raises(ContextLengthExceeded, match=r"6 tokens; .* needs 7 \(6 of .* pictures"):
        placeholders.expand(Rows(), "p", [1, 9], [plan(4)], 6)


def test_layouts_fit_the_interface() -> None:
    layout = SimpleNamespace(item_token_ids={Modality.IMAGE: 9}, expand=Rows().expand)
    assert placeholders.expand(layout, "p", [9], [plan(2)], 99).token_ids == (9, 9, 7)


# ---- truncated prompts


def test_a_prompt_that_is_truncated_keeps_whole_pictures() -> None:
    prompt = placeholders.expand(Rows(), "p", [1, 9, 2, 3], [plan(4)], 11)
    assert prompt.token_ids == (1, 9, 9, 7, 9, 9, 7, 2, 3)
    last = placeholders.truncated(prompt, 8, first=False)
    assert last.token_ids == prompt.token_ids[1:]
    assert [(span.token_offset, span.num_tokens) for span in last.spans] == [(0, 2), (3, 2)]
    first = placeholders.truncated(prompt, 6, first=True)
    assert first.token_ids == prompt.token_ids[:6] and first.spans == prompt.spans
    for tokens, begins in ((7, False), (2, False), (5, True), (1, True)):
        with pytest.raises(InvalidRequest, match="do not include all of its pictures") as caught:
            placeholders.truncated(prompt, tokens, first=begins)
        assert caught.value.param == "truncate_prompt_tokens"


def test_a_prompt_to_be_truncated_may_be_longer() -> None:
    placeholders.expand(Rows(), "p", [1] * 28, [], 7, contexts=4)
    with pytest.raises(ContextLengthExceeded, match="7 tokens; the conversation needs 29"):
        placeholders.expand(Rows(), "p", [1] * 29, [], 7, contexts=4)
