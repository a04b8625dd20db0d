"""The answers that the demo expects are those that its pictures' scenes make."""

from __future__ import annotations

from examples.demo_training import questions
from examples.demo_training.pictures import CROSS, DIAMOND, DRAWINGS, PAIR, STAR, WORD
from opticnerve.demo.chats import PICTURES, TURNS


def test_expected_answers_are_those_of_the_scenes() -> None:
    assert [turn.answer for turn in TURNS] == [
        questions.describe(STAR),
        questions.as_json(PAIR),
        "The triangle is green.",
        f'The text says "{WORD}".',
        questions.show_each([CROSS[0].name, DIAMOND[0].name]),
        " ".join(WORD),
    ]


def test_the_bundled_pictures_are_those_that_are_asked_about() -> None:
    shown = {name for turn in TURNS for name in turn.pictures}
    assert shown == set(DRAWINGS) == {path.name for path in PICTURES.iterdir()}
