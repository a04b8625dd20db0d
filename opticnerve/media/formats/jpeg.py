"""JPEG: marker segments up to the first scan, then scans, which are counted, not decoded.
Thumbnails lie within segments, and are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opticnerve.media.formats import exif
from opticnerve.media.formats.byte_reader import PIECE_PASSES, Window
from opticnerve.media.plan import Structure

MAGIC = b"\xff\xd8\xff"

_EXIF = b"Exif\x00\x00"
_XMP = b"http://ns.adobe.com/xap/1.0/\x00"
_APP0, _APP1, _APP14, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_TABLES, _SCAN, _END = 0xDB, 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xDE}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ARITHMETIC = frozenset(range(0xC9, 0xD0)) - {0xCC}
_NO_LENGTH = frozenset({0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})  # Markers without a length.
_METADATA = frozenset({*range(0xE0, 0xF0), _COMMENT}) - {_APP0, _APP14}  # No pixel depends on it.
_FILL = re.compile(rb"\xff+")

# Whether a byte after 0xFF ends coded data: not for a stuffed byte, a restart, a fill byte, or the
# reserved markers, which decoders skip when they look for a restart.
_ENDS = np.ones(256, dtype=np.bool_)
_ENDS[[*range(0xC0), *range(0xD0, 0xD8), 0xFF]] = False
_BLOCK_BYTES = 2**20

_BYTE_PASSES = 2  # For each byte of coded data, beside those for pixels.
_TABLE_BYTE_PASSES = 16  # Pillow reads quantization tables in Python.
_ARITHMETIC_PASSES = 2
_BYTES_PER_PIXEL = 8  # Four in the picture, four in its copy as RGB or turned upright.
_BYTES_PER_SAMPLE = 2  # Of coefficients, which are kept in memory if there are several scans.


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame header. ``samplings``: (horizontal, vertical) of each component."""

    marker: int
    width: int
    height: int
    samplings: tuple[tuple[int, int], ...]

    @property
    def pixels(self) -> int:
        """Pixels of the picture, rounded up to whole blocks."""
        across, down = self._max_sampling
        columns, rows = -(-self.width // (8 * across)), -(-self.height // (8 * down))
        return columns * rows * 64 * across * down

    @property
    def samples(self) -> int:
        """Samples of all components, rounded up to whole blocks."""
        across, down = self._max_sampling
        return self.pixels * sum(h * v for h, v in self.samplings) // (across * down)

    @property
    def _max_sampling(self) -> tuple[int, int]:
        return max(h for h, _ in self.samplings), max(v for _, v in self.samplings)


def read_structure(data: bytes | memoryview) -> Structure:
    window = Window(data, "JPEG")
    frame: _Frame | None = None
    blocks: list[bytes] = []
    xmp: bytes | None = None
    segments = _segments(window)
    for marker, at, length in segments:
        if marker in _FRAMES:
            frame = _frame(window, marker, at, length)
        elif marker == _APP1:
            content = window.take(at, length)
            if content.startswith(_EXIF):
                blocks.append(content if not blocks else content[len(_EXIF) :])
            elif content.startswith(_XMP):
                xmp = content[len(_XMP) :]
    if frame is None:
        raise window.damaged("it has no frame header")
    passes, memory = _cost(window, frame, segments)
    orientation = exif.orientation(b"".join(blocks), xmp)
    return Structure(
        "jpeg", frame.width, frame.height, orientation, decode_cost=passes, memory=memory
    )


def strip(data: bytes | memoryview) -> bytes | memoryview:
    """The file without metadata, which decoders would parse; the plan has the orientation."""
    window = Window(data, "JPEG")
    return window.without(
        (at - 4, at + size) for marker, at, size in _segments(window) if marker in _METADATA
    )


def _segments(window: Window) -> list[tuple[int, int, int]]:
    """(marker, offset of the content, its length) of every segment up to the first scan's header,
    which is included."""
    found: list[tuple[int, int, int]] = []
    at, markers = 2, 0
    while fill := _FILL.search(window.data, at):  # Fill bytes are never read twice.
        marker, at = window.u8(fill.end()), fill.end() + 1
        markers += 1
        window.count(markers)
        if marker == _SCAN:
            found.append((marker, at + 2, max(window.be16(at) - 2, 0)))
            return found
        if marker == 0 or marker in _NO_LENGTH:
            continue
        if marker < 0xC0:
            raise window.damaged("it has an unknown marker")
        length = max(window.be16(at) - 2, 0)
        if at + 2 + length > len(window):
            raise window.truncated()
        found.append((marker, at + 2, length))
        at += 2 + length
    raise window.truncated()


def _frame(window: Window, marker: int, at: int, length: int) -> _Frame:
    """A frame header that the decoder can read. Raises InvalidMedia for others."""
    if length < 6:
        raise window.damaged("its frame header is too short")
    if window.u8(at) != 8:
        raise window.damaged(f"it has {window.u8(at)} bits a sample where 8 are supported")
    count = window.u8(at + 5)
    if count not in (1, 3, 4):
        raise window.damaged(f"it has {count} components where 1, 3 or 4 are supported")
    packed = window.data[at + 7 : at + min(length, 6 + 3 * count) : 3]
    samplings = [(max(each >> 4, 1), max(each & 15, 1)) for each in packed]
    return _Frame(marker, window.be16(at + 3), window.be16(at + 1), tuple(samplings) or ((1, 1),))


# ---- cost


def _cost(window: Window, frame: _Frame, segments: list[tuple[int, int, int]]) -> tuple[int, int]:
    """(passes, bytes) of decoding. A file that is not progressive, and whose first scan has all
    components, counts as one scan, after which decoders stop."""
    _, start, _ = segments[-1]
    interleaved = start < len(window) and window.u8(start) >= len(frame.samplings)
    several = frame.marker in _PROGRESSIVE or not interleaved
    scans, pieces = 1, len(segments)
    memory = frame.pixels * _BYTES_PER_PIXEL
    if several:
        found = list(_later_markers(window, start))
        scans, pieces = scans + found.count(_SCAN), pieces + len(found)
        memory += frame.samples * _BYTES_PER_SAMPLE
    factor = 1
    if frame.marker in _ARITHMETIC:
        factor = _ARITHMETIC_PASSES
    elif interleaved:  # Each block takes at least a bit.
        window.check_room(frame.samples, (len(window) - start) * 8 * 64)
    tables = sum(length for marker, _, length in segments if marker == _TABLES)
    passes = factor * (scans * frame.pixels + _BYTE_PASSES * (len(window) - start))
    return passes + pieces * PIECE_PASSES + tables * _TABLE_BYTE_PASSES, memory


def _later_markers(window: Window, at: int) -> Iterator[int]:
    """The markers of all segments after the first scan's header, whose content is at ``at``, up to
    the picture's end. Coded data are searched in large blocks, so that their content does not
    change the time it takes."""
    at, markers = at - 2 + max(window.be16(at - 2), 2), 0
    while at + 1 < len(window):
        block = np.frombuffer(window.data[at : at + _BLOCK_BYTES + 1], dtype=np.uint8)
        places = at + np.flatnonzero((block[:-1] == 0xFF) & _ENDS[block[1:]])
        at, index = at + len(block) - 1, 0
        while index < len(places):
            place = int(places[index])
            marker = window.u8(place + 1)
            if marker == _END or place + 4 > len(window):
                return
            yield marker
            markers += 1
            window.count(markers)
            after = place + 2 + max(window.be16(place + 2), 2)
            at, index = max(at, after), int(np.searchsorted(places, after))
