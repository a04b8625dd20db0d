"""Matrix products with weights in the form that multiplies fastest on this CPU.

Which form a weight takes follows from its dtype, its size, its values and the CPU's instructions,
so that workers on CPUs of one kind round alike. There are three forms:

* 16 bits. A product of few rows takes as long as reading the weights. A checkpoint in bf16 or fp16
  that is computed in float32, as on a CPU without arithmetic in its own type, keeps its large
  weights in 16 bits: FBGEMM multiplies float32 rows by them, sums in float32, and widens each
  weight on its way to the registers. With AVX2 that took a third of the time of float32 weights at
  one row, and no more at 2,048. The weights are exact, so the product is that of float32 weights up
  to the order of its sum. Each call costs some 20 us more, too much for small weights.
* Packed. oneDNN lays weights out once for the CPU. With AVX-512 that took a half to a third of the
  time of plain weights at any number of rows. With AVX2 it lost at one row and never paid with
  small weights, so there it is not done.
* Plain: ``F.linear``.

torch does not document either operator for this use. Each is tried once; if it is missing, or its
results are wrong, weights take another form.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

LARGE = 600_000  # Elements above which 16 bits pay.
MAX_LOSS = 2.0**-39  # Relative to the largest weight; far below float32's rounding.
MAX_SCALE = 2.0**40  # Bounded, since a bias is multiplied by it too.
HALVES_BLOCK = 512  # FBGEMM lays out this many inputs together.
PART_ROWS = 1024  # Rows checked at once; a copy of a whole weight would double its memory.

Product = Callable[[torch.Tensor], torch.Tensor]


class Linear:
    """``forward`` computes ``x @ weight.T + bias``, x [rows, in].

    ``pack``: False if the caller keeps ``weight`` as well. It is then not packed, which would hold
    it twice.
    """

    __slots__ = ("_bias", "_halves", "_halves_bytes", "_unscale", "_weight", "forward")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, pack: bool = True
    ) -> None:
        self._bias = bias
        self._weight: Any = weight  # Plain or packed; None in 16 bits.
        self._halves: Any = None  # FBGEMM's weight and bias.
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
            self._weight, self.forward = _pack(weight), self._packed

    def _take_halves(self, weight: torch.Tensor, scale: float) -> None:
        outputs, inputs = weight.shape
        bias = None if self._bias is None else self._bias.detach() * scale
        self._halves = _halve(weight * scale, bias)
        self._halves_bytes = 2 * outputs * -(-inputs // HALVES_BLOCK) * HALVES_BLOCK
        self._weight = self._bias = None
        self._unscale = 1.0 / scale
        self.forward = self._by_halves if scale == 1.0 else self._by_scaled_halves

    @property
    def in_halves(self) -> bool:
        """Whether a float32 weight is held in 16 bits."""
        return self._halves is not None

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held. Weights in 16 bits are in FBGEMM's memory, not in tensors."""
        return [tensor for tensor in (self._weight, self._bias) if tensor is not None]

    def num_bytes(self) -> int:
        """Memory that is held."""
        return self._halves_bytes + sum(map(num_bytes, self.tensors()))

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(x, self._weight, self._bias)

    def _by_halves(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply_halves(x, self._halves)

    def _by_scaled_halves(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply_halves(x, self._halves).mul_(self._unscale)


def num_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, which may be a packed one without storage."""
    return int(tensor.numel() * tensor.dtype.itemsize)


def narrowed(table: torch.Tensor) -> torch.Tensor:
    """``table`` in 16 bits where that changes no value; otherwise unchanged."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(
            torch.equal(part.to(dtype).to(table.dtype), part) for part in table.split(PART_ROWS)
        ):
            return table.to(dtype)
    return table


def scale_to_halve(weight: torch.Tensor) -> float | None:
    """The power of two that ``weight``, float32, is multiplied by to fit fp16 without loss (see
    MAX_LOSS). None if no scale does: it has more than 11 significant bits, or is not finite.

    Weights in bf16 always fit: the scale keeps small numbers out of fp16's subnormal range.
    """
    largest = max(map(abs, map(float, weight.aminmax()))) if weight.numel() else math.inf
    if not math.isfinite(largest):
        return None
    for scale in (1.0, min(MAX_SCALE, 2.0 ** (15 - math.frexp(largest)[1]))):
        loss = largest * scale * MAX_LOSS
        if all(_fits_half(part * scale, loss) for part in weight.split(PART_ROWS)):
            return scale
    return None


def _fits_half(scaled: torch.Tensor, loss: float) -> bool:
    return bool((scaled.half().float() - scaled).abs().max() <= loss)


@cache
def can_halve() -> bool:
    """Whether torch multiplies float32 rows by 16-bit weights on this CPU, and correctly."""
    return _is_correct(
        "kept in 16 bits",
        torch.float32,
        lambda x, weight, bias: _multiply_halves(x, _halve(weight, bias)),
    )


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether weights are packed on this CPU: it has AVX-512, and torch multiplies correctly."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    return has_avx512() and _is_correct(
        "packed", dtype, lambda x, weight, bias: _multiply(x, _pack(weight), bias)
    )


def has_avx512() -> bool:
    """Whether torch uses AVX-512 here."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")


def _is_correct(
    form: str,
    dtype: torch.dtype,
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> bool:
    """Whether ``multiply`` exists here, and agrees with ``F.linear``."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator).half().to(dtype)
    x, bias = torch.randn(5, 40, generator=generator).to(dtype), weight[:, 0].clone()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    try:
        with torch.inference_mode():
            return all(
                torch.allclose(multiply(*each), F.linear(*each), atol=tolerance)
                for each in ((x, weight, bias), (x[:1], weight, None))
            )
    except (AttributeError, RuntimeError) as error:  # Not in this build, or not on this CPU.
        log.info("weights are not %s: %s", form, error)
        return False


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
