"""The cache object that decoder layers are given: it keeps nothing."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _NoLayer(CacheLayerMixin):  # type: ignore[misc]
    """Satisfies transformers' cache of layers; never asked for its contents."""

    is_sliding = False

    def lazy_initialization(self, *_: Any) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return int(query_length), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class PassThroughCache(Cache):  # type: ignore[misc]
    """A transformers cache whose ``update`` returns k and v untouched.

    The attention function writes pages and attends over them; a layer only has to hand it the
    step's own keys and values.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_NoLayer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
        return 0
