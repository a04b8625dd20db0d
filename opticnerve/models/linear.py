"""Matrix products with weights packed for the CPU, where that is faster.

oneDNN multiplies with weights that it has laid out once for this CPU two to three times as fast
as with plain ones (measured on an AMD CPU with AVX-512 at 1 to 2,000 rows). torch offers this to
its own compiler's output, as operators that need no compiler: they are tried at first use, and
what they cannot do, or do differently, stays with ``F.linear``.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

# Multiplications (rows x weights, fp32) below which starting oneDNN costs more than it saves. A
# weight that is small enough for this to happen is kept as it is, too.
WORTH_IT = 600_000


class Linear:
    """``forward`` computes ``x @ weight.T + bias``. A large weight is kept in one form only:
    as it is where ``pack`` is false, else packed where that is possible."""

    __slots__ = ("_bias", "_few_rows", "_packed", "_weight", "forward")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, pack: bool = True
    ) -> None:
        self._bias = bias
        self._weight: torch.Tensor | None = weight
        self._packed: Any = None
        self.forward: Callable[[torch.Tensor], torch.Tensor] = self._plain
        if not pack or weight.device.type != "cpu" or not can_pack(weight.dtype):
            return
        self._packed = _pack(weight)
        self._few_rows = WORTH_IT // weight.numel() if weight.dtype == torch.float32 else 0
        if self._few_rows:
            self.forward = self._either
        else:
            self._weight = None
            self.forward = self._fast

    def tensors(self) -> list[torch.Tensor]:
        """What is held in memory."""
        held = (self._weight, self._packed, self._bias)
        return [tensor for tensor in held if tensor is not None]

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def _fast(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(x, self._packed, self._bias)

    def _either(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self._few_rows:
            return F.linear(x, self._weight, self._bias)
        return _multiply(x, self._packed, self._bias)


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
    want = [F.linear(x, weight, bias), F.linear(x[:1], weight)]
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(got, want, strict=True))


def return_freed_memory() -> None:
    """Hands what plain weights left behind back to the system, where the C library can.

    Without it about a fifth of the weights' size stays with the allocator.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not.
        if trim is not None:
            trim(0)


def _pack(weight: torch.Tensor) -> Any:
    with torch.inference_mode():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def _multiply(x: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
