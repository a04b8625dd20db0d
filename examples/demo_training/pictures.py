"""Draws the pictures that `opticnerve demo` shows, four times as large as the model sees them.

    python -m examples.demo_training.pictures

A test compares the answers that `opticnerve.demo.chats` expects with these scenes.
"""

from collections.abc import Callable

from PIL import Image

from examples.demo_training import scenes
from examples.demo_training.scenes import Item, Random
from opticnerve.demo.chats import PICTURES

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


def main() -> None:
    for name, draw in DRAWINGS.items():
        draw().save(PICTURES / name, optimize=True)
        print(PICTURES / name)


if __name__ == "__main__":
    main()
