"""The soak's questions, and the right ending of each: the answer of a quiet stack beforehand.

Pictures show one or two shapes each, and no two are the same, so that a picture which reached the
wrong request shows in the answer. A text chunk in the PNG file makes a picture new to every cache,
and does not change what the model sees.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.soak.client import Ending
from examples.demo_training import scenes

MAX_REQUEST_BYTES = 2**20  # The gateways refuse larger ones.
LONGEST_COUNT = 20
TOKENS_OF_LONG = 240

Messages = list[dict[str, Any]]
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": list(scenes.SHAPES)},
        "color": {"enum": list(scenes.COLORS)},
        "several": {"type": "boolean"},
    },
    "required": ["shape", "color", "several"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}}


@dataclass(frozen=True, eq=False)
class Case:
    """A question. ``make`` builds its messages from a nonce; caches take pictures with equal nonces
    for the same."""

    kind: str
    make: Callable[[str], Messages]
    fields: dict[str, Any] = field(default_factory=dict)
    padding: int = 0  # Spaces after the body.

    def body(self, nonce: str, *, stream: bool) -> bytes:
        body = {"model": "model", "messages": self.make(nonce), "temperature": 0, "stream": stream}
        return json.dumps(body | self.fields).encode() + b" " * self.padding

    def pictures(self, nonce: str) -> frozenset[str]:
        """The data URLs of the pictures in its messages."""
        contents = [message["content"] for message in self.make(nonce)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return frozenset(part["image_url"]["url"] for part in parts if "image_url" in part)


@dataclass(frozen=True)
class Right:
    """The one right ending of a case."""

    texts: tuple[str, ...] = ()
    status: int = 200
    code: str = ""

    @classmethod
    def of(cls, ending: Ending) -> Right:
        return cls(() if ending.code else ending.texts, ending.status, ending.code)

    def allows(self, ending: Ending) -> bool:
        """Whether ``ending`` is the right one; if the client left, whether what it got was
        right."""
        if ending.kind == "left":
            pairs = zip(ending.texts, self.texts, strict=False)
            return all(whole.startswith(part) for part, whole in pairs)
        return ending.kind in ("answer", "error") and Right.of(ending) == self


def picture(number: int) -> bytes:
    """A PNG of a scene; no two numbers have the same scene."""
    rng = scenes.Random(number, scenes.PICTURE_SIZES[number % 3], 1 + number % 3)
    buffer = io.BytesIO()
    scenes.draw_scene(scenes.random_items(rng, 1 + number % 2), rng).save(buffer, "PNG")
    return buffer.getvalue()


def with_nonce(png: bytes, nonce: str) -> bytes:
    """The same pixels in another file, with a tEXt chunk before the last chunk."""
    data = b"tEXtnonce\0" + nonce.encode()
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return png[:-12] + chunk + png[-12:]


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def all_cases(pictures: int) -> list[Case]:
    """Every question, over ``pictures`` different pictures."""
    files = [picture(number) for number in range(pictures)]
    return [
        *(_about_one(file, "Describe the image.") for file in files),
        *(_about_two(*pair) for pair in itertools.pairwise(files[: pictures // 2 + 1])),
        *(_followed(file) for file in files[::2]),
        *(_as_object(file) for file in files[::3]),
        *(_counting(last, choices) for last in range(3, LONGEST_COUNT, 2) for choices in (1, 3)),
        _long(),
        *_refused(files[0]),
    ]


def _about_one(file: bytes, question: str) -> Case:
    return Case("picture", lambda nonce: [user(question, with_nonce(file, nonce))])


def _about_two(first: bytes, second: bytes) -> Case:
    def make(nonce: str) -> Messages:
        files = (with_nonce(first, nonce), with_nonce(second, nonce))
        return [user("What do the images show?", *files)]

    return Case("two pictures", make)


def _followed(file: bytes) -> Case:
    def make(nonce: str) -> Messages:
        before = user("What do you see?", with_nonce(file, nonce))
        said = {"role": "assistant", "content": "Some shapes."}
        return [before, said, user("How many shapes are there?")]

    return Case("follow-up", make)


def _as_object(file: bytes) -> Case:
    def make(nonce: str) -> Messages:
        return [user("What do you see?", with_nonce(file, nonce))]

    return Case("schema", make, {"response_format": AS_SCHEMA, "max_tokens": 120})


def _counting(last: int, choices: int) -> Case:
    kind = "text" if choices == 1 else "choices"
    return Case(kind, lambda nonce: [user(f"Count to {last}.")], {"n": choices})


def _long() -> Case:
    fields = {"max_tokens": TOKENS_OF_LONG, "ignore_eos": True, "n": 2}
    return Case("long text", lambda nonce: [user(f"Count to {LONGEST_COUNT}.")], fields)


def _refused(file: bytes) -> Iterator[Case]:
    bad = {
        "no picture": b"no picture at all",
        "half a picture": file[: len(file) // 2],
        "bad pixels": file[:60] + b"\0" * 40 + file[100:],
    }
    for name, data in bad.items():
        yield Case(name, lambda nonce, data=data: [user("What?", data)])  # type: ignore[misc]
    yield Case("too large", lambda nonce: [user("Hello.")], padding=2 * MAX_REQUEST_BYTES)
    yield Case("bad field", lambda nonce: [user("Hello.")], {"temprature": 1})
    yield Case("bad schema", lambda nonce: [user("Hello.")], {"n": -1})


REFUSED = ("no picture", "half a picture", "bad pixels", "too large", "bad field", "bad schema")
WEIGHTS = {
    "picture": 34, "two pictures": 10, "follow-up": 12, "schema": 8, "text": 12, "choices": 8,
    "long text": 6, **dict.fromkeys(REFUSED, 1.5),
}  # fmt: skip


class Questions:
    """Draws cases at random, most pictures new and some repeated."""

    REPEATED = 0.3  # Share of requests whose pictures have been sent before.

    def __init__(self, rights: dict[Case, Right], seed: int) -> None:
        self._random = random.Random(seed)
        self._by_kind: dict[str, list[Case]] = {}
        for case in rights:
            self._by_kind.setdefault(case.kind, []).append(case)
        self._rights = rights
        self._number = itertools.count()

    def draw(self) -> tuple[Case, str, bytes, Right]:
        """(case, nonce, body, its right ending)"""
        kinds = [kind for kind in WEIGHTS if kind in self._by_kind]
        (kind,) = self._random.choices(kinds, [WEIGHTS[kind] for kind in kinds])
        case = self._random.choice(self._by_kind[kind])
        repeated = self._random.random() < self.REPEATED
        nonce = "again" if repeated else f"{next(self._number)}"
        body = case.body(nonce, stream=self._random.random() < 0.6)
        return case, nonce, body, self._rights[case]
