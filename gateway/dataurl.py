"""``data:`` URLs (RFC 2397), measured before they are decoded."""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from opticnerve.errors import InvalidRequest, PayloadTooLarge

_SPACE = re.compile(rb"[ \t\r\n\f]+")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def read_data_url(url: str, max_bytes: int, param: str | None = None) -> bytes:
    """The bytes of a ``data:`` URL: base64 (padding optional, white space ignored, the URL-safe
    alphabet too) or percent-encoded. The media type it claims is ignored: bytes speak for
    themselves. Raises InvalidRequest, or PayloadTooLarge before decoding more than ``max_bytes``.
    """
    head, comma, payload = url[5:].partition(",")
    if not comma:
        raise InvalidRequest(
            "a data: URL needs a comma before its data, as in data:image/png;base64,…", param=param
        )
    if "base64" not in head.lower().replace(" ", "").split(";")[1:]:
        return _percent(payload, max_bytes, param)
    if len(payload) > max_bytes * 4 // 3 + 4 and "%" not in payload and not _has_space(payload):
        raise too_large(max_bytes, param)
    return _base64(payload, max_bytes, param)


def _percent(payload: str, max_bytes: int, param: str | None) -> bytes:
    if len(payload) > 3 * max_bytes:  # Every byte takes three characters at most.
        raise too_large(max_bytes, param)
    data = unquote_to_bytes(payload)
    if len(data) > max_bytes:
        raise too_large(max_bytes, param)
    return data


def _base64(payload: str, max_bytes: int, param: str | None) -> bytes:
    try:
        raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        if _has_space(payload) or "%" in payload:
            raw = _SPACE.sub(b"", raw)
        raw = raw.translate(_URL_SAFE).rstrip(b"=")
        if len(raw) * 3 // 4 > max_bytes:
            raise too_large(max_bytes, param)
        return binascii.a2b_base64(raw + b"=" * (-len(raw) % 4), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequest(
            "the base64 of a data: URL does not decode; encode the file's bytes again and send "
            "all of them",
            param=param,
            code="invalid_base64",
        ) from error


def _has_space(payload: str) -> bool:
    return any(char in payload for char in " \n\r\t\f")


def too_large(max_bytes: int, param: str | None) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the item is larger than the {max_bytes} bytes that are accepted; send a smaller one",
        param=param,
    )
