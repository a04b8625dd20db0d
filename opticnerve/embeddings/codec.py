"""Named tensors to safetensors bytes and back, without copying them.

The format is described in ``opticnerve.tensors.header``; tensors stand back to back in the header's
order. A file from elsewhere is checked as a whole before any of it becomes a tensor. Every failure
is an EmbeddingCorrupt, even one that no check foresaw (``reading``). Pickle is never read.

Files written here are aligned to 64 bytes and have ``opticnerve.sum`` in their metadata: the
wrapping sum of the data as 64-bit words (see ``checksum``), which ``verify`` checks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opticnerve.embeddings.ref import DTYPES, TensorSpec
from opticnerve.errors import EmbeddingCorrupt, InvalidRequest, OpticNerveError, StoreError
from opticnerve.tensors.dtypes import ELEMENT_TYPES, FLOATING
from opticnerve.tensors.header import (
    ELEMENT_BYTES,
    LENGTH,
    METADATA,
    HeaderEntry,
    header_end,
    parse_header,
)

if TYPE_CHECKING:
    from opticnerve.embeddings.store import Store

log = logging.getLogger(__name__)

ALIGNMENT = 64  # Of the first tensor's bytes; often, by their sizes, of all.
MAX_HEADER_BYTES = 2**18
MAX_TENSORS = 256
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48  # With zeros in a shape as ones: torch computes strides so.
MAX_NAME = 64  # Characters of a tensor's name.
SUM = "opticnerve.sum"  # Metadata key of the checksum.


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. ``offsets``: of each tensor's first byte, from the file's start."""

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
    """A tensor from any object with DLPack, sharing its memory. Raises InvalidRequest."""
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
    """Specifications of ``tensors`` for a reference, in order. Raises InvalidRequest."""
    found = []
    for name, value in tensors.items():
        tensor = as_tensor(value)
        dtype = ELEMENT_TYPES.get(tensor.dtype)
        if dtype not in DTYPES:
            raise InvalidRequest(
                f"tensor {name!r} is {tensor.dtype}; embeddings are float32, float16 or bfloat16"
            )
        found.append(TensorSpec(name, dtype, tuple(tensor.shape)))
    return tuple(found)


def encode(tensors: Mapping[str, Any], meta: Mapping[str, str]) -> list[memoryview]:
    """A file as pieces to write one after the other: the header, then each tensor's memory.

    Tensors that are on a device or not contiguous are copied once, others not at all. The pieces
    keep their memory alive. Raises InvalidRequest.
    """
    specs = specs_of(tensors)
    if not specs or len(specs) > MAX_TENSORS:
        raise InvalidRequest(f"an embedding has 1 to {MAX_TENSORS} tensors, not {len(specs)}")
    data = [memory_of(as_tensor(value)) for value in tensors.values()]
    header = _header(specs, {**meta, SUM: _sum_text(data)})
    return [memoryview(header), *(memoryview(piece.numpy()) for piece in data)]


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 [n], on the CPU; shares memory if possible."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def num_bytes(pieces: Sequence[memoryview]) -> int:
    return sum(piece.nbytes for piece in pieces)


def to_bytes(tensors: Mapping[str, Any], meta: Mapping[str, str]) -> bytes:
    """A whole file in one piece, for messages."""
    return b"".join(encode(tensors, meta))


