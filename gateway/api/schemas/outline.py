"""A JSON text before it is parsed: how many values it holds, and a long one without its long
strings.

Three bytes, ``{},``, become an object of a hundred times their size: the length of a body says
little of what it costs, so its values are counted first. Text costs its length, and does not count.

A parser in C holds the interpreter's lock from its first byte to its last: 60 MB of it stop every
other thread, the event loop among them, for a third of a second, and ten times as long where the
text is made to be slow. But what is long in a long body is text and pictures, in strings. So the
strings are found in small steps and left out; the rest, which is bounded, is parsed; and the
strings are read in small steps too.

Memory: the body, and its strings once more; twice while one is put together from pieces, which is
where it has escapes or other characters than ASCII. Python keeps a text that has both letters and
an emoji in four bytes a character, so such texts are bounded by what any prompt could hold.
"""

from __future__ import annotations

import re
import secrets
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from gateway.api.schemas.base import BOM, HALVES
from gateway.edge.limits import MAX_NAME_CHARACTERS, MAX_OUTLINE_BYTES, MAX_TEXT_CHARACTERS
from opticnerve.errors import InvalidRequest, PayloadTooLarge

LONG = 128  # Strings of so many bytes are left out of an outline.
PIECE_BYTES = 2**18  # Handled in one step, between which other threads run.
WINDOW = 32  # Bytes before a cut that are looked at; a pair of escapes is twelve.
_INSIDE = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\.)*+', re.DOTALL)  # A string up to its end.
_CONTROL = bytes(range(32))
_TOKEN = re.compile(rb"\\u[0-9a-fA-F]{4}|\\[^u]|[^\\]", re.DOTALL)
_FIRST_HALF = re.compile(rb"\\u[dD][89abAB]..")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def count_values(text: bytes | bytearray, enough: int) -> int:
    """The number of objects, lists and their entries in ``text``; counting stops beyond ``enough``.

    A parser finds no more of them than this, even in text that is not valid JSON.
    """
    total, start, in_string = 1, 0, False
    while start < len(text) and total <= enough:
        chunk = _chunk(text, start)
        start += len(chunk)
        if in_string and b'"' not in chunk:
            continue
        if b"\\" in chunk:
            chunk = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = chunk.split(b'"')  # In turn outside and inside of strings.
        outside = b"".join(pieces[in_string::2])
        total += sum(outside.count(mark) for mark in (b",", b"[", b"{"))
        in_string ^= len(pieces) % 2 == 0
    return total


def _chunk(text: bytes | bytearray, start: int) -> bytes | bytearray:
    """The next piece of ``text``, whose end never splits a backslash escape."""
    chunk = text[start : start + PIECE_BYTES]
    backslashes = len(chunk) - len(chunk.rstrip(b"\\"))
    return chunk if backslashes % 2 == 0 else text[start : start + PIECE_BYTES + 1]


@dataclass(frozen=True, slots=True)
class Outline:
    """``values``: objects, lists and their entries, as ``count_values`` counts them. ``text`` is
    JSON, in which a mark and a number stand for each long string."""

    values: int
    text: bytes
    _mark: str
    _whole: memoryview
    # For each long string its start and end, between the quotes, and 1 if it is ASCII without
    # escapes. Numbers, because the garbage collector stops all threads to look at objects.
    _strings: array[int]

    def read(self) -> Any:
        """The whole value. Raises ValueError for text that is not JSON, InvalidRequest and
        PayloadTooLarge for its strings."""
        return self._fill(from_json(self.text, allow_inf_nan=False))

    def _fill(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, list):
            return [self._fill(entry) for entry in value]
        if isinstance(value, dict):
            return {self._name(name): self._fill(entry) for name, entry in value.items()}
        return value

    def _string(self, value: str) -> str:
        if not value.startswith(self._mark):
            return value
        number = 3 * int(value[len(self._mark) :])
        start, end, plain = self._strings[number : number + 3]
        raw = self._whole[start:end]
        return str(raw, "ascii") if plain else "".join(_decoded(raw))

    def _name(self, value: str) -> str:
        """Names are bounded, because every use of one hashes or compares all of it."""
        name = self._string(value)
        if len(name) > MAX_NAME_CHARACTERS:
            raise InvalidRequest(
                f"the name of a field is longer than {MAX_NAME_CHARACTERS} characters"
            )
        return name


