"""Headers of safetensors files, read without torch and without mapping a tensor.

Format: 8 bytes little-endian header length, a JSON header, the tensors' bytes. Offsets in the
header count from the end of the header.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # The format's own limit.

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}


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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of ``file`` by its key. Raises CheckpointError for one damaged or cut short."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise _damaged(file, "it ends within its header")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # Not JSON, or not UTF-8.
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {key: _entry(file, key, value, 8 + length) for key, value in header.items()}
    if max((entry.end for entry in entries.values()), default=0) > size:
        raise _damaged(file, "it ends before its last tensor")
    return entries


def _entry(file: Path, key: str, value: Any, base: int) -> TensorEntry:
    try:
        dtype = value["dtype"]
        shape = tuple(int(extent) for extent in value["shape"])
        start, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the header's entry of {key} is malformed") from error
    if dtype not in DTYPE_BITS:
        raise _damaged(file, f"{key} has the unknown element type {dtype}")
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if start < 0 or end - start != expected or any(extent < 0 for extent in shape):
        raise _damaged(file, f"{key} has {end - start} bytes where its shape needs {expected}")
    return TensorEntry(file, dtype, shape, base + start, base + end)


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or was not downloaded whole: {what}; fetch it again")
