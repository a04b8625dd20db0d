"""The requests of a run, made before it: synthetic chats and conversations, or a file's prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.benchmark.pictures import Album, picture_part
from opticnerve.cli.chat_client import picture_url
from opticnerve.errors import InvalidRequest, StartupError
from opticnerve.media.load import is_url

# With the space before it, each is one token in most vocabularies.
TEXT = """about above after again air all always another around ask away back before below between
book both call change city close country cover day down each earth end even every eye face far few
find first food four full game give good great group hand hard have head hear help here high home
hour house idea keep kind know land large last late learn leave left letter life light line list"""
WORDS = TEXT.split()
ANSWER_FIELDS = {"temperature": 0, "ignore_eos": True}  # So that answers have the requested length.
Fields = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """One user turn, in pieces of JSON, so that a repeated picture is in memory only once."""

    messages: tuple[bytes, ...]
    pictures: int = 0
    again: int = 0  # How many of them were shown before.


@dataclass(frozen=True)
class Dialogue:
    """Consecutive requests, each of which repeats everything said before it, pictures included."""

    fields: bytes  # The body's other fields: JSON without the outer braces.
    askings: tuple[Asking, ...]

    def body(self, said: Sequence[str]) -> bytes:
        """The body of the request that follows the answers ``said``."""
        pieces = [b"{", self.fields, b',"messages":[']
        for asking, text in zip(self.askings, said, strict=False):
            pieces += [*asking.messages, b",", _dump({"role": "assistant", "content": text}), b","]
        return b"".join([*pieces, *self.askings[len(said)].messages, b"]}"])


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def body_fields(model: str, given: Fields) -> bytes:
    """The fields of a streamed request with usage, as in ``Dialogue.fields``. Fields of None are
    left out."""
    own = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    kept = {name: value for name, value in given.items() if value is not None}
    return _dump({**kept, **own})[1:-1]


@dataclass(frozen=True)
class Shape:
    """The shape of synthetic dialogues."""

    turns: int = 1
    pictures: int = 1  # In the first turn.
    words: int = 32  # Of each turn.


def dialogues(
    shape: Shape, album: Album, source: random.Random, fields: bytes
) -> Iterator[Dialogue]:
    """Endless dialogues. The texts of each are new, so that prompts share no prefix beyond their
    pictures."""
    while True:
        earlier, before = album.new, album.again
        parts = [album.next(earlier) for _ in range(shape.pictures)]
        pieces = _user(parts, _text(source, shape.words))
        first = Asking(pieces, shape.pictures, album.again - before)
        later = (Asking(_user([], _text(source, shape.words))) for _ in range(shape.turns - 1))
        yield Dialogue(fields, (first, *later))


def _text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))


def _user(parts: Sequence[bytes], text: str) -> tuple[bytes, ...]:
    """A user's message in pieces; the pictures are the given objects, not copies."""
    if not parts:
        return (_dump({"role": "user", "content": text}),)
    pictures = (piece for part in parts for piece in (part, b","))
    return (b'{"role":"user","content":[', *pictures, _dump({"type": "text", "text": text}), b"]}")


# ---- prompts of a file


def read_prompts(path: Path, model: str, given: Fields, default: Fields) -> list[Dialogue]:
    """The lines of a JSONL file: bodies of chat completions, or ``{"prompt": TEXT, "images": [FILE
    or URL, ...]}``. ``given`` overrides their fields; ``default`` fills in missing ones. Raises
    StartupError, which names the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--prompts: cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_prompt(line, path.parent, model, given, default))
            except (ValueError, InvalidRequest) as error:
                raise StartupError(f"--prompts: {path}, line {number}: {error}") from error
    if not found:
        raise StartupError(f"--prompts: {path} has no line")
    return found


def _prompt(line: str, folder: Path, model: str, given: Fields, default: Fields) -> Dialogue:
    body = json.loads(line)
    if not isinstance(body, dict):
        raise ValueError("expected an object")
    if "prompt" in body:
        body = _chat(body, folder)
    messages = body.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected "messages", or "prompt" and "images"')
    fields = body_fields(model, {**default, **body, **given})
    pictures = sum(
        isinstance(part, dict) and part.get("type") in ("image_url", "image")
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )
    return Dialogue(fields, (Asking((_dump(messages)[1:-1],), pictures),))


def _chat(body: Fields, folder: Path) -> Fields:
    text, images = body.pop("prompt"), body.pop("images", [])
    if not isinstance(text, str) or not isinstance(images, list):
        raise ValueError('"prompt" is a text, and "images" a list')
    urls = [picture_url(image if is_url(image) else folder / str(image)) for image in images]
    parts = [*map(json.loads, map(picture_part, urls)), {"type": "text", "text": text}]
    return {**body, "messages": [{"role": "user", "content": parts}]}
