"""Reads the body of a media server's answer: bounded while it arrives, and decoded."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable, Iterator

import httpcore2

from gateway.edge.limits import FREE_MEDIA_CHUNKS, LEAST_CHUNK_BYTES, MAX_GZIP_MEMBERS
from gateway.media.dataurl import too_large
from gateway.media.transport import UnreadableAnswer

CODINGS = ("gzip", "deflate")
IDENTITY = frozenset({"", "identity"})
PIECE_BYTES = 2**18
_CODING_NAME = re.compile(r"[a-z0-9_, -]{0,40}")


async def read_body(
    response: httpcore2.Response, max_bytes: int, param: str | None, hold: Callable[[int], None]
) -> bytes:
    """The decoded body of a response. ``max_bytes`` bounds both its encoded and its decoded bytes;
    ``hold`` is called with the number of each piece's decoded bytes.

    Raises PayloadTooLarge, UnreadableAnswer, and the errors of ``hold``.
    """
    coding = coding_of(header(response, b"content-encoding"))
    if coding not in ("", *CODINGS):
        read = " and ".join(CODINGS)
        raise UnreadableAnswer(f"got bytes in the encoding {coding}, but only {read} are supported")
    announced = header(response, b"content-length")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large(max_bytes, param)
    decoder = ContentDecoder(coding)
    body, received, chunks = bytearray(), 0, 0
    try:
        async for chunk in response.aiter_stream():
            received += len(chunk)
            chunks += 1
            if received > max_bytes:
                raise too_large(max_bytes, param)
            if chunks > FREE_MEDIA_CHUNKS + received // LEAST_CHUNK_BYTES:
                raise UnreadableAnswer("was answered in far too many chunks of a few bytes")
            for piece in decoder.pieces(chunk):
                body += piece
                if len(body) > max_bytes:
                    raise too_large(max_bytes, param)
                hold(len(piece))
                await asyncio.sleep(0)  # Other tasks run between the pieces of a chunk.
        decoder.check_end()
    except zlib.error as error:
        raise UnreadableAnswer(
            f"got bytes that are no whole {coding}, though their Content-Encoding says so"
        ) from error
    return bytes(body)


def header(response: httpcore2.Response, name: bytes) -> str:
    """All values of a header, joined; "" where there is none."""
    values = b", ".join(value for key, value in response.headers if key.lower() == name)
    try:
        return values.decode()
    except UnicodeDecodeError:
        return values.decode("latin-1")


def coding_of(header: str) -> str:
    """A Content-Encoding in its normal form, without ``identity``; "" for bytes without one."""
    names = [name.strip().lower() for name in header.split(",")]
    coding = ", ".join({"x-gzip": "gzip"}.get(name, name) for name in names if name not in IDENTITY)
    return coding if _CODING_NAME.fullmatch(coding) else "unknown"


class ContentDecoder:
    """Decodes gzip, of one or several members, and deflate, with or without zlib's frame. Yields
    pieces, so that a decompression bomb takes no more memory than one piece."""

    def __init__(self, coding: str) -> None:
        """``coding``: one of CODINGS, or "" for bytes without an encoding."""
        self._coding = coding
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # Detects gzip and zlib frames.
        self._head = b""
        self._members = 1

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """The decoded bytes of ``chunk``, in pieces of at most PIECE_BYTES if it is encoded. Raises
        zlib.error."""
        if not self._coding:
            yield chunk
            return
        if len(self._head) < 2:  # Two bytes tell whether deflate has a zlib frame.
            chunk = self._head = self._head + chunk
            if len(chunk) < 2:
                return
            if self._coding == "deflate" and not _is_framed(chunk):
                self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
            self._head = chunk[:2]
        piece = b""
        while chunk or len(piece) == PIECE_BYTES:  # After a full piece, zlib may have more output.
            if self._zlib.eof:
                chunk = chunk.lstrip(b"\0")  # Padding.
                if not chunk:
                    return
                self._members += 1
                if self._members > MAX_GZIP_MEMBERS:
                    raise zlib.error("too many members")
                self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)  # The next member.
            piece = self._zlib.decompress(chunk, PIECE_BYTES)
            yield piece
            chunk = self._zlib.unconsumed_tail or self._zlib.unused_data

    def check_end(self) -> None:
        """Raises zlib.error if encoded bytes are missing. An empty body is complete."""
        if self._head and not self._zlib.eof:
            raise zlib.error("cut short")


def _is_framed(chunk: bytes) -> bool:
    """Whether two bytes begin a zlib frame: its method, and a valid checksum. The checksum alone
    would match one in 31 raw streams by chance. No raw stream begins with the method's bits: that
    would be a stored block with nonzero padding."""
    return chunk[0] & 15 == 8 and int.from_bytes(chunk[:2]) % 31 == 0
