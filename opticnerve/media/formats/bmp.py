"""BMP: a fixed header. A negative height means that rows go from top to bottom."""

from __future__ import annotations

from opticnerve.media.formats.byte_reader import Window
from opticnerve.media.plan import Structure

MAGIC = b"BM"

_OS2_HEADER = 12
_HEADERS = frozenset({40, 52, 56, 64, 108, 124})
_RUN_LENGTH = (1, 2)  # Compressions that Pillow decodes pixel by pixel, in Python.
_RUN_LENGTH_PASSES = 64
_BYTES_PER_PIXEL = 10


def read_structure(data: bytes | memoryview) -> Structure:
    window = Window(data, "BMP")
    header = window.le32(14)
    window.take(14, min(header, 124))
    if header == _OS2_HEADER:
        return _structure(window, window.le16(18), window.le16(20), window.le16(24), 0)
    if header not in _HEADERS:
        raise window.damaged("its header is of an unknown kind")
    height = window.le32(22)
    if height >> 24 == 0xFF:
        height = 2**32 - height
    return _structure(window, window.le32(18), height, window.le16(28), window.le32(30))


def _structure(window: Window, width: int, height: int, bits: int, compression: int) -> Structure:
    pixels = width * height
    if compression in _RUN_LENGTH:
        passes = pixels * _RUN_LENGTH_PASSES
    else:
        window.check_room(pixels, len(window) * 8 // max(bits, 1))
        passes = pixels
    return Structure("bmp", width, height, decode_cost=passes, memory=pixels * _BYTES_PER_PIXEL)
