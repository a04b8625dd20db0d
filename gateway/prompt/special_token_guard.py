"""Provenance of special tokens: the template's own are special, those in a user's text are not.

Every special token gets an *alias*, a string that contains a random number of this process. The
tokenizer knows special tokens by their aliases only, and the template writes aliases where its
source writes special tokens. Text from users and tools passes unchanged through every filter of
the template, and cannot spell an alias: ``<|im_end|>`` typed by a user is ten ordinary characters,
tokenized in their full context.

A special token that a template builds from pieces (``'<|' + role + '|>'``) is not an alias at
first. ``Marks`` distinguishes it from user text by a second rendering, in which user text is
interrupted wherever it could be a part of a special token: a token that is still whole there was
written by the template.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from opticnerve.errors import InvalidRequest

OPEN, CLOSE = (
    "\ue0fe",
    "\ue0ff",
)  # Private-use characters: they have no case and are not white space, so filters keep them.
NONCE_DIGITS = 24
# Templates look up these keys, and compare the values of some, so they are never changed. None of
# them is a special token.
KEYS = frozenset(
    {"role", "content", "type", "text", "name", "tool_call_id", "refusal", "thinking"}
    | {"reasoning_content", "tool_calls", "id", "function", "arguments", "tools", "description"}
    | {"parameters", "properties", "required", "enum", "items", "default", "title", "const"}
    | {"anyOf", "oneOf", "allOf", "format", "additionalProperties", "$ref", "$defs", "nullable"}
    | {"contents"}  # Of documents.
)
COMPARED_KEYS = frozenset({"role", "type"})
COMPARED_VALUES = frozenset(
    {"system", "user", "assistant", "tool", "text", "image", "function", "object", "array"}
    | {"string", "number", "integer", "boolean", "null"}
)


class Aliases:
    """Two-way mapping between special tokens and their aliases. Immutable."""

    def __init__(
        self, specials: Iterable[str], others: Iterable[str] = (), nonce: str | None = None
    ) -> None:
        """``specials`` get aliases. ``others``: added tokens that users may write; they matter only
        because the leftmost, longest match wins when special tokens are found. ``nonce``: the
        random number of another process, to share its aliases."""
        nonce = nonce or "".join(secrets.choice("0123456789") for _ in range(NONCE_DIGITS))
        self.head = OPEN + nonce
        ordered, others = list(dict.fromkeys(specials)), list(others)
        self.arguments = {"specials": ordered, "others": others, "nonce": nonce}
        self.of = {text: f"{self.head}{i:05d}{CLOSE}" for i, text in enumerate(ordered)}
        self.back = {alias: text for text, alias in self.of.items()}
        names = sorted({*ordered, *others} - {""}, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._aliases = re.compile(f"{self.head}[0-9]{{5}}{CLOSE}")

    def hide(self, text: str, without: frozenset[str] = frozenset()) -> str:
        """``text`` with every special token, except those in ``without``, replaced by its alias."""

        def one(match: re.Match[str]) -> str:
            found = match.group()
            return found if found in without else self.of.get(found, found)

        return self._names.sub(one, text)

    def reveal(self, text: str) -> str:
        """``text`` with aliases replaced by their special tokens. A broken alias is not changed."""
        if OPEN not in text:
            return text
        return self._aliases.sub(lambda match: self.back.get(match.group(), match.group()), text)

    def places(self, hidden: str, places: Iterable[int], spelled: Mapping[str, str]) -> list[int]:
        """Maps ``places``, positions in ``hidden``, to positions in the revealed text. ``spelled``:
        parts of ``hidden`` that contain aliases and stand for other texts; a position within such a
        part is mapped to its beginning."""
        texts = {**self.back, **spelled}
        known = re.compile("|".join([*map(re.escape, spelled), self._aliases.pattern]))
        # Of each alias; and the length that aliases have added so far.
        starts, ends, longer = [], [0], [0]
        for match in known.finditer(hidden):
            starts.append(match.start())
            ends.append(match.end())
            longer.append(longer[-1] + len(match.group()) - len(texts[match.group()]))
        starts.append(len(hidden))
        found = []
        for place in places:
            passed = bisect_right(ends, place) - 1
            found.append(min(place, starts[passed]) - longer[passed])
        return found

    def occur_in(self, text: str) -> bool:
        """Whether ``text`` contains a special token under its own name."""
        if not any(name in text for name in self.of):  # A fast check, which is usually enough.
            return False
        return any(match.group() in self.of for match in self._names.finditer(text))

    def without(self, text: str) -> tuple[str, int]:
        """``text`` without special tokens under their own names, and their number."""
        total = 0
        for name in self.of:
            count = text.count(name)
            if count:
                text, total = text.replace(name, ""), total + count
        return text, total

    def redact(self, text: str) -> str:
        """``text`` for an error message: aliases are revealed, and pieces of aliases removed."""
        return self.reveal(text).replace(self.head, "").replace(OPEN, "").replace(CLOSE, "")


class Marks:
    """Interrupts user text with a private-use character that nothing else in the request has."""

    def __init__(self, specials: Iterable[str], taken: str) -> None:
        """``taken``: text that must not contain the mark. Raises InvalidRequest if none is left."""
        self.mark = free_character(taken)
        self._beginnings = sorted({text[0] for text in specials if text})
        self._start = re.compile(r"\A(\s*)(?=\S)")

    def put(self, value: Any, key: str | None = None) -> Any:
        """``value`` with every string in it marked. A mark at the start, after white space, keeps
        the text from continuing a special token. Marks around each character that starts a special
        token keep the text from beginning one, even reversed. KEYS, and COMPARED_VALUES of
        COMPARED_KEYS, are not changed."""
        if isinstance(value, str):
            if key in COMPARED_KEYS and value in COMPARED_VALUES:
                return value
            opened = value
            for char in self._beginnings:  # Faster than a regular expression with match objects.
                opened = opened.replace(char, self.mark + char + self.mark)
            return self._start.sub(lambda match: match.group(1) + self.mark, opened)
        if isinstance(value, Mapping):
            return {
                name if name in KEYS else self.put(name): self.put(item, name)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self.put(item, key) for item in value]
        return value

    def put_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Marks the template's keyword arguments. Tools and documents are marked like messages;
        other values only where a special token could begin, since most are switches that templates
        compare."""
        return {
            name: self.put(value)
            if name in ("tools", "documents") or any(char in shown for char in self._beginnings)
            else value
            for name, value in values.items()
            for shown in (str(value),)
        }

    def remove(self, text: str) -> str:
        return text.replace(self.mark, "")


def free_character(taken: str) -> str:
    """A private-use character that is not in ``taken``. Raises InvalidRequest without one."""
    used = set(taken)
    for code in range(0xE100, 0xF900):
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequest(
        "the messages contain text that spells this model's special tokens, and every private-use "
        "character, so that the two cannot be told apart; leave out some of these characters",
        param="messages",
    )
