"""Published checkpoints as fixtures: their files' shapes, without a weight.

``tests/fixtures/checkpoints/NAME.json`` has of one checkpoint the facts that decide whether and how
it is served: ``files`` (JSON, by name), ``tokens`` (special ones with their ids), ``template`` (its
file, and what it writes for a picture), ``pictures`` (tokens by Hugging Face's rule, by size),
``tensors`` (shapes by published key; ``{0-27}`` stands for each number), ``renamed`` (expressions
that turn a published key into that of transformers 5), ``source`` and ``notes``. ``write`` makes a
directory of it: the template is a small one that writes pictures as the published one does, the
tokenizer has the published special tokens, and weights are files with headers and a hole for data.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
NAMES = tuple(sorted(file.stem for file in FIXTURES.glob("*.json")))
LAYOUTS = ("published", "transformers 5")
FIRST_BYTE = 300  # The id of the first of 257 tokens of text; no fixture has special ones there.
ELEMENT_BYTES = 2

TEMPLATE = """{%% for message in messages %%}{{ message.role + ': ' }}\
{%% if message.content is string %%}{{ message.content }}\
{%% else %%}{%% for part in message.content %%}\
{%% if part.type == 'image' %%}{{ %s }}{%% else %%}{{ part.text }}{%% endif %%}\
{%% endfor %%}{%% endif %%}{{ '\\n' }}{%% endfor %%}\
{%% if add_generation_prompt %%}{{ 'assistant: ' }}{%% endif %%}"""


def read(name: str) -> dict[str, Any]:
    fixture: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return fixture


def tensors(fixture: Mapping[str, Any], layout: str = "published") -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by key, as published or as transformers 5 names them."""
    found = {
        key: tuple(shape) for pattern, shape in fixture["tensors"].items() for key in _keys(pattern)
    }
    if layout == "published":
        return found
    return {_renamed(key, fixture["renamed"]): shape for key, shape in found.items()}


def _keys(pattern: str) -> Iterator[str]:
    """``a.{0-1}.b`` is a.0.b and a.1.b."""
    texts = re.split(r"\{([\d,-]+)\}", pattern)
    choices = [
        [text] if i % 2 == 0 else [str(n) for n in _numbers(text)] for i, text in enumerate(texts)
    ]
    return map("".join, itertools.product(*choices))


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _renamed(key: str, rules: list[list[str]]) -> str:
    for pattern, replacement in rules:
        if match := re.match(pattern, key):
            return replacement + key[match.end() :]
    return key


def write(
    name: str, directory: Path, *, weights: bool = True, layout: str = "published"
) -> dict[str, Any]:
    """Writes the checkpoint into ``directory``, and returns its fixture."""
    fixture = read(name)
    for file, content in fixture["files"].items():
        _write_json(directory / file, content)
    _write_json(directory / "tokenizer.json", _tokenizer(fixture["tokens"]))
    template = TEMPLATE % json.dumps(fixture["template"]["picture"])
    file = fixture["template"]["file"]
    if file.endswith(".json"):
        _write_json(directory / file, {"chat_template": template})
    else:
        (directory / file).write_text(template)
    if weights:
        _write_hollow(directory / "model.safetensors", tensors(fixture, layout))
    return fixture


def _tokenizer(special: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer of bytes, two line breaks in one token, and special tokens."""
    alphabet = {char: FIRST_BYTE + i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    alphabet["ĊĊ"] = FIRST_BYTE + len(alphabet)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token_id, "content": text, "special": True, **flags}
            for text, token_id in special.items()
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": alphabet | dict(special), "merges": ["Ċ Ċ"]},
    }


def _write_hollow(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file whose data is a hole, which takes no space."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * ELEMENT_BYTES
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
