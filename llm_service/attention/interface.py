"""The bridge from transformers' attention interface to a backend: one custom op a layer.

``ATTENTION_NAME`` is registered with transformers; a model loaded with it calls
``paged_attention`` in every layer. Which pages it means is decided by the runner that is
executing in this thread (``active``), so that one process may hold several engines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from opticnerve.errors import EngineFailure

if TYPE_CHECKING:
    from llm_service.attention.backend import AttentionBackend

ATTENTION_NAME = "opticnerve_paged"

_LIBRARY = torch.library.Library("opticnerve", "DEF")
_LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, int layer, float scale) -> Tensor")


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


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
) -> torch.Tensor:
    backend = _active.backend
    if backend is None:
        raise EngineFailure("a layer with paged attention ran outside of a model runner's step")
    return backend.attend(layer, query, key, value, scale)


def _attend_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
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
    rows = _attend_op(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        module.layer_idx,
        scale,
    )
    return rows.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
