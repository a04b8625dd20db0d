"""Random JSON schemas, of the keywords that structured output enforces. Most values are bounded: a
model at a high temperature ends no number by itself."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("shape", "color", "size", "count", "at", "note", "left", "right", "is_round", "größe")
PATTERNS = ("^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{1,3}$", "^(red|green|blue)( large)?$", "^.{0,5}$")
FORMATS = ("date", "uuid", "ipv4")


def random_schema(seed: int) -> dict[str, Any]:
    """An object's schema; the same for the same seed."""
    source = random.Random(seed)
    schema = _object(source, 3)
    if source.random() < 0.2:
        leaf = _value(source, 1)
        tree = {
            "type": "object",
            "properties": {
                "value": leaf,
                "parts": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        schema["properties"]["tree"] = {"$ref": "#/$defs/tree"}
        schema["$defs"] = {"tree": tree}
    return schema


def _object(source: random.Random, depth: int) -> dict[str, Any]:
    names = source.sample(WORDS, source.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(source, depth - 1) for name in names},
        "required": [name for name in names if source.random() < 0.7],
        "additionalProperties": False,
    }
    if source.random() < 0.15:
        schema["additionalProperties"] = _scalar(source)
    return schema


def _value(source: random.Random, depth: int) -> dict[str, Any]:
    kind = source.random()
    if depth > 0 and kind < 0.2:
        return _object(source, depth)
    if depth > 0 and kind < 0.4:
        least = source.randint(0, 2)
        most = least + source.randint(0, 3)
        items = _value(source, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}
    if depth > 0 and kind < 0.5:
        return {"anyOf": [_value(source, depth - 1), {"type": "null"}]}
    return _scalar(source)


def _scalar(source: random.Random) -> dict[str, Any]:
    low = source.randint(-50, 50)
    return source.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + source.randint(0, 200)},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 9, "multipleOf": 0.5},
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
            {"type": "boolean"},
            {"enum": source.sample([*WORDS, 1, 2.5, None, True], 3)},
            {"const": source.choice(WORDS)},
            {"type": "string", "maxLength": source.randint(0, 12)},
            {"type": "string", "pattern": source.choice(PATTERNS)},
            {"type": "string", "format": source.choice(FORMATS)},
            {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 99},
        ]
    )
