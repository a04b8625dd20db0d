"""Compact JSON, and server-sent events with JSON data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import to_json

from opticnerve.errors import OpticNerveError

DONE = b"data: [DONE]\n\n"

_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(body: Mapping[str, Any]) -> bytes:
    """One event. Its JSON holds no raw line break, so one ``data:`` line is enough."""
    return b"data: " + dumps(body) + b"\n\n"


def named_event(body: Mapping[str, Any]) -> bytes:
    """One event, with its JSON's ``type`` as its name."""
    return b"event: " + str(body["type"]).encode() + b"\n" + event(body)


def dumps(body: Any) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, becomes ``?``.

    Unicode's other line breaks are escaped: SSE has only CR and LF, but clients that split text
    into lines by Unicode's rules would cut an event there.
    """
    text = _encode(body)
    return (text if text.isascii() else text.translate(_BREAKS)).encode("utf-8", "replace")


def with_encoded(body: Mapping[str, Any], encoded: Mapping[str, bytes]) -> bytes:
    """``body``, which must not be empty, as JSON with more fields, whose values are encoded
    JSON."""
    more = (b',"' + name.encode() + b'":' + value for name, value in encoded.items())
    return b"".join((dumps(body)[:-1], *more, b"}"))


def add_json(body: bytes, name: str, value: bytes) -> bytes:
    """Adds a field to the object ``body``, which must not be empty; all are encoded JSON."""
    return body[:-1] + b',"' + name.encode() + b'":' + value + b"}"


def ids_json(ids: Iterable[int]) -> bytes:
    """A list of token ids, perhaps a whole context, as JSON."""
    return to_json(list(ids))


def failure(error: OpticNerveError) -> bytes:
    """The bytes that end a failed stream: the error's body as an event, and DONE."""
    return event(error.to_openai()) + DONE
