"""The bridge from a model's layers to a backend: one custom op a layer.

``ATTENTION_NAME`` is registered with transformers, whose layers then call ``paged_attention``, and
for fused layers, which call ``attend_packed``. Which pages they mean is decided by the runner that
is executing in this thread (``active``), so that one process may hold several engines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from opticnerve.errors import EngineFailure
from opticnerve.models.decoders.fused import register_packed

if TYPE_CHECKING:
    from llm_service.device.attention.backend import AttentionBackend

ATTENTION_NAME = "opticnerve_paged"

_LIBRARY = torch.library.Library("opticnerve", "DEF")
_LIBRARY.define("attend(Tensor query, Tensor key_value, int layer, float scale) -> Tensor")


class _Active(threading.local):
    backend: AttentionBackend | None = None


_active = _Active()


@contextmanager
def active(backend: AttentionBackend) -> Iterator[None]:
    """Layers that run in this thread attend over ``backend``'s pages."""
    before, _active.backend = _active.backend, backend
    try:
        yield
    finally:
        _active.backend = before


def _attend(query: torch.Tensor, key_value: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
    backend = _active.backend
    if backend is None:
        raise EngineFailure("a layer with paged attention ran outside of a model runner's step")
    return backend.attend(layer, query, key_value, scale)


def _attend_shape(
    query: torch.Tensor, key_value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_LIBRARY.impl("attend", _attend, "CPU")
_LIBRARY.impl("attend", _attend, "CUDA")
_LIBRARY.impl("attend", _attend_shape, "Meta")
_attend_op = torch.ops.opticnerve.attend.default


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out.

    The mask is None: what is not plain causal is the backend's to know.
    """
    if attention_mask is not None:
        raise EngineFailure("paged attention takes no mask; the model made one")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    key_value = torch.cat((key[0], value[0])).transpose(0, 1)
    rows = attend_packed(query[0].transpose(0, 1), key_value, module.layer_idx, scale)
    return rows.unsqueeze(0), None


def attend_packed(
    query: torch.Tensor, key_value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    """What fused layers call: see ``opticnerve.models.decoders.fused.PackedAttention``."""
    if torch.compiler.is_compiling():
        rows: torch.Tensor = _attend_op(query, key_value, layer, scale)
        return rows
    return _attend(query, key_value, layer, scale)  # The dispatcher costs several microseconds.


AttentionInterface.register(ATTENTION_NAME, paged_attention)
register_packed(ATTENTION_NAME, attend_packed)
