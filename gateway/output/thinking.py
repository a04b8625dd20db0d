"""What a model thinks before it answers: the markers around it, and where it begins and ends."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

from gateway.output.reader import Malformed, Reader, SectionKind, Steps


class ThinkingMarks(NamedTuple):
    opening: str
    closing: str


MARKS = {
    "think": ThinkingMarks("<think>", "</think>"),
    "mistral": ThinkingMarks("[THINK]", "[/THINK]"),
    "kimi": ThinkingMarks("◁think▷", "◁/think▷"),
    "seed": ThinkingMarks("<seed:think>", "</seed:think>"),
}


class Thinking(Enum):
    """Whether an answer begins with thinking."""

    INSIDE = "inside"  # The prompt has the opening marker.
    POSSIBLE = "possible"  # The model may write it.
    NONE = "none"  # It does not: the model never thinks, or the prompt has ended its thinking.


class ThinkingReader(Reader):
    """Reasoning, then text. Without the opening marker at the start of the answer, all is text.
    White space around the markers is dropped.

    ``end``: the length of the reasoning and its markers, in characters; 0 while there is none,
    infinite while it goes on.
    """

    def __init__(self, marks: ThinkingMarks, thinking: Thinking) -> None:
        super().__init__()
        self.end = math.inf if thinking is Thinking.INSIDE else 0.0
        self._marks = marks
        self._thinking = thinking

    def read(self) -> Steps[None]:
        if (yield from self._begins()):
            yield from self.spaces()
            self.kind, self.end = SectionKind.REASONING, math.inf
            yield from self._reason()
        yield from self.text()

    def _begins(self) -> Steps[bool]:
        if self._thinking is not Thinking.POSSIBLE:
            return self._thinking is Thinking.INSIDE
        self.hold()
        try:
            yield from self.spaces()
            yield from self.literal(self._marks.opening)
        except Malformed:
            self.show(self.release())
            return False
        self.release()
        return True

    def _reason(self) -> Steps[None]:
        closing = self._marks.closing
        while self.char:
            yield from self.text(closing[0])
            self.hold()
            try:
                yield from self.literal(closing)
            except Malformed:
                self.show(self.release())
                continue
            self.release()
            self.drop_spaces()
            self.kind, self.end = SectionKind.TEXT, self.place
            yield from self.spaces()
            return
