"""Reads JSON as it arrives, and writes it as JSON: control characters in strings, which models
write raw, are escaped."""

from __future__ import annotations

import json
import string
from collections.abc import Callable

from gateway.output.reader import SPACE, Malformed, Reader, Steps

BRACKETS = {"{": "}", "[": "]"}
WORDS = {word[0]: word for word in ("true", "false", "null")}
DIGITS = frozenset(string.digits)
HEX_DIGITS = frozenset(string.hexdigits)
ESCAPED = frozenset('"\\/bfnrt')

Write = Callable[[str], object]


def escape(character: str) -> str:
    """A character inside a JSON string."""
    return json.dumps(character, ensure_ascii=False)[1:-1]


def value(at: Reader, write: Write) -> Steps[None]:
    """Any value, however deep. Raises Malformed."""
    ends: list[str] = []  # Of the objects and lists that are open.
    while True:
        opened = at.char in BRACKETS
        if opened:
            ends.append(BRACKETS[at.char])
            yield from copy(at, write, at.char)
            yield from _blank(at, write)
        else:
            yield from _scalar(at, write)
        while ends:
            more = opened and at.char != ends[-1]
            if not opened:
                more = yield from _comma(at, write)
            if more:
                if ends[-1] == "}":
                    yield from _key(at, write)
                break
            yield from copy(at, write, ends[-1])
            ends.pop()
            opened = False
        else:
            return


def _comma(at: Reader, write: Write) -> Steps[bool]:
    """Reads what stands after an entry. Returns whether another one follows."""
    yield from _blank(at, write)
    if at.char != ",":
        return False
    yield from copy(at, write, ",")
    yield from _blank(at, write)
    return True


def _key(at: Reader, write: Write) -> Steps[None]:
    yield from text(at, write)
    yield from _blank(at, write)
    yield from copy(at, write, ":")
    yield from _blank(at, write)


def _scalar(at: Reader, write: Write) -> Steps[None]:
    if at.char == '"':
        yield from text(at, write)
    elif at.char in WORDS:
        for character in WORDS[at.char]:
            yield from copy(at, write, character)
    else:
        yield from _number(at, write)


def captured(at: Reader) -> Steps[str]:
    """A string's value. Raises Malformed."""
    pieces: list[str] = []
    yield from text(at, pieces.append)
    return str(json.loads("".join(pieces)))


def copy(at: Reader, write: Write, character: str) -> Steps[None]:
    """Exactly this character. Raises Malformed."""
    if at.char != character:
        raise Malformed
    write(character)
    yield


def text(at: Reader, write: Write) -> Steps[None]:
    yield from copy(at, write, '"')
    while at.char != '"':
        if not at.char:
            raise Malformed
        if at.char == "\\":
            yield from _escape(at, write)
        else:
            write(at.char if at.char >= " " else escape(at.char))
            yield
    yield from copy(at, write, '"')


def _escape(at: Reader, write: Write) -> Steps[None]:
    """Writes an escape as a whole, so that a piece never ends within one. If JSON has no such
    escape, as with ``\\d``, the backslash stands for itself."""
    yield
    if at.char == "u":
        yield
        code = yield from hex_digits(at, 4)
        write(("\\u" if len(code) == 4 else "\\\\u") + code)
    elif at.char in ESCAPED:
        write("\\" + at.char)
        yield
    elif at.char:
        write("\\\\")


def hex_digits(at: Reader, most: int) -> Steps[str]:
    found = ""
    while len(found) < most and at.char in HEX_DIGITS:
        found += at.char
        yield
    return found


def _number(at: Reader, write: Write) -> Steps[None]:
    if at.char == "-":
        yield from copy(at, write, "-")
    if at.char == "0":
        yield from copy(at, write, "0")
    else:
        yield from digits(at, write)
    if at.char == ".":
        yield from copy(at, write, ".")
        yield from digits(at, write)
    if at.char and at.char in "eE":
        yield from exponent(at, write)


def exponent(at: Reader, write: Write) -> Steps[None]:
    yield from copy(at, write, at.char)
    if at.char and at.char in "+-":
        yield from copy(at, write, at.char)
    yield from digits(at, write)


def digits(at: Reader, write: Write) -> Steps[None]:
    """One digit or more."""
    if at.char not in DIGITS:
        raise Malformed
    while at.char in DIGITS:
        yield from copy(at, write, at.char)


def _blank(at: Reader, write: Write) -> Steps[None]:
    while at.char in SPACE:
        yield from copy(at, write, at.char)
