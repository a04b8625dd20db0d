"""Orientation from EXIF and XMP metadata, read exactly as Pillow's ``exif_transpose`` reads it.

The gateway sizes a picture by this orientation, and the encoder turns it accordingly. The first
Orientation entry of IFD 0 counts; an entry whose data lie outside of the block ends the reading;
XMP counts only if EXIF has no Orientation; any value but the numbers 2 to 8 means upright. Damaged
metadata mean upright too, and never fail a picture.

Pillow's own reader is not used: it reads every entry, of which a block may have 65,535, in over a
second, and before version 13 it did not bound their data by the block's size.
"""

from __future__ import annotations

import re
import struct

ORIENTATION = 0x0112

_PREFIX = b"Exif\x00\x00"
_BYTE_ORDERS = {
    b"MM\x00\x2a": ">",
    b"II\x2a\x00": "<",
    b"MM\x2a\x00": ">",  # Pillow accepts these three invalid byte orders.
    b"II\x00\x2a": "<",
    b"MM\x00\x2b": ">",
}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 11: "f", 12: "d", 13: "L", 16: "Q"}
_FRACTIONS = {5: "LL", 10: "ll"}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation(exif: bytes | None, xmp: bytes | None = None) -> int:
    """The orientation, 1 to 8, of a picture with these metadata blocks."""
    value = _from_exif(exif) if exif else None
    if value is None and xmp and (match := _XMP.search(xmp)):
        value = int(match[1])
    return value if value is not None and 2 <= value <= 8 else 1


def _from_exif(block: bytes) -> int | None:
    """The Orientation entry's value; 0 if it is not a whole number; None without an entry."""
    for _ in range(2):
        block = block.removeprefix(_PREFIX)
    order = _BYTE_ORDERS.get(block[:4])
    if order is None or len(block) < 8:
        return None
    (start,) = struct.unpack_from(order + "L", block, 4)
    entry = _find(block, order, start)
    return None if entry is None else _value(order, *entry)


def _find(block: bytes, order: str, start: int) -> tuple[int, bytes] | None:
    """(type, data) of the first usable Orientation entry of the directory at ``start``."""
    if start + 2 > len(block):
        return None
    (count,) = struct.unpack_from(order + "H", block, start)
    outside = 0
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if at + 12 > len(block):
            return None
        tag, kind, length = struct.unpack_from(order + "HHL", block, at)
        size = length * _SIZES.get(kind, 0)
        if size == 0:
            continue
        offset = at + 8
        if size > 4:
            outside += size
            if outside > len(block):
                continue
            (offset,) = struct.unpack_from(order + "L", block, at + 8)
            if offset + size > len(block):
                return None
        if tag == ORIENTATION:
            return kind, block[offset : offset + size]
    return None


def _value(order: str, kind: int, data: bytes) -> int:
    """The first number in ``data``; 0 if it is not a whole number."""
    if kind in _NUMBERS:
        (number,) = struct.unpack_from(order + _NUMBERS[kind], data)
    elif kind in _FRACTIONS:
        above, below = struct.unpack_from(order + _FRACTIONS[kind], data)
        number = above / below if below else 0
    else:
        return 0
    return int(number) if number in range(1, 9) else 0
