"""Matrix products with weights in the form that multiplies fastest on this CPU.

Few rows cost what reading the weights costs. A checkpoint in bf16 or fp16 that is computed in
float32, as on a CPU without arithmetic in its own type, therefore keeps its large weights in 16
bits: FBGEMM multiplies float32 rows by them, sums in float32, and widens each weight on its way to
the registers. On a CPU with AVX2 that took a third of the time of float32 weights at one row and
no more at 2,048. The weights are exact, so the product is that of float32 weights up to the order
of its sum. Each product costs some 20 us more to call, which small weights would not earn.

For other weights, oneDNN can multiply with weights that it has laid out once for this CPU. On one
CPU with AVX-512 that took a half to a third of the time of plain weights at any number of rows;
on one with AVX2 it lost at one row, gained with large weights at a few rows, and never paid with
small ones. So the two ways are timed where they will run, at load, once for each shape of weights.

torch offers both as operators that it does not document for use like this: they are tried at
first use, and what they cannot do, or do differently, stays with ``F.linear``.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

LARGE = 600_000  # Elements; a larger weight is kept in one form only, in 16 bits if they hold it.
ROWS = (1, 2, 4, 16, 64, 256)  # Of the products that are timed.
MOST_WORK = 1 << 30  # Multiplications of one timed product.
REPEATS = 5
LOST = 2.0**-39  # Of a matrix' largest weight: what 16 bits may lose, far below float32's rounding.
MOST_SCALE = 2.0**40  # That a bias is multiplied by.
HALVES_BLOCK = 512  # FBGEMM lays out this many inputs together.
PART_ROWS = 1024  # Of a weight, looked at together: a copy of the whole would take its memory.
CLEARLY = 0.95  # Of the plain product's time: what is no faster than that is not worth a form.

Product = Callable[[torch.Tensor], torch.Tensor]


class Linear:
    """``forward`` computes ``x @ weight.T + bias``, x [rows, in]. ``pack`` false: whoever made the
    weight keeps it, so it is packed only where that takes half its size."""

    __slots__ = (
        "_bias",
        "_halves",
        "_halves_bytes",
        "_packed",
        "_packed_from",
        "_unscale",
        "_weight",
        "forward",
    )

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, pack: bool = True
    ) -> None:
        self._bias = bias
        self._weight: torch.Tensor | None = weight
        self._packed: Any = None
        self._packed_from = 0  # Rows.
        self._halves: Any = None  # With the bias.
        self._halves_bytes = 0
        self._unscale = 1.0
        self.forward: Product = self._plain
        if weight.device.type != "cpu":
            return
        large = weight.dtype == torch.float32 and weight.numel() > LARGE
        scale = scale_to_halve(weight) if large and can_halve() else None
        if scale is not None:
            self._take_halves(weight, scale)
        elif pack and can_pack(weight.dtype):
            self._take_faster(weight)

    def _take_halves(self, weight: torch.Tensor, scale: float) -> None:
        outputs, inputs = weight.shape
        bias = None if self._bias is None else self._bias.detach() * scale
        self._halves = _halve(weight * scale, bias)
        self._halves_bytes = 2 * outputs * -(-inputs // HALVES_BLOCK) * HALVES_BLOCK
        self._weight = self._bias = None
        self._unscale = 1.0 / scale
        self.forward = self._by_halves if scale == 1.0 else self._by_scaled_halves

    def _take_faster(self, weight: torch.Tensor) -> None:
        packed = _pack(weight)
        ratios = _compare(weight, packed)
        if weight.numel() > LARGE:
            if _mean(ratios) < CLEARLY:
                self._packed, self._weight, self.forward = packed, None, self._fast
            return
        slower = [rows for rows, ratio in zip(ROWS, ratios, strict=False) if ratio >= CLEARLY]
        if slower and slower[-1] == ROWS[len(ratios) - 1]:
            return
        self._packed, self.forward = packed, self._either
        self._packed_from = slower[-1] + 1 if slower else 0

    @property
    def in_halves(self) -> bool:
        """Whether the weight is kept in 16 bits, where it came in 32."""
        return self._halves is not None

    def tensors(self) -> list[torch.Tensor]:
        """What is held in memory, but for weights in 16 bits: FBGEMM's memory is no tensor."""
        held = (self._weight, self._packed, self._bias)
        return [tensor for tensor in held if tensor is not None]

    def num_bytes(self) -> int:
        """What is held in memory."""
        return self._halves_bytes + sum(map(num_bytes, self.tensors()))

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def _fast(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(x, self._packed, self._bias)

    def _by_halves(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply_halves(x, self._halves)

    def _by_scaled_halves(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply_halves(x, self._halves).mul_(self._unscale)

    def _either(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] < self._packed_from:
            return F.linear(x, self._weight, self._bias)
        return _multiply(x, self._packed, self._bias)


def num_bytes(tensor: torch.Tensor) -> int:
    """Also of a packed tensor, which has no storage."""
    return int(tensor.numel() * tensor.dtype.itemsize)


def narrowed(table: torch.Tensor) -> torch.Tensor:
    """``table`` in 16 bits where that changes no value; else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(
            torch.equal(part.to(dtype).to(table.dtype), part) for part in table.split(PART_ROWS)
        ):
            return table.to(dtype)
    return table


def scale_to_halve(weight: torch.Tensor) -> float | None:
    """The power of two by which ``weight``, float32, fits fp16 without loss (see LOST). None where
    there is none: it has more than 11 significant bits, or is not finite.

    bf16 always fits: the scale takes its many small numbers out of fp16's subnormal range.
    """
    largest = max(map(abs, map(float, weight.aminmax()))) if weight.numel() else math.inf
    if not math.isfinite(largest):
        return None
    for scale in (1.0, min(MOST_SCALE, 2.0 ** (15 - math.frexp(largest)[1]))):
        lost = largest * scale * LOST
        if all(_fits_half(part * scale, lost) for part in weight.split(PART_ROWS)):
            return scale
    return None


def _fits_half(scaled: torch.Tensor, lost: float) -> bool:
    return bool((scaled.half().float() - scaled).abs().max() <= lost)


@cache
def can_halve() -> bool:
    """Whether this torch on this CPU multiplies float32 rows by 16-bit weights, and right."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator).half().float()
    x, bias = torch.randn(5, 40, generator=generator), weight[:, 0].clone()
    try:
        with torch.inference_mode():
            got = [
                _multiply_halves(x, _halve(weight, bias)),
                _multiply_halves(x[:1], _halve(weight, None)),
            ]
    except (AttributeError, RuntimeError) as error:  # Not in this build, or not on this CPU.
        log.info("weights are not kept in 16 bits: %s", error)
        return False
    return _agree(got, [F.linear(x, weight, bias), F.linear(x[:1], weight)], 1e-4)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU multiplies with packed weights, and right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator).to(dtype)
    x, bias = torch.randn(5, 40, generator=generator).to(dtype), weight[:, 0].clone()
    try:
        with torch.inference_mode():
            packed = _pack(weight)
            got = [_multiply(x, packed, bias), _multiply(x[:1], packed, None)]
    except (AttributeError, RuntimeError) as error:  # Not in this build, or not on this CPU.
        log.info("weights are not packed: %s", error)
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return _agree(got, [F.linear(x, weight, bias), F.linear(x[:1], weight)], tolerance)


def _agree(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], tolerance: float) -> bool:
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(got, want, strict=True))


