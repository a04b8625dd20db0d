"""What the demo asks: bundled pictures, questions, and the one right answer of each.

``examples/demo_training`` drew the pictures and trained the checkpoint. What the demo prints comes
from the model; the answers here are only compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"


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
    Turn("What do you see?", "A large red star in the center.", ("star.png",)),
    Turn(
        "Describe the image as JSON.",
        '[{"shape": "circle", "color": "blue", "size": "large", "position": "top left"}, '
        '{"shape": "triangle", "color": "green", "size": "small", "position": "bottom right"}]',
        ("pair.png",),
    ),
    Turn("What color is the triangle?", "The triangle is green.", follows=True),
    Turn("What does the text say?", 'The text says "OCEAN".', ("word.png",)),
    Turn(
        "What do the images show?",
        "The first image shows a purple cross and the second image shows an orange diamond.",
        ("cross.png", "diamond.png"),
    ),
    Turn("Spell OCEAN.", "O C E A N"),
)
