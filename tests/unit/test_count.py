"""The values of a body are counted before a parser makes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.schemas import long_json as outline
from gateway.api.schemas.long_json import count_values

PLENTY = 10**9
TEXT = st.text(st.sampled_from('ab,[{}]:"\\\n\u00e9'), max_size=12)
JSON = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=30,
)


def entries(value: Any) -> int:
    """1 for the value itself, and for what commas and brackets tell of its inside."""
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list):
        return 0
    return 1 + max(len(value) - 1, 0) + sum(entries(inner) for inner in value)


@settings(max_examples=300, deadline=None)
@given(value=JSON, chunk=st.integers(1, 9), ascii=st.booleans())
def test_what_stands_in_strings_does_not_count(value: Any, chunk: int, ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outline, "PIECE_BYTES", chunk)
        assert count_values(text, PLENTY) == 1 + entries(value)


def test_a_long_body_is_not_counted_to_its_end() -> None:
    bomb = b"[" + b"{}," * 1_000_000 + b"{}]"
    assert 100 < count_values(bomb, 100) < 200_000


@pytest.mark.parametrize("text", [b"", b"{", b'"', b"\\", b'["\\', b"\xff[,"])
def test_text_that_is_no_json(text: bytes) -> None:
    assert count_values(text, PLENTY) >= 1 + text.count(b"[")
