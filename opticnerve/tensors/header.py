"""The header of a safetensors file, and the element types that the format names. No torch.

A file is eight bytes (the header's length, little-endian), the header (JSON: for each tensor its
``dtype``, ``shape`` and ``data_offsets``; under ``__metadata__`` a mapping of strings), then the
tensors' bytes. Offsets count from the end of the header. The safetensors library reads only whole
tensors; we need the offsets to digest weights and to map embeddings.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.errors import CheckpointError

LENGTH = struct.Struct("<Q")
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # The format's own limit.

ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of one element, by safetensors' name of its type."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor in a header. Its bytes are [start, end), counted from the header's end."""

    name: str
    dtype: str  # A key of ELEMENT_BYTES.
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor of a checkpoint lies. ``start`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str  # Safetensors name: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ELEMENT_BYTES[dtype]


def header_end(start: bytes | memoryview, limit: int) -> int:
    """The offset of the first tensor's bytes, given at least a file's first eight bytes. Raises
    ValueError for a header of more than ``limit`` bytes."""
    if len(start) < LENGTH.size:
        raise ValueError("it ends within its header")
    length = int(LENGTH.unpack_from(start)[0])
    if not len(b"{}") <= length <= limit:
        raise ValueError("its header has an absurd length")
    return LENGTH.size + length


def parse_header(text: bytes, data_bytes: int) -> tuple[list[HeaderEntry], Mapping[str, str]]:
    """The tensors of a file, in the order of their bytes, and its metadata.

    ``text`` is the header's JSON, ``data_bytes`` what follows it in the file. Raises ValueError,
    which says what is wrong, unless the tensors fill those bytes without overlap or gap.
    """
    fields = _read_object(text)
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise ValueError("its metadata are not strings")
    entries = [_read_entry(name, value) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end:
            raise ValueError("its tensors overlap or leave a gap")
        end = entry.end
    if end != data_bytes:
        raise ValueError("its size is not what its header says")
    return entries, metadata


def _read_object(text: bytes) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is not JSON with unique names") from error
    if not isinstance(fields, dict):
        raise ValueError("its header is not a JSON object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    loaded = dict(pairs)
    if len(loaded) != len(pairs):
        raise ValueError("a name occurs twice")
    return loaded


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _read_entry(name: str, value: Any) -> HeaderEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header describes a tensor by other fields than the format has")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError("a tensor has an unknown element type")
    if not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        raise ValueError("a tensor has a malformed shape or malformed offsets")
    entry = HeaderEntry(name, dtype, tuple(shape), *offsets)
    if entry.end - entry.start != num_bytes(dtype, entry.shape):
        raise ValueError("a tensor has a different number of bytes than its shape needs")
    return entry


def _is_text(value: Any) -> bool:
    """Whether ``value`` is a string that UTF-8 can write: JSON's escapes can make others."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _are_naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(number) is int and number >= 0 for number in value)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of ``file`` by its key. Raises CheckpointError for a damaged or incomplete
    file."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            base = header_end(stream.read(LENGTH.size), MAX_HEADER_BYTES)
            if base > size:
                raise ValueError("it ends within its header")
            entries, _ = parse_header(stream.read(base - LENGTH.size), size - base)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged or was not downloaded whole: {error}; fetch it again"
        ) from error
    return {
        entry.name: TensorEntry(
            file, entry.dtype, entry.shape, base + entry.start, base + entry.end
        )
        for entry in entries
    }
