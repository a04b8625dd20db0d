"""GIF: a logical screen, then extensions and images, both made of blocks of up to 255 bytes."""

from __future__ import annotations

from opticnerve.media.formats.byte_reader import PIECE_PASSES, Window
from opticnerve.media.plan import Structure

MAGIC = (b"GIF87a", b"GIF89a")

_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_MAX_PIXELS_PER_BYTE = 2731  # 4096 pixels from a code of 12 bits.
_BYTES_PER_PIXEL = 13
_PASSES = 2


def read_structure(data: bytes | memoryview) -> Structure:
    """``frames`` is 2 for every animation, however long."""
    window = Window(data, "GIF")
    width, height, flags = window.le16(6), window.le16(8), window.u8(10)
    window.take(0, 13)
    at = 13 + _palette_bytes(flags)
    frames = pieces = drawn = 0
    while at < len(window) and frames < 2:
        kind = window.u8(at)
        if kind == _TRAILER:
            break
        if kind == _EXTENSION:
            at, pieces = _skip_blocks(window, at + 2, pieces, lenient=frames > 0)
        elif kind == _IMAGE:
            if frames == 0:  # The first image may exceed the screen, and enlarges it.
                drawn = window.le16(at + 5) * window.le16(at + 7)
                width = max(width, window.le16(at + 1) + window.le16(at + 5))
                height = max(height, window.le16(at + 3) + window.le16(at + 7))
            elif at + 10 > len(window):
                break
            start = at + 11 + _palette_bytes(window.u8(at + 9))
            frames += frames == 0 or _has_pixels(window, at, start)
            at, pieces = _skip_blocks(window, start, pieces, lenient=True)
        else:
            at += 1  # Unknown bytes between blocks are skipped.
            pieces += 1
        window.count(pieces)
    if frames == 0:
        raise window.damaged("it holds no image")
    window.check_room(drawn, len(window) * _MAX_PIXELS_PER_BYTE)
    pixels = width * height
    passes, memory = pixels * _PASSES + pieces * PIECE_PASSES, pixels * _BYTES_PER_PIXEL
    return Structure("gif", width, height, frames=frames, decode_cost=passes, memory=memory)


def _has_pixels(window: Window, at: int, start: int) -> bool:
    """Whether the image at ``at``, with data from ``start``, is a further frame, not an empty
    one."""
    has_size = window.le16(at + 5) > 0 and window.le16(at + 7) > 0
    return has_size and start < len(window) and window.u8(start) > 0


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_blocks(window: Window, at: int, pieces: int, lenient: bool) -> tuple[int, int]:
    """(offset after a run of blocks, number of pieces so far). An empty block ends the run; if
    ``lenient``, so does the end of the file, since the decoder checks that pixels are complete."""
    while True:
        if at >= len(window):
            if lenient:
                return at, pieces
            raise window.truncated()
        size = window.u8(at)
        at += 1 + size
        pieces += 1
        if size == 0:
            return at, pieces
        window.count(pieces)
