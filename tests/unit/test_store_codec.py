"""Safetensors bytes: what is written reads back, and what is malformed is refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from opticnerve.embeddings import codec
from opticnerve.embeddings.ref import TensorSpec
from opticnerve.errors import EmbeddingCorrupt, InvalidRequest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def file_of(fields: Any, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_bits_names_order_and_meta(dtype: torch.dtype) -> None:
    tensors = {"rows": torch.randn(5, 7).to(dtype), "deepstack.0": torch.randn(5, 3).to(dtype)}
    read, meta = codec.from_bytes(codec.to_bytes(tensors, {"family": "qwen2_vl"}))
    assert list(read) == ["rows", "deepstack.0"]
    for name, value in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], value)
    assert meta["family"] == "qwen2_vl"
    codec.verify(read, meta)


def test_the_reference_library_reads_ours_and_we_read_its() -> None:
    tensors = {"rows": torch.randn(4, 6).bfloat16(), "b": torch.randn(3)}
    theirs = load(codec.to_bytes(tensors, {"a": "b"}))
    ours, _ = codec.from_bytes(save(tensors, {"a": "b"}))
    for name, value in tensors.items():
        assert torch.equal(theirs[name], value)
        assert torch.equal(ours[name], value)


def test_pieces_show_the_tensors_memory_and_start_aligned() -> None:
    rows = torch.zeros(3, 5)
    pieces = codec.encode({"rows": rows}, {})
    assert pieces[0].nbytes % codec.ALIGNMENT == 0
    rows[0, 0] = 1.0  # Seen through the piece: nothing was copied.
    assert bytes(pieces[1][:4]) == struct.pack("<f", 1.0)


def test_views_share_the_buffer() -> None:
    buffer = bytearray(codec.to_bytes({"rows": torch.zeros(2, 2)}, {}))
    views = codec.views(buffer, codec.header_of(buffer, len(buffer)))
    views["rows"][1, 1] = 1.0
    assert bytes(buffer[-4:]) == struct.pack("<f", 1.0)


def test_dlpack_comes_in_from_any_library_and_goes_out() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    read, _ = codec.from_bytes(codec.to_bytes({"rows": array}, {}))
    assert np.array_equal(np.from_dlpack(read["rows"]), array)
    assert codec.as_tensor(array).data_ptr() == array.ctypes.data
    bf16 = torch.ones(2, 2).bfloat16()
    assert torch.equal(torch.from_dlpack(bf16.__dlpack__()), bf16)
    with pytest.raises(InvalidRequest, match="__dlpack__"):
        codec.to_bytes({"rows": [[1.0]]}, {})


def test_other_element_types_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="int64"):
        codec.encode({"rows": torch.zeros(2, dtype=torch.int64)}, {})
    with pytest.raises(InvalidRequest):
        codec.encode({}, {})


def test_empty_and_strided_tensors() -> None:
    strided = torch.arange(12.0).reshape(3, 4).t()
    read, _ = codec.from_bytes(codec.to_bytes({"a": torch.empty(0, 4), "b": strided}, {}))
    assert read["a"].shape == (0, 4)
    assert torch.equal(read["b"], strided)


def test_specs() -> None:
    assert codec.specs_of({"rows": torch.zeros(2, 3).bfloat16()}) == (
        TensorSpec("rows", "BF16", (2, 3)),
    )


EIGHT = b"\0" * 8
MALFORMED = {
    "no bytes": b"",
    "no header": b"\1\0",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "absurd header": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": file_of(b"nonsense"),
    "not UTF-8": file_of(b'{"\xff\xfe": 1}'),
    "deep JSON": file_of(b"[" * 100_000),
    "a list": file_of([]),
    "no tensors": file_of({"__metadata__": {}}),
    "a tensor is a number": file_of({"rows": 5}),
    "unknown dtype": file_of({"rows": tensor(0, 8, [1], "I64")}, EIGHT),
    "dtype is a list": file_of({"rows": tensor(0, 8, [1], [])}, EIGHT),
    "negative shape": file_of({"rows": tensor(0, 8, [-1, -2])}, EIGHT),
    "shape with a float": file_of({"rows": tensor(0, 8, [2.0])}, EIGHT),
    "shape with a bool": file_of({"rows": tensor(0, 4, [True])}, EIGHT[:4]),
    "huge shape": file_of({"rows": tensor(0, 8, [2**62, 2**62])}, EIGHT),
    "an extent beyond torch": file_of({"rows": tensor(0, 0, [2**64, 0])}),
    "an extent beyond reason": file_of({"rows": tensor(0, 0, [2**62, 0])}),
    "an extent of thousands of digits": file_of({"rows": tensor(0, 0, [10**4000, 0])}),
    "strides beyond torch": file_of({"rows": tensor(0, 0, [1, 2**40, 2**40, 0])}),
    "a name that UTF-8 cannot write": file_of({"\ud800": tensor(0, 4, [1])}, EIGHT[:4]),
    "a name without end": file_of({"a" * 1000: tensor(0, 4, [1])}, EIGHT[:4]),
    "metadata that UTF-8 cannot write": file_of(
        {"__metadata__": {"a": "\udfff"}, "a": tensor(0, 4, [1])}, EIGHT[:4]
    ),
    "many dimensions": file_of({"rows": tensor(0, 4, [1] * 9)}, EIGHT[:4]),
    "shape and bytes differ": file_of({"rows": tensor(0, 8, [3])}, EIGHT),
    "out of range": file_of({"rows": tensor(0, 16, [4])}, EIGHT),
    "backwards": file_of({"rows": tensor(8, 0, [2])}, EIGHT),
    "overlap": file_of({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, EIGHT + EIGHT[:4]),
    "hole": file_of({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, EIGHT + EIGHT[:4]),
    "starts late": file_of({"a": tensor(4, 8, [1])}, EIGHT),
    "bytes after the last": file_of({"a": tensor(0, 4, [1])}, EIGHT),
    "twice": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        EIGHT[:4],
    ),
    "more fields": file_of({"a": {**tensor(0, 4, [1]), "x": 1}}, EIGHT[:4]),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, "a": tensor(0, 4, [1])}, EIGHT[:4]),
    "metadata is a list": file_of({"__metadata__": [], "a": tensor(0, 4, [1])}, EIGHT[:4]),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(EmbeddingCorrupt):
        codec.from_bytes(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_found_or_harmless(data: st.DataObject) -> None:
    """A changed byte or a cut never raises anything but EmbeddingCorrupt, and changed rows are
    always found by ``verify``."""
    rows = torch.arange(40.0).reshape(5, 8)
    good = codec.to_bytes({"rows": rows}, {"a": "b"})
    bad = bytearray(good)
    if data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(bad) - 1))
        bad[index] ^= data.draw(st.integers(1, 255))
    else:
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    try:
        read, meta = codec.from_bytes(bytes(bad))
        codec.verify(read, meta)
    except EmbeddingCorrupt:
        return
    header_bytes = codec.header_span(good)
    assert bad[header_bytes:] == good[header_bytes:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 20, 34])
def test_values_that_are_not_finite_are_found(
    dtype: torch.dtype, value: float, position: int
) -> None:
    rows = torch.randn(5, 7).to(dtype)
    good = {"rows": rows, "none": torch.ones(0, 7, dtype=dtype)}
    assert codec.is_finite(good)
    bad = {**good, "deepstack.0": rows.clone()}
    bad["deepstack.0"].view(-1)[position] = value
    assert not codec.is_finite(bad)
    with pytest.raises(EmbeddingCorrupt, match="not finite"):
        codec.verify(*codec.from_bytes(codec.to_bytes(bad, {})))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_corrupt(data: bytes) -> None:
    with pytest.raises(EmbeddingCorrupt):
        codec.from_bytes(data)
    with pytest.raises(EmbeddingCorrupt):
        codec.from_bytes(file_of(data))


def test_unaligned_tensors_of_other_writers_are_read() -> None:
    fields = {"rows": tensor(0, 8, [2])}
    text = json.dumps(fields).encode()
    text += b" " * (3 - len(text) % 4)  # Data that start at an odd offset.
    values = torch.tensor([1.0, -2.0])
    read, _ = codec.from_bytes(file_of(text, values.numpy().tobytes()))
    assert torch.equal(read["rows"], values)
