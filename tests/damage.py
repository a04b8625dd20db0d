"""Bytes that are no embedding, as they may stand in Redis or in a tier's directory."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from hypothesis import strategies as st

from opticnerve.embeddings import codec


def file_of(fields: Any, data: bytes = b"") -> bytes:
    """A safetensors file with that header, right or wrong."""
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def described(shape: list[int], num_bytes: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}


UNREADABLE = {
    "garbage": b"garbage",
    "nothing": b"",
    "no rows beyond torch": file_of({"rows": described([2**64, 0])}),  # 95 bytes or so.
    "no rows beyond reason": file_of({"rows": described([2**62, 0])}),
    "strides beyond torch": file_of({"rows": described([1, 2**40, 2**40, 0])}),
    "a name that is no text": file_of({"rows\ud800": described([1], 4)}, bytes(4)),
}
"""What no store may take for an embedding."""

UNFIT = {
    "a number": file_of({"rows": described([], 4)}, bytes(4)),
    "no rows": codec.to_bytes({"rows": torch.ones(0, 8)}, {}),
    "three dimensions": codec.to_bytes({"rows": torch.ones(2, 2, 8)}, {}),
    "another name": codec.to_bytes({"other": torch.ones(4, 8)}, {}),
    "a level that is no number": codec.to_bytes(
        {"rows": torch.ones(4, 8), "deepstack.x": torch.ones(4, 8)}, {}
    ),
    "a level beyond the model": codec.to_bytes(
        {"rows": torch.ones(4, 8), "deepstack.99999999999": torch.ones(4, 8)}, {}
    ),
    "another width": codec.to_bytes({"rows": torch.ones(4, 9)}, {}),
    "fewer rows": codec.to_bytes({"rows": torch.ones(3, 8)}, {}),
    "more rows": codec.to_bytes({"rows": torch.ones(5, 8)}, {}),
    "no numbers": codec.to_bytes({"rows": torch.full((4, 8), float("nan"))}, {}),
}
"""What is well formed, and is nothing for a model that takes 4 rows of 8 columns."""


def values() -> st.SearchStrategy[bytes]:
    """Any bytes: random ones, headers with anything in them, valid files with a few changes."""
    return st.one_of(st.binary(max_size=200), _headers(), _changed())


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    extents = st.one_of(st.integers(0, 4), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**99]))
    shapes = st.one_of(st.lists(extents, max_size=9), st.none(), st.text(max_size=2))
    names = st.one_of(st.sampled_from(["rows", "deepstack.0", "deepstack.x"]), st.text(max_size=5))
    fields: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(names, max_size=3, unique=True)):
        shape = draw(shapes)
        size = 4
        for extent in shape if isinstance(shape, list) else ():
            size *= extent
        fields[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        fields["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
    return file_of(fields, bytes(end if end < 2**12 else 8))


@st.composite
def _changed(draw: st.DrawFn) -> bytes:
    changed = bytearray(codec.to_bytes({"rows": torch.arange(32.0).reshape(4, 8)}, {"a": "b"}))
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.one_of(st.none(), st.integers(0, len(changed))))])
