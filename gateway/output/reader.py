"""Finds structure in text that arrives in pieces: what a model thinks, and its calls of tools.

A reader is a coroutine over characters, so every cut of a text into pieces gives the same sections.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from enum import Enum
from typing import NamedTuple, TypeVar

SPACE = frozenset(" \t\r\n")
SPACES = "".join(SPACE)

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A coroutine that reads ``Reader.char``: the next character, or "" at the end of the text.
``yield`` moves on to the character after it."""


class SectionKind(Enum):
    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"  # A call begins; its text is the tool's name.
    ARGUMENTS = "arguments"  # More of its arguments: a piece of a JSON object's text.
    CALL_END = "call end"  # Its arguments are complete: neither cut off nor unreadable.


class Section(NamedTuple):
    kind: SectionKind
    text: str = ""


class Malformed(Exception):
    """The text does not have the expected form; the reader's ``char`` is the first that does not
    fit."""


class Reader(ABC):
    """Turns text into sections. White space is held back until the next character: between text and
    a section of another kind it is dropped."""

    def __init__(self) -> None:
        self.char = ""
        self.place = 0  # Position of ``char`` in the text.
        self.kind = SectionKind.TEXT  # The kind of text that ``show`` emits.
        self._sections: list[Section] = []
        self._pieces: list[str] = []  # Text of the last section, which may grow.
        self._spaces = ""
        self._held: list[str] | None = None
        # Text without this character needs no steps; None: all text does.
        self._stop: str | None = None
        self._steps = self.read()

    @abstractmethod
    def read(self) -> Steps[None]:
        """Reads a whole text."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is held, and everything that follows is text."""
        return self._stop == "" and not self._spaces and self.kind is SectionKind.TEXT

    def push(self, text: str) -> list[Section]:
        """The sections that more text begins or extends."""
        if self._stop and self._stop not in text:  # A fast way for most of a text.
            self.show(text)
            self.place += len(text)
            return self._take()
        at, begin = 0, self.place
        while at < len(text):
            plain = self._plain(text, at)
            if plain:
                self.show(text[at : at + plain])
                at += plain
                continue
            self.char, self.place = text[at], begin + at
            next(self._steps)
            if self._held is not None:
                self._held.append(self.char)
            at += 1
        self.place = begin + len(text)
        return self._take()

    def finish(self) -> list[Section]:
        """Ends the text; returns what was held back."""
        self.char = ""
        next(self._steps, None)
        self.show_spaces()
        return self._take()

    def _plain(self, text: str, at: int) -> int:
        """The number of characters from ``at`` on that are text, whatever follows."""
        if self._stop is None:
            return 0
        end = text.find(self._stop, at) if self._stop else -1
        return (len(text) if end < 0 else end) - at

    # ---- what is shown

    def emit(self, kind: SectionKind, text: str = "") -> None:
        if self._sections and self._sections[-1].kind is kind is not SectionKind.CALL:
            self._pieces.append(text)
            return
        self._close()
        self._sections.append(Section(kind))
        self._pieces = [text]

    def show(self, text: str) -> None:
        """Shows text of the current kind; white space at its end waits."""
        body = text.rstrip(SPACES)
        if body:
            self.emit(self.kind, self._spaces + body)
            self._spaces = ""
        self._spaces += text[len(body) :]

    def show_spaces(self) -> None:
        if self._spaces:
            self.emit(self.kind, self._spaces)
        self._spaces = ""

    def drop_spaces(self) -> None:
        self._spaces = ""

    def _close(self) -> None:
        if self._sections:
            self._sections[-1] = self._sections[-1]._replace(text="".join(self._pieces))

    def _take(self) -> list[Section]:
        self._close()
        made, self._sections, self._pieces = self._sections, [], []
        return made

    # ---- what may turn out to be text

    def hold(self) -> None:
        """Keeps the characters from here on, in case they turn out to be text."""
        self._held = []

    def release(self) -> str:
        """Ends ``hold``; returns the characters since."""
        held, self._held = self._held or [], None
        return "".join(held)

    # ---- steps

    def text(self, stop: str = "") -> Steps[None]:
        """Shows text up to the character ``stop``, or to the end."""
        self._stop = stop
        while self.char and self.char != stop:
            self.show(self.char)
            yield
        self._stop = None

    def literal(self, text: str) -> Steps[None]:
        """Reads exactly ``text``. Raises Malformed for anything else."""
        for character in text:
            if self.char != character:
                raise Malformed
            yield

    def spaces(self) -> Steps[None]:
        while self.char in SPACE:
            yield

    def word(self, alphabet: frozenset[str], longest: int) -> Steps[str]:
        """Reads 1 to ``longest`` characters of ``alphabet``. Raises Malformed for none, or more."""
        word = ""
        while self.char in alphabet:
            word += self.char
            if len(word) > longest:
                raise Malformed
            yield
        if not word:
            raise Malformed
        return word
