"""Who wrote a special token: the template, or someone whose text it only frames.

Every special token gets an *alias*, a string that holds a random number of this process. The
tokenizer knows special tokens by their aliases alone, and the template writes aliases where its
source writes special tokens. So text from users and tools stays as it came, through every filter
that a template applies, and whatever it spells, it spells no alias: ``<|im_end|>`` typed by a user
is ten ordinary characters in their full context.

What a template builds from pieces (``'<|' + role + '|>'``) is no alias at first. ``Marks`` tells
it from user text: a second rendering, in which user text is interrupted wherever it could take
part in a special token. What is still whole there, the template wrote.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

OPEN, CLOSE = "\ue0fe", "\ue0ff"  # Private use, caseless, not white space: filters keep them.
NONCE_DIGITS = 24
STRUCTURE = frozenset({"role", "type"})  # Keys of messages whose values the schema has checked.


class Aliases:
    """Two-way mapping between special tokens and their aliases. Immutable."""

    def __init__(self, specials: Iterable[str], others: Iterable[str] = ()) -> None:
        """``specials`` get aliases; ``others``, added tokens that anyone may write, only take part
        in finding where a special token stands: the longest match at the leftmost place wins."""
        nonce = "".join(secrets.choice("0123456789") for _ in range(NONCE_DIGITS))
        self.head = OPEN + nonce
        ordered = list(dict.fromkeys(specials))
        self.of = {text: f"{self.head}{i:05d}{CLOSE}" for i, text in enumerate(ordered)}
        self.back = {alias: text for text, alias in self.of.items()}
        names = sorted({*ordered, *others} - {""}, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._aliases = re.compile(f"{self.head}[0-9]{{5}}{CLOSE}")

    def hide(self, text: str, without: frozenset[str] = frozenset()) -> str:
        """``text`` with every special token replaced by its alias, but those in ``without``."""

        def one(match: re.Match[str]) -> str:
            found = match.group()
            return found if found in without else self.of.get(found, found)

        return self._names.sub(one, text)

    def reveal(self, text: str) -> str:
        """``text`` as the world sees it. A broken alias stays as it is, and equals nothing."""
        if OPEN not in text:
            return text
        return self._aliases.sub(lambda match: self.back.get(match.group(), match.group()), text)

    def bare(self, text: str) -> bool:
        """Whether a special token stands in ``text`` under its own name."""
        if not any(name in text for name in self.of):  # By far the faster look, and the usual case.
            return False
        return any(match.group() in self.of for match in self._names.finditer(text))

    def without(self, text: str) -> tuple[str, int]:
        """``text`` without special tokens under their own names, and how many there were."""
        total = 0
        for name in self.of:
            count = text.count(name)
            if count:
                text, total = text.replace(name, ""), total + count
        return text, total

    def redact(self, text: str) -> str:
        """``text`` for an error message: whole aliases revealed, pieces of one removed."""
        return self.reveal(text).replace(self.head, "").replace(OPEN, "").replace(CLOSE, "")


class Marks:
    """Interrupts user text with one private character that nothing else in the request holds."""

    def __init__(self, specials: Iterable[str], taken: str) -> None:
        """``taken``: text that the mark must not occur in. Raises ValueError when all do."""
        self.mark = free_character(taken)
        self._beginnings = sorted({text[0] for text in specials if text})
        self._start = re.compile(r"\A(\s*)(?=\S)")

    def put(self, value: Any, key: str | None = None) -> Any:
        """``value`` with every string in it marked: after white space at its start, so that it can
        continue nothing, and around each character that starts a special token, so that it can
        begin nothing, whichever way a template turns it. Values of ``role`` and ``type`` stay."""
        if isinstance(value, str):
            if key in STRUCTURE:
                return value
            opened = value
            for char in self._beginnings:  # Whole text at a time: a match is an object.
                opened = opened.replace(char, self.mark + char + self.mark)
            return self._start.sub(lambda match: match.group(1) + self.mark, opened)
        if isinstance(value, Mapping):
            return {name: self.put(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.put(item, key) for item in value]
        return value

    def put_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The template's keyword arguments: switches, mostly, which templates compare. Marked only
        where a special token could begin."""
        return {
            name: self.put(value) if any(char in shown for char in self._beginnings) else value
            for name, value in values.items()
            for shown in (str(value),)
        }

    def remove(self, text: str) -> str:
        return text.replace(self.mark, "")


def free_character(taken: str) -> str:
    """A private-use character that ``taken`` does not hold. Raises ValueError when it holds all."""
    used = set(taken)
    for code in range(0xE100, 0xF900):
        if chr(code) not in used:
            return chr(code)
    raise ValueError("the text uses every private character")
