"""Packed matrix products against plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opticnerve.models.decoders import linear
from opticnerve.models.decoders.linear import (
    Linear,
    can_halve,
    can_pack,
    narrowed,
    scale_to_halve,
)


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


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Pretends that the CPU has AVX-512, or not."""

    def has_avx512(value: bool) -> None:
        monkeypatch.setattr(linear, "has_avx512", lambda: value)
        can_pack.cache_clear()

    yield has_avx512
    can_pack.cache_clear()


@pytest.mark.parametrize("shape", [(1024, 640), (24, 40)])
def test_the_form_follows_from_the_cpu_and_a_weight_is_held_once(
    shape: tuple[int, int], capability: Callable[[bool], None]
) -> None:
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    capability(False)
    assert Linear(weight).tensors() == [weight]
    capability(True)
    if not can_pack(torch.float32):
        pytest.skip("this CPU or this torch does not pack weights")
    held = Linear(weight).tensors()
    assert [tensor.is_mkldnn for tensor in held] == [True]
    assert len(Linear(weight, bias).tensors()) == len(held) + 1
    assert Linear(weight, pack=False).tensors() == [weight]
    layer = Linear(weight, bias)
    with torch.inference_mode():
        for rows in (1, 3, 17, 200):
            x = torch.randn(rows, shape[1])
            torch.testing.assert_close(
                layer.forward(x), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4
            )


needs_halves = pytest.mark.skipif(
    not can_halve(), reason="this CPU or this torch does not multiply by 16-bit weights"
)


def weights(shape: tuple[int, int], dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """float32 numbers that ``dtype`` holds, some of them 2^30 times smaller than others."""
    torch.manual_seed(1)
    weight = torch.randn(shape) * spread
    weight[::3, ::5] *= 2.0**-30 if dtype is torch.bfloat16 else 0.5
    return weight.to(dtype).float()


@needs_halves
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 3e3])
@pytest.mark.parametrize("shape", [(1024, 640), (300, 2100)])
@pytest.mark.parametrize("biased", [True, False])
def test_weights_of_16_bits_stay_so_and_the_product_is_float32s(
    dtype: torch.dtype, spread: float, shape: tuple[int, int], biased: bool
) -> None:
    weight = weights(shape, dtype, spread)
    bias = torch.randn(shape[0]) if biased else None
    layer = Linear(weight, bias)
    assert layer.in_halves
    assert layer.num_bytes() <= 2 * shape[0] * (shape[1] + 512) + 4 * shape[0]
    with torch.inference_mode():
        for rows in (1, 3, 17, 200):
            x = torch.randn(rows, shape[1])  # Not held by 16 bits: rounding would show.
            exact = x.double() @ weight.double().T + (0 if bias is None else bias)
            error = (layer.forward(x) - exact).abs().max() / exact.abs().max()
            assert error < 3e-6


@needs_halves
def test_a_weight_that_its_owner_keeps_is_taken_into_16_bits_too() -> None:
    weight = weights((1024, 640), torch.bfloat16)
    assert Linear(weight, pack=False).in_halves
    assert not Linear(torch.randn(1024, 640), pack=False).in_halves
    assert not Linear(weights((24, 40), torch.bfloat16)).in_halves  # Too small to earn it.


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(1024, 640),
        torch.full((2, 2), torch.nan),
        torch.tensor([[1.0, torch.inf]]),
        torch.tensor([[1.0, torch.nan]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0 + 2.0**-11]]),  # Twelve significant bits.
    ],
)
def test_what_16_bits_do_not_hold_stays_as_it_is(weight: torch.Tensor) -> None:
    assert scale_to_halve(weight) is None
    assert not Linear(weight, pack=False).in_halves


def test_a_scale_is_a_power_of_two_and_only_where_it_is_needed() -> None:
    assert scale_to_halve(weights((24, 40), torch.float16)) == 1.0
    assert scale_to_halve(torch.zeros(3, 4)) == 1.0
    # Within fp16's range, but for numbers that would lose bits below it.
    scale = scale_to_halve(torch.tensor([[1.0, 1.5 * 2.0**-24], [-0.75, 2.0**-25]]))
    assert scale == 2.0**14
    tiny = torch.tensor([[1e-30, 3e-33]]).bfloat16().float()
    assert scale_to_halve(tiny) is None  # Beyond what a bias could be multiplied by.


def test_a_table_is_narrowed_where_that_changes_nothing() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        table = weights((2000, 40), dtype)
        assert narrowed(table).dtype is dtype
        assert torch.equal(narrowed(table).float(), table)
    wide = torch.randn(2000, 40)
    assert narrowed(wide) is wide


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_without_halves_that_are_right_weights_take_another_form(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiply(x: torch.Tensor, *_: Any) -> torch.Tensor:
        if fault == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(len(x), 24)

    monkeypatch.setattr(linear, "_multiply_halves", multiply)
    can_halve.cache_clear()
    try:
        weight = weights((1024, 640), torch.bfloat16)
        layer = Linear(weight)
        assert not layer.in_halves
        x = torch.randn(3, 640)
        with torch.inference_mode():
            torch.testing.assert_close(layer.forward(x), F.linear(x, weight), atol=1e-4, rtol=0)
    finally:
        can_halve.cache_clear()


def test_without_the_operators_weights_stay_plain(
    monkeypatch: pytest.MonkeyPatch, capability: Callable[[bool], None]
) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "_pack", missing)
    capability(True)
    weight = torch.randn(1024, 640)
    layer = Linear(weight)
    assert layer.tensors() == [weight]
    x = torch.randn(3, 640)
    assert torch.equal(layer.forward(x), F.linear(x, weight))


def test_operators_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, capability: Callable[[bool], None]
) -> None:
    monkeypatch.setattr(linear, "_multiply", lambda x, packed, bias: torch.zeros(len(x), 24))
    capability(True)
    assert not can_pack(torch.float32)
