"""Synthetic pictures: of given sizes, new or seen before."""

from __future__ import annotations

import base64
import functools
import io
import json
import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

Size = tuple[int, int]  # Width, height.
MAX_SIDE = 16_384
NOISE = 12.0  # Standard deviation, out of 255; makes files as large as photos.


@functools.cache
def _noise(size: Size) -> npt.NDArray[np.int16]:
    """One picture's noise, (height, width, 3); each picture shifts it by its own offset."""
    source = np.random.default_rng(0)
    return source.normal(0, NOISE, (size[1], size[0], 3)).astype(np.int16)


def draw(source: random.Random, size: Size, form: str = "JPEG") -> bytes:
    """A file of ``form`` (JPEG or PNG): a gradient between two random colours, with noise. Two
    pictures differ in their pixels too, because some servers hash these instead of the bytes."""
    width, height = size
    ends = np.array([[source.randrange(256) for _ in range(3)] for _ in range(2)], np.float32)
    ramp = np.linspace(0, 1, height, dtype=np.float32).reshape(-1, 1, 1)
    lines = (ends[0] * ramp + ends[1] * (1 - ramp)).astype(np.int16)
    shift = source.randrange(height), source.randrange(width)
    pixels = (lines + np.roll(_noise(size), shift, (0, 1))).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **_options(form))
    return file.getvalue()


def _options(form: str) -> dict[str, int]:
    return {"quality": 85} if form == "JPEG" else {"compress_level": 1}


def data_url(data: bytes, form: str) -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"


def picture_part(url: str) -> bytes:
    """The part of a message that shows the picture at ``url``, as JSON."""
    return json.dumps({"type": "image_url", "image_url": {"url": url}}).encode()


@dataclass
class Album:
    """Pictures for one run. ``repeat``: the share of pictures that are shown again."""

    source: random.Random
    sizes: tuple[Size, ...]
    form: str = "JPEG"
    repeat: float = 0.0
    shown: int = 0
    again: int = 0
    _parts: list[bytes] = field(default_factory=list)  # One for each picture that is new.

    def next(self, earlier: int | None = None) -> bytes:
        """The message part of the next picture.

        ``earlier``: only the first so many new pictures may be shown again, so that a request does
        not repeat its own pictures; None: all.
        """
        self.shown += 1
        old = len(self._parts) if earlier is None else earlier
        if old and self.source.random() < self.repeat:
            self.again += 1
            return self._parts[self.source.randrange(old)]
        size = self.sizes[len(self._parts) % len(self.sizes)]
        part = picture_part(data_url(draw(self.source, size, self.form), self.form))
        self._parts.append(part)
        return part

    @property
    def new(self) -> int:
        return len(self._parts)
