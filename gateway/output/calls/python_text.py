"""Reads literals of Python as they arrive, and writes them as JSON."""

from __future__ import annotations

import string

from gateway.output.calls import json_text
from gateway.output.calls.json_text import Write
from gateway.output.reader import Malformed, Reader, Steps

WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    **{word: word for word in json_text.WORDS.values()},
}
LETTERS = frozenset(string.ascii_letters)
BRACKETS = {"{": "}", "[": "]", "(": ")"}  # Tuples become lists in JSON.
ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "0": "\0",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "\n": "",
}
CODES = {"x": 2, "u": 4, "U": 8}  # Escapes of characters by code, and their number of digits.


def value(at: Reader, write: Write) -> Steps[None]:
    """Any literal, however deep. A comma may follow the last entry. Raises Malformed."""
    ends: list[str] = []  # Of the dictionaries, lists and tuples that are open.
    while True:
        opened = at.char in BRACKETS
        if opened:
            ends.append(BRACKETS[at.char])
            write("{" if at.char == "{" else "[")
            yield
            yield from at.spaces()
        else:
            yield from _scalar(at, write)
        while ends:
            end = ends[-1]
            if not opened:
                yield from _comma(at, end)
            if at.char != end:
                if not opened:
                    write(", ")
                if end == "}":
                    yield from _key(at, write)
                break
            write("}" if end == "}" else "]")
            yield
            ends.pop()
            opened = False
        else:
            return


def _comma(at: Reader, end: str) -> Steps[None]:
    """What stands between an entry and the next one, or ``end``."""
    yield from at.spaces()
    if at.char != end:
        yield from at.literal(",")
        yield from at.spaces()


def _scalar(at: Reader, write: Write) -> Steps[None]:
    if at.char and at.char in "'\"":
        yield from _text(at, write)
    elif at.char in LETTERS:
        word = yield from at.word(LETTERS, 5)
        if word not in WORDS:
            raise Malformed
        write(WORDS[word])
    else:
        yield from _number(at, write)


def _key(at: Reader, write: Write) -> Steps[None]:
    if at.char == "" or at.char not in "'\"":
        raise Malformed
    yield from _text(at, write)
    yield from at.spaces()
    yield from at.literal(":")
    yield from at.spaces()
    write(": ")


def _text(at: Reader, write: Write) -> Steps[None]:
    quote = at.char
    write('"')
    yield
    while at.char != quote:
        if not at.char:
            raise Malformed
        if at.char == "\\":
            yield
            yield from _escape(at, write)
        else:
            write(json_text.escape(at.char))
            yield
    write('"')
    yield


def _escape(at: Reader, write: Write) -> Steps[None]:
    """Reads what follows a backslash. If that is no escape, the backslash stands for itself, as in
    Python."""
    kind = at.char
    if kind in CODES:
        yield
        code = yield from json_text.hex_digits(at, CODES[kind])
        number = int(code or "0", 16)
        if len(code) < CODES[kind] or number > 0x10FFFF:
            write("\\\\" + kind + code)
        else:
            write(f"\\u{number:04x}" if number < 0x10000 else chr(number))
    elif kind in ESCAPES:
        write(json_text.escape(ESCAPES[kind]))
        yield
    elif kind:
        write("\\\\")


def _number(at: Reader, write: Write) -> Steps[None]:
    """JSON has neither ``+1`` nor ``.5`` nor ``1.``"""
    if at.char == "+":
        yield
    elif at.char == "-":
        yield from json_text.copy(at, write, "-")
    if at.char == ".":
        write("0")
    elif at.char == "0":
        yield from json_text.copy(at, write, "0")
    else:
        yield from json_text.digits(at, write)
    if at.char == ".":
        yield from json_text.copy(at, write, ".")
        if at.char in json_text.DIGITS:
            yield from json_text.digits(at, write)
        else:
            write("0")
    if at.char and at.char in "eE":
        yield from json_text.exponent(at, write)