def draw(text: bytes | bytearray, enough: int) -> Outline:
    """The outline of ``text``; incomplete if it has more values than ``enough``.

    Raises InvalidRequest for what cannot be JSON, and PayloadTooLarge for a text of more than
    MAX_OUTLINE_BYTES besides its long strings.
    """
    mark, view = secrets.token_hex(16), memoryview(text)
    pieces: list[bytes] = []
    strings = array("q")
    place = len(BOM) if text.startswith(BOM) else 0
    size, values, count = 0, 1, 0
    while place < len(text) and values <= enough:
        start = text.find(b'"', place) + 1 or len(text)
        size += start - place
        _check_size(size)
        outside = bytes(view[place:start])
        values += sum(outside.count(sign) for sign in (b",", b"[", b"{"))
        pieces.append(outside)
        if not outside.endswith(b'"'):
            break
        count += 1
        if count > 2 * values + 2:  # A name and a value an entry.
            raise _invalid("strings follow each other")
        place, plain = _end(text, start)
        if place - start < LONG:
            inside = bytes(view[start:place])
        else:
            inside = f"{mark}{len(strings) // 3}".encode()
            strings.extend((start, place, plain))
        size += len(inside)
        pieces += (inside, b'"')
        place += 1
    return Outline(values, b"".join(pieces), mark, view, strings)


def _end(text: bytes | bytearray, start: int) -> tuple[int, bool]:
    """The end of the string that begins at ``start``, and whether it is ASCII without escapes."""
    place, plain, size = start, True, 2 * LONG
    while True:
        piece = text[place : place + size]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and len(piece) > 1:
            piece = piece[:-1]  # No escape is cut in two.
        bare = piece
        if b"\\" in piece:  # Many times quicker than a regular expression.
            bare = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        if b'"' in bare:
            match = _INSIDE.match(piece)
            piece = piece[: match.end() if match else 0]
            bare = b""
            ended = text[place + len(piece)] == ord('"')
        else:
            ended = False
        if not (ended or piece) or len(bare.translate(None, _CONTROL)) < len(bare):
            raise _invalid("a string has no end, or holds a control character")
        plain = plain and piece.isascii() and b"\\" not in piece
        place += len(piece)
        if ended:
            return place, plain
        size = min(4 * size, PIECE_BYTES)


def _decoded(raw: memoryview) -> Iterator[str]:
    place, total, ascii = 0, 0, True
    while place < len(raw):
        stop = _cut(raw, place)
        try:
            piece: str = from_json(b'"' + raw[place:stop] + b'"')
        except ValueError as error:
            if _HALF.search(raw[place:stop]):
                raise _invalid(f"a string {HALVES}") from error
            raise _invalid(str(error).partition(" at line ")[0]) from error
        total += len(piece)
        ascii = ascii and piece.isascii()
        if total > MAX_TEXT_CHARACTERS and not ascii:
            raise PayloadTooLarge(
                f"the body holds a text of more than {MAX_TEXT_CHARACTERS} characters, which is "
                "more than any prompt; send a shorter one"
            )
        yield piece
        place = stop


def _cut(raw: memoryview, start: int) -> int:
    """The end of a piece that begins at ``start``. It splits no character, no escape, and no pair
    of escapes that is one character; if there is no such place, ``raw`` is not JSON, and any will
    do."""
    at = start + PIECE_BYTES
    if at >= len(raw):
        return len(raw)
    before, window = bytes(raw[start : at - WINDOW]), bytes(raw[at - WINDOW : at])
    place = (len(before) - len(before.rstrip(b"\\"))) % 2  # Escaped from before the window.
    found = WINDOW
    while match := _TOKEN.match(window, place):
        place = match.end()
        inside = 0x80 <= raw[at - WINDOW + place] < 0xC0  # Of a character in UTF-8.
        if place >= WINDOW // 2 and not inside and not _FIRST_HALF.match(match.group()):
            found = place
    return at - WINDOW + found


def _check_size(size: int) -> None:
    if size > MAX_OUTLINE_BYTES:
        raise PayloadTooLarge(
            f"the body holds more than {MAX_OUTLINE_BYTES} bytes besides long strings: numbers, "
            "names, white space, short strings; send fewer or shorter ones"
        )


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json")
