"""Random chats, by which the split model is compared with the whole one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((224, 224), (640, 480), (480, 640), (333, 500), (1024, 768), (800, 200), (96, 64))
QUESTIONS = (
    "What do you see?",
    "Describe the picture in one sentence.",
    "Which colours are there, and where?",
    "What is in the upper left corner?",
    "Count the light areas.",
)
LONG = "Take the following into account, however often it was said before. " * 14

Part = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One chat. ``messages`` are in Hugging Face's form, in which a picture is ``{"type":
    "image"}``; ``pictures``: the pictures as PNG, in the order of the messages."""

    kind: str
    messages: tuple[Mapping[str, Any], ...]
    pictures: tuple[bytes, ...]


def make_cases(count: int, seed: int) -> list[Case]:
    """``count`` chats, of every kind in turn; one seed always makes the same."""
    random = np.random.default_rng(seed)
    kinds = tuple(KINDS)
    return [
        KINDS[kinds[i % len(kinds)]](_Draw(random, kinds[i % len(kinds)])) for i in range(count)
    ]


class _Draw:
    """One chat in the making."""

    def __init__(self, random: np.random.Generator, kind: str) -> None:
        self.random = random
        self.kind = kind
        self.pictures: list[bytes] = []

    def picture(self) -> Part:
        width, height = SIZES[self.random.integers(len(SIZES))]
        self.pictures.append(_png(self.random, width, height))
        return {"type": "image"}

    def transparent_picture(self) -> Part:
        """A picture whose transparent pixels have hidden colours, as in pictures that were cut
        out."""
        width, height = SIZES[self.random.integers(len(SIZES))]
        opaque = Image.open(io.BytesIO(_png(self.random, width, height)))
        alpha = self.random.integers(0, 256, (5, 7), dtype=np.uint8)
        alpha[:2], alpha[2] = 0, 255
        opaque.putalpha(Image.fromarray(alpha).resize(opaque.size, Image.Resampling.NEAREST))
        self.pictures.append(_saved(opaque))
        return {"type": "image"}

    def text(self) -> Part:
        asked = QUESTIONS[self.random.integers(len(QUESTIONS))]
        return {"type": "text", "text": f"{asked} ({self.random.integers(1000)})"}

    def case(self, *turns: tuple[str, list[Part]]) -> Case:
        messages = tuple({"role": role, "content": content} for role, content in turns)
        return Case(self.kind, messages, tuple(self.pictures))


def _png(random: np.random.Generator, width: int, height: int) -> bytes:
    """A picture of smooth areas with some noise, on which resizing filters differ."""
    coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(np.int16) + random.integers(-30, 31, smooth.shape, dtype=np.int16)
    return _saved(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))


def _saved(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _long(draw: _Draw) -> Iterator[Part]:
    yield {"type": "text", "text": LONG}
    yield draw.picture()
    yield {"type": "text", "text": LONG}
    yield draw.text()


def _turns(draw: _Draw) -> Case:
    return draw.case(
        ("user", [draw.picture(), draw.text()]),
        ("assistant", [{"type": "text", "text": "There is a picture."}]),
        ("user", [draw.picture(), draw.text()]),
        ("assistant", [{"type": "text", "text": "And another one."}]),
        ("user", [draw.text()]),
    )


KINDS: dict[str, Callable[[_Draw], Case]] = {
    "picture": lambda draw: draw.case(("user", [draw.picture(), draw.text()])),
    "transparent picture": lambda draw: draw.case(
        ("user", [draw.transparent_picture(), draw.text()])
    ),
    "text alone": lambda draw: draw.case(("user", [draw.text()])),
    "several pictures": lambda draw: draw.case(
        ("user", [draw.picture(), draw.picture(), draw.text(), draw.picture(), draw.text()])
    ),
    "turns": _turns,
    "long prompt": lambda draw: draw.case(("user", list(_long(draw)))),
}
