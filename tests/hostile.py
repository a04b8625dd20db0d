"""Small files that are much work to decode."""

from __future__ import annotations

import functools
import io
import struct
import zlib

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def many_scans(count: int, size: tuple[int, int] = (4000, 3000), grey: int = 9) -> bytes:
    """A progressive JPEG of one colour, with ``count`` scans more than it needs: the last one
    again, of a few bytes, in which a decoder looks at every coefficient."""
    data = _progressive(size, grey)
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[scan:end] * count + data[end:]


@functools.cache
def _progressive(size: tuple[int, int], grey: int) -> bytes:
    return save(Image.new("RGB", size, (grey,) * 3), "JPEG", progressive=True)


def one_colour_webp(width: int, height: int, red: int = 0) -> bytes:
    """A lossless WebP of about 30 bytes, whatever its size: each of its codes has one symbol, so
    that a pixel takes no bit."""
    bits, at = 0, 0

    def put(value: int, length: int) -> None:
        nonlocal bits, at
        bits |= value << at
        at += length

    for value, length in ((0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 1), (0, 3), (0, 3)):
        put(value, length)
    for symbol in (0, red, 0, 0, 0):  # Green, red, blue, alpha, distance.
        put(0b001, 2)  # Simple, one symbol.
        put(1, 1)
        put(symbol, 8)
    payload = bits.to_bytes(-(-at // 8), "little")
    chunk = b"WEBPVP8L" + struct.pack("<I", len(payload)) + payload + bytes(len(payload) & 1)
    return b"RIFF" + struct.pack("<I", len(chunk)) + chunk


def png(width: int, height: int, *chunks: bytes, data: bytes, depth: int = 8) -> bytes:
    """A grey PNG; each of ``chunks`` is a type and its content, and stands before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = (b"IHDR" + header, *chunks, b"IDAT" + data, b"IEND")
    framed = (
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )
    return PNG + b"".join(framed)


def run_length_bmp(width: int, height: int) -> bytes:
    """A BMP of lines that end after a pixel: decoders fill the rest."""
    pixels = b"\x01\x01\x00\x00" * height + b"\x00\x01"
    palette = bytes(part for shade in range(256) for part in (shade, 0, 255 - shade, 0))
    start = 14 + 40 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + palette + pixels