def return_freed_memory() -> None:
    """Hands what plain weights left behind back to the system, where the C library can.

    Without it about a fifth of the weights' size stays with the allocator.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not.
        if trim is not None:
            trim(0)


def _halve(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.detach().contiguous(), bias)


def _multiply_halves(x: torch.Tensor, halves: Any) -> torch.Tensor:
    product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, halves)
    return product


def _pack(weight: torch.Tensor) -> Any:
    with torch.inference_mode():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def _multiply(x: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


_compared: dict[tuple[Any, ...], tuple[float, ...]] = {}


def _compare(weight: torch.Tensor, packed: Any) -> tuple[float, ...]:
    """Time of a product with ``packed`` over that with ``weight``, for each of ROWS that is not
    too much work; timed once for a shape, a dtype and a number of threads."""
    key = (*weight.shape, weight.dtype, torch.get_num_threads())
    if key not in _compared:
        most = max(1, MOST_WORK // weight.numel())
        with torch.inference_mode():
            _compared[key] = tuple(
                _ratio(torch.zeros(rows, weight.shape[1], dtype=weight.dtype), weight, packed)
                for rows in ROWS
                if rows <= most
            )
    return _compared[key]


def _ratio(x: torch.Tensor, weight: torch.Tensor, packed: Any) -> float:
    """The two take turns, so that whatever else the machine does falls on both."""
    times: tuple[list[float], list[float]] = ([], [])
    products: tuple[Product, Product] = (
        lambda x: _multiply(x, packed, None),
        lambda x: F.linear(x, weight),
    )
    for _ in range(1 + REPEATS):  # The first sets kernels up.
        for product, taken in zip(products, times, strict=True):
            start = time.perf_counter()
            product(x)
            taken.append(time.perf_counter() - start)
    fast, plain = (min(taken[1:]) for taken in times)
    return fast / plain


def _mean(ratios: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
