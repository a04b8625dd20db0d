"""WebP: a RIFF container of chunks, padded to even sizes. Only the extended form (VP8X) has
metadata and animations, and flags for them."""

from __future__ import annotations

from collections.abc import Iterator

from opticnerve.media.formats import exif
from opticnerve.media.formats.byte_reader import PIECE_PASSES, Window
from opticnerve.media.plan import Structure

_IMAGES = frozenset({b"VP8 ", b"VP8L"})
_FRAME_HEADER = 16  # Bytes of a frame before its data.
_ANIMATED, _HAS_XMP, _HAS_EXIF = 0x02, 0x04, 0x08
_PASSES = 8
_MAX_PIXELS_PER_BYTE = 2048  # Lossy: the modes of 256 pixels take over a bit.
_BYTES_PER_PIXEL = 22  # The decoder has three canvases.


def matches(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def read_structure(data: bytes | memoryview) -> Structure:
    window = Window(data, "WebP")
    end = 8 + window.le32(4)
    if end > len(window):
        raise window.truncated()
    kind = window.take(12, 4)
    if kind == b"VP8 ":
        if window.take(23, 3) != b"\x9d\x01\x2a":
            raise window.damaged("its frame header is wrong")
        width, height = window.le16(26) & 0x3FFF, window.le16(28) & 0x3FFF
        window.check_room(width * height, len(window) * _MAX_PIXELS_PER_BYTE)
        return _structure(width, height)
    if kind == b"VP8L":
        if window.u8(20) != 0x2F:
            raise window.damaged("its frame header is wrong")
        bits = window.le32(21)
        return _structure((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        return _extended(window, end)
    raise window.damaged("it has no image data")


def _structure(
    width: int, height: int, orientation: int = 1, frames: int = 1, pieces: int = 0
) -> Structure:
    """No check of room: a lossless picture of one colour takes 34 bytes at any size."""
    pixels = width * height
    return Structure(
        "webp",
        width,
        height,
        orientation,
        frames,
        decode_cost=pixels * _PASSES + pieces * PIECE_PASSES,
        memory=pixels * _BYTES_PER_PIXEL,
    )


def _extended(window: Window, end: int) -> Structure:
    flags = window.u8(20)
    width, height = window.le24(24) + 1, window.le24(27) + 1
    blocks: dict[bytes, bytes] = {}
    frames, pieces, is_still = 0, 0, False
    for kind, at, size in _chunks(window, end):
        pieces += 1
        if kind == b"ANMF":
            frames += size > _FRAME_HEADER
        elif kind in _IMAGES:
            is_still = True
        elif kind in (b"EXIF", b"XMP ") and kind not in blocks:  # The first counts.
            blocks[kind] = window.take(at, size)
    orientation = exif.orientation(
        blocks.get(b"EXIF") if flags & _HAS_EXIF else None,
        blocks.get(b"XMP ") if flags & _HAS_XMP else None,
    )
    frames = frames if flags & _ANIMATED else 0
    if not frames and not is_still:
        raise window.damaged("it has no image data")
    return _structure(width, height, orientation, max(frames, 1), pieces)


def strip(data: bytes | memoryview) -> bytes | memoryview:
    """The file without inconsistent traces of an animation, at which decoders fail: a flag without
    frames, frames without the flag, frames without data."""
    window = Window(data, "WebP")
    if window.take(12, 4) != b"VP8X":
        return data
    chunks = list(_chunks(window, 8 + window.le32(4)))
    is_still = any(kind in _IMAGES for kind, _, _ in chunks)
    flags = window.u8(20) & (~_ANIMATED if is_still else 0xFF)
    used = [chunk for chunk in chunks if not _is_stray(chunk[0], chunk[2], is_still)]
    if flags == window.u8(20) and len(used) == len(chunks):
        return data
    parts = [b"WEBP"]
    for kind, at, size in used:
        content = window.take(at, size)
        if kind == b"VP8X":
            content = bytes([flags]) + content[1:]
        parts += [kind, size.to_bytes(4, "little"), content, bytes(size & 1)]
    body = b"".join(parts)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _is_stray(kind: bytes, size: int, is_still: bool) -> bool:
    """Whether a chunk belongs to an animation that the file does not have."""
    if is_still:
        return kind in (b"ANIM", b"ANMF")
    return kind == b"ANMF" and size <= _FRAME_HEADER


def _chunks(window: Window, end: int) -> Iterator[tuple[bytes, int, int]]:
    at, pieces = 12, 0
    while at + 8 <= end:
        kind, size = window.take(at, 4), window.le32(at + 4)
        if at + 8 + size > end:
            raise window.truncated()
        yield kind, at + 8, size
        pieces += 1
        window.count(pieces)
        at += 8 + size + (size & 1)
