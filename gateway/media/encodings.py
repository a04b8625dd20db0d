"""Content encodings of fetched bodies, undone piece by piece."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

INFLATED = ("gzip", "deflate")  # Encodings that are undone.
PLAIN = frozenset({"", "identity"})
PIECE_BYTES = 2**18
MAX_MEMBERS = 1000  # Of a gzip body; each costs time, also where it is empty.
_NAME = re.compile(r"[a-z0-9_, -]{0,40}")


class Decoder:
    """Undoes gzip, of one member or several, and deflate, with zlib's frame or without. Piece by
    piece: a few bytes that stand for gigabytes are never more than one piece in memory."""

    def __init__(self, coding: str) -> None:
        """``coding``: one of INFLATED, or "" for bytes that are sent as they are."""
        self._coding = coding
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # Either frame, told by its head.
        self._head = b""
        self._members = 1

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What ``chunk`` adds, PIECE_BYTES at most at a time where it is decoded. Raises
        zlib.error."""
        if not self._coding:
            yield chunk
            return
        if len(self._head) < 2:  # Which tell whether deflate has a frame.
            chunk = self._head = self._head + chunk
            if len(chunk) < 2:
                return
            if self._coding == "deflate" and not _is_framed(chunk):
                self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
            self._head = chunk[:2]
        piece = b""
        while chunk or len(piece) == PIECE_BYTES:  # Of a full piece, zlib may hold some more.
            if self._zlib.eof:
                chunk = chunk.lstrip(b"\0")  # Padding.
                if not chunk:
                    return
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise zlib.error("too many members")
                self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)  # The next member.
            piece = self._zlib.decompress(chunk, PIECE_BYTES)
            yield piece
            chunk = self._zlib.unconsumed_tail or self._zlib.unused_data

    def check_end(self) -> None:
        """Raises zlib.error where more was to come. Nothing at all is whole."""
        if self._head and not self._zlib.eof:
            raise zlib.error("cut short")


def _is_framed(chunk: bytes) -> bool:
    """Whether the first two bytes are zlib's frame: its method, and their sum. One of 31 streams
    without a frame has the sum by chance; none begins with the method, which would be a stored
    block with a padding that is not zero."""
    return chunk[0] & 15 == 8 and int.from_bytes(chunk[:2]) % 31 == 0


def name_of(header: str) -> str:
    """The Content-Encoding without what says nothing: "" for bytes that are sent as they are."""
    names = [name.strip().lower() for name in header.split(",")]
    coding = ", ".join({"x-gzip": "gzip"}.get(name, name) for name in names if name not in PLAIN)
    return coding if _NAME.fullmatch(coding) else "unknown"
