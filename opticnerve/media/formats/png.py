"""PNG: chunks of (length, type, data, checksum). Metadata may stand before or after the data."""

from __future__ import annotations

import re
import zlib

from opticnerve.media.formats import exif
from opticnerve.media.formats.byte_reader import PIECE_PASSES, Window
from opticnerve.media.plan import Structure

MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 2**20  # Most bytes of one metadata text after decompression.

_PICTURE = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT"})  # Chunks that pixels depend on.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # By colour type.
_MAX_RATIO = 1032  # Deflate's largest compression ratio.
_BYTE_PASSES = 2  # For each byte of filtered pixels, which deflate has compressed.
_INTERLACED_PASSES = 2
_BYTES_PER_PIXEL = 12
_BYTES_PER_16_BIT_PIXEL = 28  # Upper and lower bytes are decoded separately.
_CHUNK_TYPE = re.compile(rb"[A-Za-z0-9_]{4}")
_RAW_PROFILE = b"Raw profile type exif"
_XMP = b"XML:com.adobe.xmp"


def read_structure(data: bytes | memoryview) -> Structure:
    window = Window(data, "PNG")
    width, height = _header(window)
    metadata = _Metadata()
    chunks = _chunks(window)
    for kind, at, size in chunks:
        metadata.add(kind, window, at, size)
    if all(kind != b"IDAT" for kind, _, _ in chunks):
        raise window.damaged("it has no image data")
    frames = _frames(window, chunks)
    passes, memory = _cost(window, width, height, chunks)
    orientation = metadata.orientation()
    return Structure("png", width, height, orientation, frames, decode_cost=passes, memory=memory)


def strip(data: bytes | memoryview) -> bytes | memoryview:
    """The file with only the chunks that pixels depend on: decoders would fail at an animation's
    damaged chunks, and decompress metadata."""
    window = Window(data, "PNG")
    return window.without(
        (at - 8, at + size + 4) for kind, at, size in _chunks(window) if kind not in _PICTURE
    )


def _cost(
    window: Window, width: int, height: int, chunks: list[tuple[bytes, int, int]]
) -> tuple[int, int]:
    """(passes, bytes) of decoding, by the bytes to decompress and unfilter."""
    depth, colour, interlaced = window.u8(24), window.u8(25), window.u8(28) != 0
    filtered = height * (1 + -(-width * depth * _CHANNELS.get(colour, 4) // 8))
    data = sum(min(size, len(window) - at) for kind, at, size in chunks if kind == b"IDAT")
    window.check_room(filtered, data * _MAX_RATIO)
    passes = max(width * height, filtered * _BYTE_PASSES)
    passes *= _INTERLACED_PASSES if interlaced else 1
    each = _BYTES_PER_16_BIT_PIXEL if depth == 16 else _BYTES_PER_PIXEL
    return passes + data + len(chunks) * PIECE_PASSES, width * height * each


def _frames(window: Window, chunks: list[tuple[bytes, int, int]]) -> int:
    """The number of frames. An animation has one valid acTL before the data, and at least two
    frames with a control chunk followed by data; readers take anything else for a still picture."""
    declared: list[int] = []
    found, seen_data, control = 0, False, False
    for kind, at, size in chunks:
        if kind == b"acTL" and not seen_data:
            declared.append(window.be32(at) if size == 8 else 0)
        elif kind == b"fcTL":
            control = size == 26
        elif kind == b"IDAT" or (kind == b"fdAT" and seen_data and size > 4):
            found += control
            control = False
            seen_data = seen_data or kind == b"IDAT"
    if len(declared) != 1 or not 0 < declared[0] < 2**31:
        return 1
    return max(min(declared[0], found), 1)


def _header(window: Window) -> tuple[int, int]:
    if window.take(12, 4) != b"IHDR" or window.be32(8) < 13:
        raise window.damaged("it does not begin with its header")
    window.take(8, 25)
    return window.be32(16), window.be32(20)


def _chunks(window: Window) -> list[tuple[bytes, int, int]]:
    """(type, offset of the data, size) of every chunk up to the end."""
    found: list[tuple[bytes, int, int]] = []
    at, seen_data = 8, False
    while at + 8 <= len(window):
        size, kind = window.be32(at), window.take(at + 4, 4)
        if kind == b"IEND":
            break
        if not _CHUNK_TYPE.fullmatch(kind):
            if seen_data:
                break  # The picture is complete.
            raise window.damaged("a chunk has no valid type")
        if at + 8 + size > len(window) and kind != b"IDAT":
            raise window.truncated()  # The decoder finds whether the pixels are complete.
        seen_data = seen_data or kind == b"IDAT"
        found.append((kind, at + 8, size))
        window.count(len(found))
        at += 12 + size
    return found


class _Metadata:
    """A PNG's orientation, from any of the five places in use. A later chunk of one kind replaces
    an earlier one. Only the last text of a keyword is decompressed, however many there are."""

    def __init__(self) -> None:
        self._exif: bytes | None = None
        self._texts: dict[bytes, tuple[bytes, bool]] = {}  # Keyword -> (text, compressed).

    def add(self, kind: bytes, window: Window, at: int, size: int) -> None:
        if kind == b"eXIf":
            self._exif = window.take(at, size)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            head = window.take(at, min(size, 80))
            keyword = head.partition(b"\0")[0]
            if keyword in (_RAW_PROFILE, _XMP):
                self._add_text(kind, keyword, window.take(at, size)[len(keyword) + 1 :])

    def _add_text(self, kind: bytes, keyword: bytes, rest: bytes) -> None:
        if kind == b"tEXt":
            self._texts[keyword] = rest, False
        elif kind == b"zTXt" and rest[:1] == b"\0":
            self._texts[keyword] = rest[1:], True
        elif kind == b"iTXt" and len(rest) >= 2 and rest[2:].count(b"\0") >= 2:
            self._texts[keyword] = rest[2:].split(b"\0", 2)[2], rest[0] != 0

    def orientation(self) -> int:
        block = self._exif
        if block is None:
            block = _unhex(self._text(_RAW_PROFILE))
        return exif.orientation(block, self._text(_XMP))

    def _text(self, keyword: bytes) -> bytes | None:
        text, compressed = self._texts.get(keyword, (None, False))
        return _inflate(text) if text is not None and compressed else text


def _inflate(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT_BYTES)
    except zlib.error:
        return None


def _unhex(text: bytes | None) -> bytes | None:
    """Bytes from ImageMagick's form: an empty line, a name, a size, then hexadecimal digits."""
    if text is None:
        return None
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return None
