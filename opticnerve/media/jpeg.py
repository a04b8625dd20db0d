"""JPEG: marker segments up to the first scan. Thumbnails lie within segments, passed over."""

from __future__ import annotations

import re

from opticnerve.media import exif
from opticnerve.media.plan import Structure
from opticnerve.media.window import Window

MAGIC = b"\xff\xd8\xff"

_EXIF = b"Exif\x00\x00"
_XMP = b"http://ns.adobe.com/xap/1.0/\x00"
_APP1, _SCAN = 0xE1, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xDE}
_BARE = frozenset({0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})  # Markers without a length.
_FILL = re.compile(rb"\xff+")


def parse(data: bytes | memoryview) -> Structure:
    window = Window(data, "JPEG")
    size: tuple[int, int] | None = None
    blocks: list[bytes] = []
    xmp: bytes | None = None
    for marker, at, length in _segments(window):
        if marker in _FRAMES:
            size = _frame(window, at, length)
        elif marker == _APP1:
            content = window.take(at, length)
            if content.startswith(_EXIF):
                blocks.append(content if not blocks else content[len(_EXIF) :])
            elif content.startswith(_XMP):
                xmp = content[len(_XMP) :]
    if size is None:
        raise window.damaged("it has no frame header")
    return Structure("jpeg", *size, exif.orientation(b"".join(blocks), xmp))


def _segments(window: Window) -> list[tuple[int, int, int]]:
    """(marker, offset of the content, its length) of every segment before the first scan."""
    found: list[tuple[int, int, int]] = []
    at, markers = 2, 0
    while fill := _FILL.search(window.data, at):  # One pass: fill bytes are never read twice.
        marker, at = window.u8(fill.end()), fill.end() + 1
        markers += 1
        window.count(markers)
        if marker == _SCAN:
            window.be16(at)
            return found
        if marker == 0 or marker in _BARE:
            continue
        if marker < 0xC0:
            raise window.damaged("it has an unknown marker")
        length = max(window.be16(at) - 2, 0)
        if at + 2 + length > len(window):
            raise window.truncated()
        found.append((marker, at + 2, length))
        at += 2 + length
    raise window.truncated()


def _frame(window: Window, at: int, length: int) -> tuple[int, int]:
    """(width, height) of a frame header, which also says whether any decoder here can read it."""
    if length < 6:
        raise window.damaged("its frame header is too short")
    if window.u8(at) != 8:
        raise window.damaged(f"it has {window.u8(at)} bits a sample where 8 are supported")
    if window.u8(at + 5) not in (1, 3, 4):
        raise window.damaged(f"it has {window.u8(at + 5)} components where 1, 3 or 4 are supported")
    return window.be16(at + 3), window.be16(at + 1)
