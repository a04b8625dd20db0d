"""Named tensors to safetensors bytes and back, without copying them.

A file is eight bytes (the header's length, little-endian), the header (JSON: for each tensor its
dtype, shape and data_offsets; ``__metadata__``: strings), then the tensors' bytes back to back in
the header's order. What comes from elsewhere is checked as a whole before one byte of it becomes
a tensor: every failure is an EmbeddingCorrupt, those that no check foresaw included (``reading``).
Pickle is never read.

What is written here is aligned to 64 bytes and carries ``opticnerve.sum`` in its metadata: the
wrapping sum of the data read as 64-bit words (see ``checksum``), which ``verify`` compares.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opticnerve.embeddings.ref import DTYPE_BYTES, TensorSpec
from opticnerve.errors import EmbeddingCorrupt, InvalidRequest, OpticNerveError

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGNMENT = 64  # Of the first tensor's bytes, and by their sizes often of the others'.
MAX_HEADER_BYTES = 2**18
MAX_TENSORS = 256
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48  # Of a shape whose zeros are ones: torch reckons strides without them.
MAX_NAME = 64  # Characters of a tensor's name.
SUM = "opticnerve.sum"  # Metadata key of the checksum.

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. ``offsets`` are of the tensors' first bytes, from the file's start."""

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    meta: Mapping[str, str]
    num_bytes: int  # Of the whole file.

    def find(self, name: str) -> tuple[TensorSpec, int]:
        """A tensor's specification and offset. Raises KeyError."""
        for spec, offset in zip(self.tensors, self.offsets, strict=True):
            if spec.name == name:
                return spec, offset
        raise KeyError(name)


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor from anything that speaks DLPack, sharing its memory. Raises InvalidRequest."""
    if isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise InvalidRequest(
            f"embeddings are tensors or objects with __dlpack__, not {type(value).__name__}"
        )
    try:
        return torch.from_dlpack(value)
    except (RuntimeError, TypeError, BufferError, ValueError) as error:
        raise InvalidRequest(f"the DLPack export of {type(value).__name__} failed") from error


def specs_of(tensors: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """What a reference says of ``tensors``, in their order. Raises InvalidRequest."""
    found = []
    for name, value in tensors.items():
        tensor = as_tensor(value)
        if tensor.dtype not in NAMES:
            raise InvalidRequest(
                f"tensor {name!r} is {tensor.dtype}; embeddings are float32, float16 or bfloat16"
            )
        found.append(TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape)))
    return tuple(found)


def encode(tensors: Mapping[str, Any], meta: Mapping[str, str]) -> list[memoryview]:
    """A file as pieces to write one after the other: the header, then each tensor's own memory.

    Tensors on a device or not contiguous are copied once, others not at all. The pieces keep the
    memory that they show alive. Raises InvalidRequest.
    """
    specs = specs_of(tensors)
    if not specs or len(specs) > MAX_TENSORS:
        raise InvalidRequest(f"an embedding has 1 to {MAX_TENSORS} tensors, not {len(specs)}")
    data = [memory_of(as_tensor(value)) for value in tensors.values()]
    header = _header(specs, {**meta, SUM: _sum_text(data)})
    return [memoryview(header), *(memoryview(piece.numpy()) for piece in data)]


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 [n], on the CPU; shares memory where it can."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def num_bytes(pieces: Sequence[memoryview]) -> int:
    return sum(piece.nbytes for piece in pieces)


def to_bytes(tensors: Mapping[str, Any], meta: Mapping[str, str]) -> bytes:
    """A whole file in one piece: for the wire."""
    return b"".join(encode(tensors, meta))


def _header(specs: Sequence[TensorSpec], meta: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": dict(meta)}
    start = 0
    for spec in specs:
        end = start + spec.num_bytes
        fields[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH.size + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidRequest(f"an embedding's header has at most {MAX_HEADER_BYTES} bytes")
    return LENGTH.pack(len(text)) + text


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around code that makes tensors of bytes from elsewhere: what it raises is EmbeddingCorrupt,
    whatever torch or Python call it. An OSError is the machine's (no descriptors left), and passes.
    """
    try:
        yield
    except (OpticNerveError, OSError):
        raise
    except Exception as error:
        raise EmbeddingCorrupt(
            f"the embedding's bytes make no tensors ({type(error).__name__})"
        ) from error


def header_span(start: bytes | memoryview) -> int:
    """Bytes up to the first tensor's, from a file's first eight. Raises EmbeddingCorrupt."""
    if len(start) < LENGTH.size:
        raise EmbeddingCorrupt("the embedding's bytes end within its header")
    (length,) = LENGTH.unpack_from(start)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise EmbeddingCorrupt("the embedding's header has an absurd length")
    return LENGTH.size + int(length)


