"""The Gemma 3 layout against its processor: ids, sizes, and refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.api.apply_template import ApplyTemplateRequest
from gateway.api.schemas.parsing import parse
from gateway.prompt.renderer import ChatRenderer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, InvalidRequest, UnsupportedCheckpoint
from opticnerve.media.plan import Grid, Modality, Overrides, SpanAttention, Structure
from opticnerve.models.registry import load_language, make_layout
from tests.checkpoints import make_checkpoint
from tests.families import samples
from tests.families.gemma3 import BEGIN, END, IMAGE, THREE_LINES
from tests.reference import CAUSAL


@pytest.fixture(scope="module")
def path(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint("gemma3")


@pytest.fixture(scope="module")
def gemma(path: Path) -> Any:
    return make_layout(Checkpoint.open(str(path)))


IMAGE_PART = {"type": "image", "image": "https://example.com/a.png"}
CHATS: dict[str, list[list[Any]]] = {
    "a picture after the turn's own line break": [[IMAGE_PART, "What is this?"]],
    "between words": [["Here", IMAGE_PART, "is what?"]],
    "several": [["one", IMAGE_PART, IMAGE_PART, "\ntwo", IMAGE_PART]],
    "at the end": [["What is this?", IMAGE_PART]],
    "turns": [[IMAGE_PART, "a?"], ["A cat."], ["and this?", IMAGE_PART]],
    "none": [["hello"]],
}


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_the_processors(name: str, path: Path, gemma: Any) -> None:
    """Its line breaks form one token with those that the template or a user writes beside them."""
    renderer = ChatRenderer.load(path, gemma)
    messages = [
        {
            "role": "assistant" if i % 2 else "user",
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else part for part in parts
            ],
        }
        for i, parts in enumerate(CHATS[name])
    ]
    asked = parse(ApplyTemplateRequest, {"messages": messages})[0]
    rendered = renderer.render(asked)
    chance = random.Random(name)
    sizes = [(chance.randint(20, 300), chance.randint(20, 300)) for _ in range(rendered.num_items)]
    prompt = renderer.build(rendered, [gemma.plan(Structure("png", *size)) for size in sizes])
    sample, images = samples()["gemma3"], [Image.new("RGB", size) for size in sizes]
    given = sample.process(sample.processor(path), rendered.prompt, images)
    assert list(prompt.token_ids) == given["input_ids"][0].tolist()
    covered = [
        i for s in prompt.spans for i in range(s.token_offset, s.token_offset + s.num_tokens)
    ]
    assert covered == given["token_type_ids"][0].nonzero().flatten().tolist()
    assert all(span.attention is SpanAttention.BIDIRECTIONAL for span in prompt.spans)
    if name == "a picture after the turn's own line break":
        assert THREE_LINES in prompt.token_ids


def test_a_marker_that_a_user_types_is_no_picture(path: Path, gemma: Any) -> None:
    renderer = ChatRenderer.load(path, gemma)
    content = [IMAGE_PART, {"type": "text", "text": "and <start_of_image> this?"}]
    messages = [{"role": "user", "content": content}]
    rendered = renderer.render(parse(ApplyTemplateRequest, {"messages": messages})[0])
    prompt = renderer.build(rendered, [gemma.plan(Structure("png", 50, 50))])
    assert prompt.token_ids.count(BEGIN) == 1 and len(prompt.spans) == 1


def test_every_picture_is_one_square(gemma: Any) -> None:
    chance = random.Random(4)
    for _ in range(200):
        plan = gemma.plan(Structure("png", chance.randint(20, 4000), chance.randint(20, 4000)))
        assert (plan.resized_width, plan.resized_height) == (112, 112)
        assert (plan.grid, plan.num_tokens) == (Grid(1, 8, 8), 16)
    with pytest.raises(InvalidRequest, match="sizes are fixed"):
        gemma.plan(Structure("png", 50, 50), Overrides(max_pixels=1000))


def test_tokens_of_media(gemma: Any) -> None:
    assert gemma.item_token_ids == {Modality.IMAGE: IMAGE}
    ids = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
    assert gemma.placeholder_ids == ids


def changed(directory: Path, file: str, **fields: Any) -> Any:
    path = make_checkpoint("gemma3", directory)
    values = json.loads((path / file).read_text())
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name].update(value)
        else:
            values[name] = value
    (path / file).write_text(json.dumps(values))
    return make_layout(Checkpoint.open(str(path)))


@pytest.mark.parametrize(
    ("file", "fields", "error", "said"),
    [
        (
            "preprocessor_config.json",
            {"do_pan_and_scan": True},
            UnsupportedCheckpoint,
            "do_pan_and_scan",
        ),
        ("preprocessor_config.json", {"size": {"height": 224}}, CheckpointError, "224"),
        ("processor_config.json", {"image_seq_length": 64}, CheckpointError, "image_seq_length"),
        ("config.json", {"mm_tokens_per_image": 25}, CheckpointError, "mm_tokens_per_image"),
        (
            "config.json",
            {"vision_config": {"model_type": "clip_vision_model"}},
            UnsupportedCheckpoint,
            "clip_vision_model",
        ),
        (
            "config.json",
            {"text_config": {"model_type": "llama"}},
            UnsupportedCheckpoint,
            "'llama'",
        ),
        (
            "config.json",
            {"text_config": {"use_bidirectional_attention": True}},
            UnsupportedCheckpoint,
            "both directions",
        ),
        ("config.json", {"eoi_token_index": -2}, CheckpointError, "eoi_token_index = -2"),
    ],
)
def test_what_is_not_served(
    file: str, fields: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        changed(tmp_path, file, **fields)


def test_a_window_of_no_tokens_is_refused(tmp_path: Path) -> None:
    changed(tmp_path, "config.json", text_config={"sliding_window": 0})
    with pytest.raises(CheckpointError, match="sliding_window = 0"):
        load_language(Checkpoint.open(str(tmp_path), side="llm"), "float32", "cpu", CAUSAL)


@pytest.mark.parametrize("name", ["boi_token", "eoi_token"])
def test_a_token_around_pictures_that_no_file_names_is_refused(name: str, tmp_path: Path) -> None:
    """Its id may be another token's: here the one after it has moved up."""
    path = make_checkpoint("gemma3", tmp_path)
    fields = json.loads((path / "tokenizer_config.json").read_text())
    text = fields["extra_special_tokens"].pop(name)
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["content"] = {text: "<start_of_turn>", "<start_of_turn>": "<unused>"}.get(
            token["content"], token["content"]
        )
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=f"names the {name}"):
        ChatRenderer.load(path, make_layout(Checkpoint.open(str(path))))


def test_a_text_model_alone_is_refused_by_name(tmp_path: Path) -> None:
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match=r"no vision tower.*gemma3_text"):
        Checkpoint.open(str(tmp_path))


def test_layers_as_published(path: Path) -> None:
    """Five windows to one full layer where config.json does not list them; two rotary tables."""
    language: Any = load_language(Checkpoint.open(str(path), side="llm"), "float32", "cpu", CAUSAL)
    kinds = [(layer.window, layer.rotary) for layer in language.layers]
    assert kinds == [(12, "sliding_attention")] * 2 + [(None, "full_attention")]
    assert language.fused is not None and language.spec.embedding_scale == 8.0