def _header(specs: Sequence[TensorSpec], meta: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {METADATA: dict(meta)}
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
    """Surrounds code that makes tensors from foreign bytes: turns whatever torch or Python raise
    into EmbeddingCorrupt. An OSError passes, since it is the machine's (no descriptors left)."""
    try:
        yield
    except (OpticNerveError, OSError):
        raise
    except Exception as error:
        raise EmbeddingCorrupt(
            f"the embedding's bytes make no tensors ({type(error).__name__})"
        ) from error


@contextlib.contextmanager
def damage_is_a_miss(
    store: Store, key: str, report: Callable[[str], object] = lambda key: None
) -> Iterator[None]:
    """Surrounds a read of ``key`` from ``store``: a damaged entry is deleted and reported, so that
    it is encoded again. An OSError, such as no memory to map it, is a miss that deletes nothing."""
    try:
        with reading():
            yield
    except EmbeddingCorrupt as error:
        log.warning("the stored %.12s is damaged and is deleted: %s", key, error.message)
        forget(store, key)
        report(key)
    except OSError as error:
        log.warning("the stored %.12s could not be read: %s", key, error.strerror)


def forget(store: Store, key: str) -> None:
    """Deletes a damaged entry. Errors are ignored: the next reader finds it and tries again."""
    with contextlib.suppress(StoreError):
        store.delete(key)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise EmbeddingCorrupt(f"the embedding is damaged: {error}") from error


def header_span(start: bytes | memoryview) -> int:
    """The header's size, length field included, from a file's first eight bytes. Raises
    EmbeddingCorrupt."""
    with _damage():
        return header_end(start, MAX_HEADER_BYTES)


def header_of(start: bytes | memoryview, size: int) -> Header:
    """Checks a file's header. ``start``: at least the header's bytes; ``size``: the file's.

    Raises EmbeddingCorrupt unless the tensors fill the file exactly, without overlap or gap, and
    are possible in an embedding.
    """
    span = header_span(start)
    if span > size or span > len(start):
        raise EmbeddingCorrupt("the embedding's bytes end within its header")
    with _damage():
        entries, meta = parse_header(bytes(start[LENGTH.size : span]), size - span)
    if not 1 <= len(entries) <= MAX_TENSORS:
        raise EmbeddingCorrupt("the embedding holds no tensors, or too many")
    return Header(
        tensors=tuple(map(_spec, entries)),
        offsets=tuple(span + entry.start for entry in entries),
        meta=meta,
        num_bytes=size,
    )


def _spec(entry: HeaderEntry) -> TensorSpec:
    """Raises EmbeddingCorrupt for a tensor that no embedding can have."""
    name, shape = entry.name, entry.shape
    if len(name) > MAX_NAME or not (name.isascii() and name.isprintable()):
        raise EmbeddingCorrupt("a tensor of the embedding has no sensible name")
    if entry.dtype not in DTYPES:
        raise EmbeddingCorrupt("a tensor of the embedding is neither F32, F16 nor BF16")
    if len(shape) > MAX_DIMENSIONS or math.prod(extent or 1 for extent in shape) > MAX_ELEMENTS:
        raise EmbeddingCorrupt("a tensor of the embedding has no sensible shape")
    return TensorSpec(name, entry.dtype, shape)


@reading()
def views(buffer: Any, header: Header) -> dict[str, torch.Tensor]:
    """The tensors in ``buffer`` (writable, the whole file), sharing its memory and keeping it.

    A tensor that is not aligned to its elements, which our writers never make, is copied. Raises
    EmbeddingCorrupt if ``buffer`` does not belong to ``header``.
    """
    tensors = {}
    for spec, offset in zip(header.tensors, header.offsets, strict=True):
        dtype = FLOATING[spec.dtype]
        if spec.num_bytes == 0:
            tensors[spec.name] = torch.empty(spec.shape, dtype=dtype)
            continue
        source = buffer
        if offset % ELEMENT_BYTES[spec.dtype]:
            source = bytearray(memoryview(buffer)[offset : offset + spec.num_bytes])
            offset = 0
        count = spec.num_bytes // ELEMENT_BYTES[spec.dtype]
        flat = torch.frombuffer(source, dtype=dtype, count=count, offset=offset)
        tensors[spec.name] = flat.view(spec.shape)
    return tensors


def from_bytes(data: bytes | memoryview) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Tensors and metadata of a whole file, copied once. Raises EmbeddingCorrupt."""
    header = header_of(data, len(data))
    return views(bytearray(data), header), header.meta


def checksum(data: torch.Tensor) -> int:
    """The wrapping sum of uint8 [n] as little-endian 64-bit words, the tail as bytes.

    Computed at the speed of memory. It detects accidental overwrites, not those of an adversary:
    whoever can write to a tier is trusted anyway.
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
    """Whether no value is NaN or infinite. One pass suffices: a NaN makes both extremes NaN."""
    filled = [tensor for tensor in map(as_tensor, tensors.values()) if tensor.numel()]
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(one))).all()) for one in filled)


@reading()
def verify(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
    """Raises EmbeddingCorrupt unless the data are finite, and are what was written, by the sum in
    the metadata if there is one."""
    expected = meta.get(SUM)
    if expected is not None and expected != _sum_text([memory_of(t) for t in tensors.values()]):
        raise EmbeddingCorrupt("the embedding's data are not what was written")
    if not is_finite(tensors):
        raise EmbeddingCorrupt("the embedding has values that are not finite")
