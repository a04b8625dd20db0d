"""Drawn pictures: shapes on a three by three grid, short texts, one moving shape.

Everything comes from a seeded generator: the same seed always draws the same picture.
``examples.demo_training.questions`` asks about them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 210, 40),
    "green": (46, 160, 67),
    "blue": (33, 102, 212),
    "purple": (131, 56, 180),
    "pink": (255, 130, 180),
    "black": (20, 20, 20),
}
BACKGROUNDS = [(255, 255, 255), (240, 240, 240), (250, 244, 230), (232, 242, 250), (236, 248, 236)]
SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond"]
SIZES = {"small": 0.18, "large": 0.3}  # side as a share of the picture's shorter side
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ORDINALS = ["first", "second", "third", "fourth"]
WORDS = (  # noqa: SIM905 (a list would fill a page)
    "APPLE BREAD CHAIR DREAM EARTH FLAME GRAPE HOUSE IMAGE JUICE KNIFE LIGHT MUSIC NIGHT OCEAN "
    "PIANO QUEEN RIVER STONE TIGER UNCLE VOICE WATER YOUTH ZEBRA HELLO WORLD OPEN STOP EXIT SALE "
    "MENU TAXI CAFE BANK PARK SHOP FIRE"
).split()


TEXTS = WORDS + [str(number) for number in range(100)]


@dataclass(frozen=True)
class Item:
    """One shape of a scene; ``cell`` is (row, column) on a three by three grid."""

    shape: str
    color: str
    size: str
    cell: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def place(self) -> str:
        row, column = self.cell
        if self.cell == (1, 1):
            return "in the center"
        if row == 1:
            return f"on the {COLUMNS[column]}"
        if column == 1:
            return f"at the {ROWS[row]}"
        return f"at the {ROWS[row]} {COLUMNS[column]}"


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def plural(count: int, noun: str) -> str:
    many = {"cross": "crosses"}.get(noun.split()[-1], noun.split()[-1] + "s")
    return noun if count == 1 else " ".join([*noun.split()[:-1], many])


def outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        return [(cx - r, cy - r), (cx + r, cy - r), (cx + r, cy + r), (cx - r, cy + r)]
    if shape == "triangle":
        return [(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)]
    if shape == "diamond":
        return [(cx, cy - r), (cx + 0.75 * r, cy), (cx, cy + r), (cx - 0.75 * r, cy)]
    if shape == "cross":
        t = 0.36 * r
        return [
            (cx - t, cy - r),
            (cx + t, cy - r),
            (cx + t, cy - t),
            (cx + r, cy - t),
            (cx + r, cy + t),
            (cx + t, cy + t),
            (cx + t, cy + r),
            (cx - t, cy + r),
            (cx - t, cy + t),
            (cx - r, cy + t),
            (cx - r, cy - t),
            (cx - t, cy - t),
        ]
    if shape == "star":
        return [
            (
                cx + (r if i % 2 == 0 else 0.42 * r) * math.sin(i * math.pi / 5),
                cy - (r if i % 2 == 0 else 0.42 * r) * math.cos(i * math.pi / 5),
            )
            for i in range(10)
        ]
    raise ValueError(shape)


def draw_shape(draw: ImageDraw.ImageDraw, item: Item, cx: float, cy: float, r: float) -> None:
    color = COLORS[item.color]
    if item.shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)
    else:
        draw.polygon(outline(item.shape, cx, cy, r), fill=color)


# (width, height) as the model sees them: 9 or 12 tokens.
PICTURE_SIZES = [(84, 84), (112, 84), (84, 112)]
SCALES = [1, 4]  # drawn so many times larger, then reduced as the image processor would


class Random(random.Random):
    """A seeded generator that also fixes the size and scale of the pictures it draws, if given."""

    def __init__(
        self, seed: int, size: tuple[int, int] | None = None, scale: int | None = None
    ) -> None:
        super().__init__(seed)
        self.size, self.scale = size, scale


def picture_size(rng: Random) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size as the model sees it, and the size to draw at."""
    width, height = rng.size or rng.choice(PICTURE_SIZES)
    scale = rng.scale or rng.choice(SCALES)
    return (width, height), (width * scale, height * scale)


def reduce(image: Image.Image, size: tuple[int, int], rng: Random) -> Image.Image:
    """The picture at the model's size, unless a scale was asked for: then as drawn."""
    return (
        image if rng.scale or image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    )


def draw_scene(items: list[Item], rng: Random) -> Image.Image:
    size, (width, height) = picture_size(rng)
    image = Image.new("RGB", (width, height), rng.choice(BACKGROUNDS))
    draw = ImageDraw.Draw(image)
    for item in items:
        r = SIZES[item.size] * min(width, height) / 2 * rng.uniform(0.93, 1.07)
        row, column = item.cell
        cx = (column + 0.5) * width / 3 + rng.uniform(-0.03, 0.03) * width
        cy = (row + 0.5) * height / 3 + rng.uniform(-0.03, 0.03) * height
        draw_shape(draw, item, cx, cy, r)
    return reduce(image, size, rng)


def draw_text(text: str, rng: Random) -> Image.Image:
    size, (width, height) = picture_size(rng)
    scale = width / size[0]
    dark = [(20, 20, 20), (30, 30, 90), (110, 20, 20), (20, 80, 30)]
    image = Image.new("RGB", (width, height), rng.choice(BACKGROUNDS))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=rng.randint(19, 23) * scale)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = (width - (right - left)) / 2 - left + rng.uniform(-4, 4) * scale
    y = (height - (bottom - top)) / 2 - top + rng.uniform(-10, 10) * scale
    draw.text((x, y), text, fill=rng.choice(dark), font=font)
    return reduce(image, size, rng)


DIRECTIONS = {
    "from left to right": ((0.15, 0.5), (0.85, 0.5)),
    "from right to left": ((0.85, 0.5), (0.15, 0.5)),
    "from top to bottom": ((0.5, 0.15), (0.5, 0.85)),
    "from bottom to top": ((0.5, 0.85), (0.5, 0.15)),
}


def draw_motion(item: Item, direction: str, frames: int, rng: Random) -> list[Image.Image]:
    size, (width, height) = picture_size(rng)
    background = rng.choice(BACKGROUNDS)
    (x0, y0), (x1, y1) = DIRECTIONS[direction]
    wobble = rng.uniform(-0.1, 0.1)
    r = SIZES[item.size] * min(width, height) / 2
    pictures = []
    for i in range(frames):
        t = i / (frames - 1)
        x, y = x0 + (x1 - x0) * t, y0 + (y1 - y0) * t
        x, y = (x, y + wobble) if y0 == y1 else (x + wobble, y)
        image = Image.new("RGB", (width, height), background)
        draw_shape(ImageDraw.Draw(image), item, x * width, y * height, r)
        pictures.append(reduce(image, size, rng))
    return pictures


def random_items(rng: Random, count: int) -> list[Item]:
    cells = sorted(rng.sample([(row, column) for row in range(3) for column in range(3)], count))
    return [
        Item(rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(SIZES)), cell)
        for cell in cells
    ]
