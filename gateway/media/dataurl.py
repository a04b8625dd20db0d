"""``data:`` URLs (RFC 2397), decoded piece by piece.

A URL can be as long as a request's body. Whatever it contains (percent signs, white space,
escapes), decoding takes memory for the decoded bytes and one piece, and time proportional to the
URL's length, in steps short enough not to keep other threads waiting.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator

from gateway.edge.limits import MAX_DATA_URL_HEAD
from opticnerve.errors import InvalidRequest, PayloadTooLarge

PIECE_CHARACTERS = 2**18
_SPACE = b" \t\r\n\f"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def read_data_url(url: str, max_bytes: int, param: str | None = None) -> bytes:
    """The bytes of a ``data:`` URL: base64 (padding optional, white space ignored, the URL-safe
    alphabet too) or percent-encoded. The media type is ignored: the format is read from the bytes.
    Raises InvalidRequest, or PayloadTooLarge before decoding much more than ``max_bytes``.
    """
    comma = url.find(",", 5, 5 + MAX_DATA_URL_HEAD)
    if comma < 0:
        raise InvalidRequest(
            "a data: URL needs a comma before its data, as in data:image/png;base64,…", param=param
        )
    is_base64 = "base64" in url[5:comma].lower().replace(" ", "").split(";")[1:]
    pieces = _unescaped(url, comma + 1)
    data = bytearray()
    try:
        for piece in _base64(pieces) if is_base64 else pieces:
            data += piece
            if len(data) > max_bytes:
                raise too_large(max_bytes, param)
    except (binascii.Error, UnicodeEncodeError) as error:
        kind = "base64" if is_base64 else "percent-encoding"
        raise InvalidRequest(
            f"the {kind} of a data: URL does not decode; encode the file's bytes again and send "
            "all of them",
            param=param,
            code=f"invalid_{kind.replace('-', '_')}",
        ) from error
    return bytes(data)


def _unescaped(url: str, start: int) -> Iterator[bytes]:
    """``url`` from ``start`` on, percent-decoded. Raises binascii.Error for a percent sign without
    two hexadecimal digits."""
    while start < len(url):
        piece = url[start : start + PIECE_CHARACTERS]
        if start + len(piece) < len(url):  # Do not split an escape.
            cut = piece.find("%", len(piece) - 2)
            piece = piece if cut < 0 else piece[:cut]
        start += len(piece)
        raw = piece.encode()
        yield _without_percent(raw) if b"%" in raw else raw


def _without_percent(raw: bytes) -> bytes:
    """Percent-decodes by way of quoted-printable, which has the same escapes with another sign and
    a decoder in C. The standard library's percent-decoder makes an object of 37 bytes or more for
    each escape."""
    quoted = raw.replace(b"=", b"%3D").replace(b"%", b"=")
    decoded = binascii.a2b_qp(quoted)
    breaks = b"=\n" in quoted or b"=\r" in quoted  # These are soft line breaks in quoted-printable.
    if breaks or len(decoded) != len(quoted) - 2 * quoted.count(b"="):
        raise binascii.Error("a percent sign without two digits")
    return decoded


def _base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Decodes pieces of base64. Raises binascii.Error."""
    rest, padded = b"", False  # ``rest``: up to three characters of an incomplete group.
    for piece in pieces:
        rest += piece.translate(_URL_SAFE, delete=_SPACE)
        text = rest.rstrip(b"=")
        if padded and text:
            raise binascii.Error("data after the padding")
        padded = padded or len(text) < len(rest)
        whole = len(text) // 4 * 4
        rest = text[whole:]
        if padded:
            yield _group(text)
            rest = b""
        elif whole:
            yield binascii.a2b_base64(text[:whole], strict_mode=True)
    yield _group(rest)


def _group(text: bytes) -> bytes:
    return binascii.a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)


def too_large(max_bytes: int, param: str | None) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the item is larger than the {max_bytes} bytes that are accepted; send a smaller one",
        param=param,
    )
