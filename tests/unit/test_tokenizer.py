"""Ids equal Hugging Face's for every kind of vocabulary; special tokens only by alias."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gateway.prompt.tokenizer import Tokenizer
from opticnerve.checkpoints.tokenizer_files import read_tokenizer_config
from opticnerve.errors import CheckpointError
from tests import vocabularies as v

TEXTS = [
    "",
    "hello the quick",
    "<s>hi</s> x <image>\nfoo  bar ",
    " lead <|im_start|>user\n e\u0301 <think> ok</think>  <|im_end|>\n",
    "\n\n  \t",
    "你好🤗 <0x41> \u2581 \u0120",
    "USER: <image>\nWhat  is<image>it?</s> ",
    "<|im_end|><|im_end|>",
]


def edit(directory: Path, **config: Any) -> Path:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return directory


def added(**flags: bool) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {**usual, "special": True, **flags}


def qwen(directory: Path) -> Path:
    return v.byte_level(directory)


def llava(directory: Path) -> Path:
    return v.sentencepiece(directory)


def stripped(directory: Path) -> Path:
    """Special tokens that take the white space around them."""
    directory = v.byte_level(directory)
    number = Tokenizer.load(directory).id_of("<|im_end|>")
    decoder = {str(number): {"content": "<|im_end|>", **added(lstrip=True, rstrip=True)}}
    return edit(directory, added_tokens_decoder=decoder)


def promoted(directory: Path) -> Path:
    """A token that only tokenizer_config.json calls special."""
    return edit(v.byte_level(directory), additional_special_tokens=["<think>"])


def grown(directory: Path) -> Path:
    """A token that only tokenizer_config.json has."""
    return edit(v.byte_level(directory), eos_token="<|stop|>")


def mapped(directory: Path) -> Path:
    """Names in special_tokens_map.json, the older way."""
    directory = v.sentencepiece(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"})
    )
    names = {"bos_token": {"content": "<s>", **added()}, "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    return directory


def unigram(directory: Path) -> Path:
    """Special tokens are pieces like others, which plain text could be cut into."""
    directory = v.sentencepiece(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocab = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    pieces = [[piece, -float(i % 97)] for piece, i in vocab]
    spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return directory


KINDS = {f.__name__: f for f in (qwen, llava, stripped, promoted, grown, mapped, unigram)}


@pytest.fixture(scope="module", params=["demo", *KINDS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same checkpoint's tokenizer, here and there."""
    directory = v.DEMO
    if request.param in KINDS:
        directory = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("framed", [True, False])
def test_ids_are_hugging_faces(pair: Any, text: str, framed: bool) -> None:
    ours, theirs = pair
    ids = theirs(text, add_special_tokens=framed)["input_ids"]
    assert ours.encode(ours.aliases.hide(text), add_special_tokens=framed) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_any_text(pair: Any, text: str) -> None:
    ours, theirs = pair
    hidden = ours.aliases.hide(text)
    assert ours.encode(hidden, add_special_tokens=True) == theirs(text)["input_ids"]


def test_special_tokens_are_hugging_faces(pair: Any) -> None:
    ours, theirs = pair
    assert set(ours.special_ids) >= set(theirs.all_special_ids)
    for token_id, text in ours.special_ids.items():
        assert theirs.convert_ids_to_tokens(token_id) == text
    for name, text in theirs.special_tokens_map.items():
        assert ours.named[name] == text
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


def test_special_tokens_are_special_by_alias_alone(pair: Any) -> None:
    ours, _ = pair
    for token_id, text in ours.special_ids.items():
        assert ours.encode(ours.aliases.of[text]) == [token_id] or token_id in ours.encode(
            ours.aliases.of[text]
        )
        plain = ours.encode(text)
        assert not set(plain) & set(ours.special_ids)
        assert ours.decode(plain) == text
        assert ours.token_of(token_id) == text
        assert ours.id_of(text) == token_id


def test_a_vocabulary_that_can_spell_its_special_tokens(tmp_path: Path) -> None:
    """A merge that yields ``</s>`` would let plain text become it."""
    directory = v.sentencepiece(tmp_path)
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["</"] = max(vocab.values()) + 10
    vocab["s>"] = vocab["</"] + 1
    spec["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], *spec["model"]["merges"]]
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("a</s>b")
    assert 2 not in ids
    assert tokenizer.decode(ids) == "a</s>b"
    assert 2 in tokenizer.encode(tokenizer.aliases.hide("a</s>b"))


@pytest.mark.slow
def test_endless_text_is_noticed_early(pair: Any) -> None:
    ours, theirs = pair
    for unit in ("hello the quick ", "\n", "你好", "<|im_end|>", " "):
        text = unit * (70_000 // len(unit))
        count = len(theirs(text, add_special_tokens=False)["input_ids"])
        hidden = ours.aliases.hide(text)
        assert not ours.exceeds(hidden, count)  # Never a prompt that would fit.
        assert ours.exceeds(hidden, count // 4) or count < 2000
    assert not ours.exceeds("hello", 0)  # Left to the exact count.


def test_placeholders_of_a_prompt_may_stay_text() -> None:
    tokenizer = Tokenizer.load(v.DEMO, ["<|image_pad|>"])
    plain = frozenset({"<|image_pad|>"})
    ids = tokenizer.encode(tokenizer.aliases.hide("<|im_start|><|image_pad|>", plain))
    assert ids[0] == 628
    assert 632 not in ids


def test_a_placeholder_that_no_file_calls_special(tmp_path: Path) -> None:
    directory = v.byte_level(tmp_path)
    tokenizer = Tokenizer.load(directory, ["<tool_call>", "<not there>"])
    assert "<tool_call>" in tokenizer.special_ids.values()
    assert "<not there>" not in tokenizer.special_ids.values()
    assert tokenizer.id_of("<tool_call>") not in tokenizer.encode("<tool_call>")


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "no tokenizer at all"),
        ({"tokenizer.model": "x"}, "only tokenizer.model.*save_pretrained"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"tokenizer.json": "\udcff"}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "JSON object"),
    ],
)
def test_files_that_are_no_tokenizer(files: dict[str, str], text: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=f"(?s){text}"):
        Tokenizer.load(tmp_path)


def test_the_configuration_of_older_checkpoints(tmp_path: Path) -> None:
    directory = mapped(tmp_path)
    assert read_tokenizer_config(directory)["eos_token"] == "</s>"
    assert Tokenizer.load(directory).named["bos_token"] == "<s>"


@pytest.mark.process
def test_text_needs_neither_torch_nor_transformers_nor_grpc() -> None:
    code = (
        "import sys, gateway.prompt.renderer, gateway.sampling;"
        "import gateway.output.stops, gateway.api.sse;"
        "print([m for m in ('torch', 'transformers', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_special_token_may_be_in_capitals_but_no_word_of_the_format(tmp_path: Path) -> None:
    directory = edit(v.byte_level(tmp_path), additional_special_tokens=["TILE_1"])
    tokenizer = Tokenizer.load(directory)
    (tile,) = tokenizer.encode(tokenizer.aliases.hide("TILE_1"))
    assert tokenizer.special_ids[tile] == "TILE_1"
    assert tile not in tokenizer.encode("TILE_1")
    edit(directory, additional_special_tokens=["vocab"])
    with pytest.raises(CheckpointError, match="'vocab' is an ordinary word"):
        Tokenizer.load(directory)