def parse(start: bytes | memoryview, size: int) -> Header:
    """Checks a file's header. ``start`` holds at least the header, ``size`` is the file's.

    Raises EmbeddingCorrupt unless the tensors fill the file exactly, without overlap or hole.
    """
    span = header_span(start)
    if span > size or span > len(start):
        raise EmbeddingCorrupt("the embedding's bytes end within its header")
    fields = _load_json(bytes(start[LENGTH.size : span]))
    meta = fields.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(map(_is_text, (*meta.keys(), *meta.values()))):
        raise EmbeddingCorrupt("the embedding's metadata are not strings")
    if not 1 <= len(fields) <= MAX_TENSORS:
        raise EmbeddingCorrupt("the embedding holds no tensors, or too many")
    found = sorted((_tensor(name, value) for name, value in fields.items()), key=lambda x: x[1:])
    end = 0
    for _, first, last in found:
        if first != end:
            raise EmbeddingCorrupt("the embedding's tensors overlap or leave a hole")
        end = last
    if span + end != size:
        raise EmbeddingCorrupt("the embedding's size is not what its header says")
    return Header(
        tensors=tuple(spec for spec, _, _ in found),
        offsets=tuple(span + first for _, first, _ in found),
        meta=meta,
        num_bytes=size,
    )


def _is_text(value: Any) -> bool:
    """Whether ``value`` is a string that UTF-8 can write: JSON's escapes can make others."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    loaded = dict(pairs)
    if len(loaded) != len(pairs):
        raise ValueError("a name occurs twice")
    return loaded


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _load_json(text: bytes) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise EmbeddingCorrupt("the embedding's header is not JSON with unique names") from error
    if not isinstance(fields, dict):
        raise EmbeddingCorrupt("the embedding's header is not a JSON object")
    return fields


def _tensor(name: str, value: Any) -> tuple[TensorSpec, int, int]:
    """One tensor of the header: specification, first and last byte in the data."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise EmbeddingCorrupt("a tensor of the embedding is described by other fields than known")
    if len(name) > MAX_NAME or not (name.isascii() and name.isprintable()):
        raise EmbeddingCorrupt("a tensor of the embedding has no sensible name")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise EmbeddingCorrupt("a tensor of the embedding is neither F32, F16 nor BF16")
    if (
        not _naturals(shape)
        or len(shape) > MAX_DIMENSIONS
        or math.prod(extent or 1 for extent in shape) > MAX_ELEMENTS
    ):
        raise EmbeddingCorrupt("a tensor of the embedding has no sensible shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise EmbeddingCorrupt("a tensor of the embedding has no sensible offsets")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.num_bytes:
        raise EmbeddingCorrupt("a tensor of the embedding has other bytes than its shape needs")
    return spec, offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(number) is int and number >= 0 for number in value)


@reading()
def views(buffer: Any, header: Header) -> dict[str, torch.Tensor]:
    """The tensors in ``buffer`` (writable, the whole file), sharing its memory and keeping it.

    A tensor that is not aligned to its elements, which no writer of ours makes, is copied.
    Raises EmbeddingCorrupt where the buffer is not what the header was read of.
    """
    tensors = {}
    for spec, offset in zip(header.tensors, header.offsets, strict=True):
        dtype = DTYPES[spec.dtype]
        if spec.num_bytes == 0:
            tensors[spec.name] = torch.empty(spec.shape, dtype=dtype)
            continue
        source = buffer
        if offset % DTYPE_BYTES[spec.dtype]:
            source = bytearray(memoryview(buffer)[offset : offset + spec.num_bytes])
            offset = 0
        count = spec.num_bytes // DTYPE_BYTES[spec.dtype]
        flat = torch.frombuffer(source, dtype=dtype, count=count, offset=offset)
        tensors[spec.name] = flat.view(spec.shape)
    return tensors


def from_bytes(data: bytes | memoryview) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Tensors and metadata of a whole file, copied once. Raises EmbeddingCorrupt."""
    header = parse(data, len(data))
    return views(bytearray(data), header), header.meta


def checksum(data: torch.Tensor) -> int:
    """The wrapping sum of uint8 [n] read as little-endian 64-bit words, the tail as bytes.

    It reads memory at full speed, and finds bytes that were overwritten, not bytes that an
    adversary chose: whoever can write to a tier is trusted anyway.
    """
    words = data.numel() // 8 * 8
    total = 0
    if words:
        body = data[:words]
        if body.data_ptr() % 8 or body.storage_offset() % 8:
            body = body.clone()
        total = int(body.view(torch.int64).sum())
    return (total + int(data[words:].sum(dtype=torch.int64))) % 2**64


def _sum_text(data: Sequence[torch.Tensor]) -> str:
    return f"{sum(map(checksum, data)) % 2**64:016x}"


def is_finite(tensors: Mapping[str, Any]) -> bool:
    """Whether no value is NaN or infinite. In one pass: a NaN makes both extremes NaN."""
    filled = [tensor for tensor in map(as_tensor, tensors.values()) if tensor.numel()]
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(one))).all()) for one in filled)


@reading()
def verify(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
    """Raises EmbeddingCorrupt unless the data are what was written, by the metadata's sum where
    there is one, and finite."""
    expected = meta.get(SUM)
    if expected is not None and expected != _sum_text([memory_of(t) for t in tensors.values()]):
        raise EmbeddingCorrupt("the embedding's data are not what was written")
    if not is_finite(tensors):
        raise EmbeddingCorrupt("the embedding has values that are not finite")
