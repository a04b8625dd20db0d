"""Counts the values of JSON before it is parsed, and parses large JSON without holding the GIL:
long strings are cut out and read in steps.

Three bytes, ``{},``, become an object a hundred times their size, so a body's length does not bound
the memory that it takes once parsed, and its values are counted first. Strings take about their own
length, and are not counted.

A parser in C holds the GIL from the first byte to the last: 60 MB stop every other thread, the
event loop included, for a third of a second, and a body that is crafted to be slow for ten times as
long. But long bodies are long because of text and pictures in strings. So long strings are cut out
in small steps, the rest, which is bounded, is parsed at once, and the strings are decoded in small
steps too.

Memory: the body, and its strings once more; twice while a string with escapes or non-ASCII
characters is joined from its pieces. Python stores a text with an emoji in it at four bytes a
character, so non-ASCII texts are bounded by the longest prompt.
"""

from __future__ import annotations

import re
import secrets
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from gateway.api.schemas.base import BOM, ESCAPED_SURROGATE, LONE_SURROGATE_MESSAGE
from gateway.edge.limits import MAX_NAME_CHARACTERS, MAX_OUTLINE_BYTES, MAX_TEXT_CHARACTERS
from opticnerve.errors import InvalidRequest, PayloadTooLarge

LONG = 128  # Strings of at least this many bytes are cut out.
PIECE_BYTES = 2**18  # Bytes handled in one step; other threads run between steps.
WINDOW = 32  # Bytes examined before a cut; an escaped surrogate pair has twelve.
_INSIDE = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\.)*+', re.DOTALL)  # The inside of a string.
_CONTROL = bytes(range(32))
_TOKEN = re.compile(rb"\\u[0-9a-fA-F]{4}|\\[^u]|[^\\]", re.DOTALL)
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB]..")


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
        pieces = chunk.split(b'"')  # Alternately outside and inside of strings.
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
    """JSON without its long strings. ``values``: objects, lists and their entries, as
    ``count_values`` counts them. ``text``: the JSON, with a mark and a number in place of each long
    string."""

    values: int
    text: bytes
    _mark: str
    _whole: memoryview
    # Three numbers for each long string: start and end between the quotes, and 1 if it is ASCII
    # without escapes. An array, because the garbage collector would stop all threads to visit
    # as many objects.
    _strings: array[int]

    def read(self) -> Any:
        """The parsed value, with its long strings. Raises ValueError for text that is not JSON, and
        InvalidRequest and PayloadTooLarge for its strings."""
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
        """Field names are bounded, because each use of one hashes or compares all of it."""
        name = self._string(value)
        if len(name) > MAX_NAME_CHARACTERS:
            raise InvalidRequest(
                f"the name of a field is longer than {MAX_NAME_CHARACTERS} characters"
            )
        return name


def split_long_strings(text: bytes | bytearray, enough: int) -> Outline:
    """Cuts the long strings out of ``text``; stops early if it has more values than ``enough``.

    Raises InvalidRequest if the text cannot be JSON, and PayloadTooLarge if more than
    MAX_OUTLINE_BYTES are left besides its long strings.
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
        if count > 2 * values + 2:  # An entry has at most two strings: a name and a value.
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
            piece = piece[:-1]  # Do not split an escape.
        bare = piece
        if b"\\" in piece:  # Many times faster than a regular expression.
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
            if ESCAPED_SURROGATE.search(raw[place:stop]):
                raise _invalid(f"a string {LONE_SURROGATE_MESSAGE}") from error
            raise _invalid(str(error).partition(" at line ")[0]) from error
        total += len(piece)
        ascii = ascii and piece.isascii()
        if total > MAX_TEXT_CHARACTERS and not ascii:
            raise PayloadTooLarge(
                f"a text of more than {MAX_TEXT_CHARACTERS} characters is longer "
                "than any prompt; send a shorter one"
            )
        yield piece
        place = stop


def _cut(raw: memoryview, start: int) -> int:
    """The end of a piece that begins at ``start``. It splits no UTF-8 character, escape or escaped
    surrogate pair. If there is no such place, ``raw`` is not JSON, and any place serves."""
    at = start + PIECE_BYTES
    if at >= len(raw):
        return len(raw)
    before, window = bytes(raw[start : at - WINDOW]), bytes(raw[at - WINDOW : at])
    # Start after an escape that begins before the window.
    place = (len(before) - len(before.rstrip(b"\\"))) % 2
    found = WINDOW
    while match := _TOKEN.match(window, place):
        place = match.end()
        inside = 0x80 <= raw[at - WINDOW + place] < 0xC0  # A UTF-8 continuation byte.
        if place >= WINDOW // 2 and not inside and not _HIGH_SURROGATE.match(match.group()):
            found = place
    return at - WINDOW + found


def _check_size(size: int) -> None:
    if size > MAX_OUTLINE_BYTES:
        raise PayloadTooLarge(
            f"there are more than {MAX_OUTLINE_BYTES} bytes besides long strings: numbers, "
            "names, white space, short strings; send fewer or shorter ones"
        )


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"not valid JSON: {reason}", code="invalid_json")
