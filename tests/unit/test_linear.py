"""Packed matrix products against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opticnerve.models import linear
from opticnerve.models.linear import Linear, can_pack


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


def test_a_large_weight_is_kept_once() -> None:
    large, small = torch.randn(1024, 640), torch.randn(24, 40)
    copies = 1 + can_pack(torch.float32)
    assert len(Linear(large).tensors()) == 1
    assert len(Linear(small).tensors()) == copies
    assert len(Linear(small, torch.randn(24)).tensors()) == copies + 1


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
