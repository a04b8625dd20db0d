"""Packed variable-length attention for vision towers, behind transformers' attention interface.

If an attention's registered name contains "flash", transformers calls it once per layer with the
tower's whole batch and its segment bounds, otherwise once per segment. No mask is built: a
block-diagonal one is quadratic in the batch. On CUDA in half precision torch's own variable-length
kernel attends; elsewhere runs of equally long segments share one ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from opticnerve.tensors.dtypes import dtype_name

NAME = "opticnerve_flash_varlen"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Packing:
    """The segments of a packed batch; attention stays within each."""

    cu_seqlens: torch.Tensor  # int32 [segments + 1], on the device; identifies the packing.
    max_seqlen: int
    runs: tuple[tuple[int, int], ...]  # (segments, length) of each run of equally long segments.

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """``lengths``: tokens of each segment, in order, none of them zero."""
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds[1:] = torch.tensor(lengths).cumsum(0)
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        return cls(bounds.to(device, non_blocking=True), max(lengths), runs)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    packings: Sequence[Packing],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: q, k, v [1, heads, tokens, dim] -> [1, tokens, heads, dim].

    ``packings`` come through the tower's keyword arguments; the layer's own is the one with the
    bounds that it passes as ``cu_seq_lens_q``.
    """
    packing = next(p for p in packings if p.cu_seqlens is cu_seq_lens_q)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, dim]
    if q.is_cuda and has_varlen_kernel(q.device, q.dtype, q.shape[-1]):
        return _attend_by_kernel(q, k, v, packing, scaling)[None], None
    return _attend_by_runs(q, k, v, packing, scaling)[None], None


def _attend_by_runs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float
) -> torch.Tensor:
    outputs = []
    start = 0
    for count, length in packing.runs:
        end = start + count * length
        query, key, value = (
            x[start:end].unflatten(0, (count, length)).transpose(1, 2)  # [count, heads, length, d]
            for x in (q, k, v)
        )
        output = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        outputs.append(output.transpose(1, 2))
        start = end
    return torch.cat([output.flatten(0, 1) for output in outputs])


def _attend_by_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scaling: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packing.cu_seqlens, packing.max_seqlen
    output: torch.Tensor = varlen_attn(
        *(x.contiguous() for x in (q, k, v)), bounds, bounds, longest, longest, scale=scaling
    )
    return output


@functools.cache
def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's variable-length kernel runs here and agrees with plain attention."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        q, k, v = torch.randn(3, 24, 2, head_dim, device=device, dtype=dtype).unbind(0)
        packing = Packing.of([16, 8], device)
        scaling = head_dim**-0.5
        ours = _attend_by_kernel(q, k, v, packing, scaling)
        right = torch.allclose(ours, _attend_by_runs(q, k, v, packing, scaling), atol=0.05)
        why = "its results are wrong"
    except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
        right, why = False, str(error)
    if not right:
        log.warning(
            "torch's variable-length attention is not used for %s heads of %d, and pictures of "
            "different sizes attend one after the other: %s",
            dtype_name(dtype),
            head_dim,
            why,
        )
    return bool(right)


AttentionInterface.register(NAME, attend)


def use(module: Any) -> None:
    """Makes a transformers tower attend by this module's function.

    Call this once it is built: while building, transformers would try to import a "flash" package.
    """
    module.config._attn_implementation = NAME
