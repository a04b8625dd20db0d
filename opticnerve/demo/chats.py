"""What the demo asks: bundled pictures, questions, and the one right answer of each.

The pictures lie in ``pictures/`` as PNG files, drawn by ``python -m opticnerve.demo.chats`` from
the scenes below at four times the size that the model sees. The right answers come from the
scenes; what the demo prints comes from the model, and is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from opticnerve.demo import questions, scenes
from opticnerve.demo.scenes import Item, Random

PICTURES = Path(__file__).parent / "pictures"
SQUARE, WIDE, TALL = scenes.PICTURE_SIZES

STAR = [Item("star", "red", "large", (1, 1))]
PAIR = [Item("circle", "blue", "large", (0, 0)), Item("triangle", "green", "small", (2, 2))]
CROSS = [Item("cross", "purple", "large", (1, 0))]
DIAMOND = [Item("diamond", "orange", "small", (0, 2))]
WORD = "OCEAN"

DRAWINGS: dict[str, Callable[[], Image.Image]] = {
    "star.png": lambda: scenes.draw_scene(STAR, Random(1, SQUARE, 4)),
    "pair.png": lambda: scenes.draw_scene(PAIR, Random(2, WIDE, 4)),
    "cross.png": lambda: scenes.draw_scene(CROSS, Random(3, SQUARE, 4)),
    "diamond.png": lambda: scenes.draw_scene(DIAMOND, Random(4, TALL, 4)),
    "word.png": lambda: scenes.draw_text(WORD, Random(5, WIDE, 4)),
}


@dataclass(frozen=True)
class Turn:
    """One question. ``pictures`` are shown with it; a follow-up repeats the chat before it."""

    question: str
    answer: str
    pictures: tuple[str, ...] = ()
    follows: bool = False

    def paths(self) -> tuple[Path, ...]:
        return tuple(PICTURES / name for name in self.pictures)


TURNS = (
    Turn("What do you see?", questions.describe(STAR), ("star.png",)),
    Turn("Describe the image as JSON.", questions.as_json(PAIR), ("pair.png",)),
    Turn("What color is the triangle?", "The triangle is green.", follows=True),
    Turn("What does the text say?", f'The text says "{WORD}".', ("word.png",)),
    Turn(
        "What do the images show?",
        questions.show_each([CROSS[0].name, DIAMOND[0].name]),
        ("cross.png", "diamond.png"),
    ),
    Turn("Spell OCEAN.", " ".join(WORD)),
)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().save(PICTURES / name, optimize=True)
        print(PICTURES / name)


if __name__ == "__main__":
    main()
