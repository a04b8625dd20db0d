"""Packed matrix products against plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opticnerve.models import linear
from opticnerve.models.linear import ROWS, Linear, can_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (1024, 640)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_those_of_plain_weights(
    dtype: torch.dtype, shape: tuple[int, int], biased: bool
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) / shape[1] ** 0.5).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if biased else None
    layer = Linear(weight, bias)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}.get(dtype, 1e-12)
    with torch.inference_mode():
        for rows in (1, 3, 17, 200):
            x = torch.randn(rows, shape[1]).to(dtype)
            torch.testing.assert_close(
                layer.forward(x), F.linear(x, weight, bias), atol=tolerance, rtol=tolerance
            )


ALWAYS, NEVER = (0.5,) * len(ROWS), (1.5,) * len(ROWS)
AT_MANY_ROWS = (2.0, 1.2, 0.9, 0.6, 0.5, 0.5)
needs_packing = pytest.mark.skipif(
    not can_pack(torch.float32), reason="this CPU or this torch does not pack weights"
)


@needs_packing
@pytest.mark.parametrize(
    "ratios, large_forms, small_forms",
    [(ALWAYS, "packed", "both"), (AT_MANY_ROWS, "packed", "both"), (NEVER, "plain", "plain")],
)
def test_the_faster_form_is_kept_and_a_large_weight_once(
    ratios: tuple[float, ...],
    large_forms: str,
    small_forms: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_compare", lambda weight, packed: ratios)
    for shape, want in (((1024, 640), large_forms), ((24, 40), small_forms)):
        weight, bias = torch.randn(shape), torch.randn(shape[0])
        held = Linear(weight).tensors()
        assert [tensor.is_mkldnn for tensor in held] == {
            "packed": [True], "plain": [False], "both": [False, True]
        }[want]  # fmt: skip
        assert len(Linear(weight, bias).tensors()) == len(held) + 1
        assert Linear(weight, pack=False).tensors() == [weight]


@needs_packing
def test_few_rows_take_the_plain_form_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_compare", lambda weight, packed: AT_MANY_ROWS)
    packed_rows = []

    def multiply(x: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
        packed_rows.append(len(x))
        return torch.zeros(len(x), 24)

    can_pack(torch.float32)
    monkeypatch.setattr(linear, "_multiply", multiply)
    layer = Linear(torch.randn(24, 40))
    for rows in (1, 2, 3, 4, 5, 100):
        layer.forward(torch.randn(rows, 40))
    assert packed_rows == [3, 4, 5, 100]


@needs_packing
def test_every_number_of_rows_is_timed_but_too_much_work_is_not() -> None:
    weight = torch.randn(48, 40)
    assert len(linear._compare(weight, linear._pack(weight))) == len(ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "MOST_WORK", 20 * 56 * 40)
        weight = torch.randn(56, 40)
        ratios = linear._compare(weight, linear._pack(weight))
        assert len(ratios) == sum(rows <= 20 for rows in ROWS)
        assert all(ratio > 0 for ratio in ratios)


def test_without_the_operators_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "_pack", missing)
    can_pack.cache_clear()
    try:
        weight = torch.randn(1024, 640)
        layer = Linear(weight)
        assert layer.tensors() == [weight]
        x = torch.randn(3, 640)
        assert torch.equal(layer.forward(x), F.linear(x, weight))
    finally:
        can_pack.cache_clear()


def test_operators_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_multiply", lambda x, packed, bias: torch.zeros(len(x), 24))
    can_pack.cache_clear()
    try:
        assert not can_pack(torch.float32)
    finally:
        can_pack.cache_clear()
