"""BMP: a fixed header. A negative height means rows from the top."""

from __future__ import annotations

from opticnerve.media.plan import Structure
from opticnerve.media.window import Window

MAGIC = b"BM"

_OS2_HEADER = 12
_HEADERS = frozenset({40, 52, 56, 64, 108, 124})


def parse(data: bytes | memoryview) -> Structure:
    window = Window(data, "BMP")
    header = window.le32(14)
    window.take(14, min(header, 124))
    if header == _OS2_HEADER:
        return Structure("bmp", window.le16(18), window.le16(20))
    if header not in _HEADERS:
        raise window.damaged("its header is of an unknown kind")
    height = window.le32(22)
    if height >> 24 == 0xFF:
        height = 2**32 - height
    return Structure("bmp", window.le32(18), height)
