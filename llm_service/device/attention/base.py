"""The interface of an attention backend, which owns the KV blocks and attends over them.

A step packs its tokens in this order: the D decoding sequences, one token each, longest sequence
first, then the chunks of the others, back to back. The runner describes the step once
(``AttentionStep``), the backend turns that into tensors of its device (``prepare``), and every
layer then calls ``attend``, which writes the step's keys and values into blocks and attends over
them.

A model's layers reach the backend by the name ``ATTENTION_NAME``: transformers' layers call
``paged_attention``, fused layers ``attend_packed``. Both use the backend that the runner has made
``active`` in this thread, so that one process may hold several engines.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface

from opticnerve.errors import EngineFailure
from opticnerve.models.decoders.fused import register_packed

if TYPE_CHECKING:
    from opticnerve.models.decoders.spec import LayerSpec

ATTENTION_NAME = "opticnerve_paged"


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Dimensions of a KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # Tokens per block.

    def bytes_per_block(self, element_size: int) -> int:
        """Bytes of one block, over all layers, keys and values."""
        per_token = 2 * self.num_kv_heads * self.head_dim * element_size
        return self.num_layers * self.block_size * per_token


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that a step computes together."""

    first_index: int  # Index of the first one among the step's packed tokens.
    num_tokens: int
    start: int  # Tokens of the sequence that are in blocks already.
    blocks: NDArray[np.int64]  # Blocks of tokens [0, start + num_tokens).
    # Ranges [begin, end) of the chunk whose tokens attend to one another in both directions.
    bidirectional: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """One step's attention, in host memory. T packed tokens, D of them decoding."""

    token_slots: NDArray[np.int64]  # [T]: block * block_size + offset that each is written to.
    decode_blocks: NDArray[np.int64]  # [D, most blocks of a sequence], padded with valid blocks.
    # [D], longest first: tokens attended over, the new one included.
    decode_lengths: NDArray[np.int64]
    chunks: tuple[Chunk, ...] = ()


class AttentionBackend(ABC):
    """The KV blocks of every layer, and attention over them.

    One step at a time: ``prepare``, then ``attend`` once per layer, in any thread.
    """

    name: ClassVar[str]
    block_sizes: ClassVar[tuple[int, ...]]  # Supported tokens per block, preferred first.

    @abstractmethod
    def allocate(
        self,
        shape: BlockShape,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[LayerSpec] = (),
    ) -> None:
        """Allocates ``num_blocks`` zeroed blocks for each layer.

        ``layers``: the window and the soft cap of each layer; empty: plain attention in all.
        A layer with a window has as many blocks as the others: all of a sequence's are kept, so
        that one block table and one prefix cache serve every layer.
        """

    @abstractmethod
    def prepare(self, step: AttentionStep) -> None:
        """Copies the description of the next forward pass to the device."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key_value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """``query`` [T, heads, head_dim], ``key_value`` [T, 2 * kv_heads, head_dim]: the keys of
        every head, then the values. Only their last dimension needs to be contiguous.

        Writes keys and values into the layer's blocks and returns [T, heads, head_dim].
        """

    @abstractmethod
    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copies whole blocks (source, destination) of every layer."""

    @abstractmethod
    def scrub(self, blocks: tuple[int, ...]) -> None:
        """Replaces values that are not finite by zeros in these blocks.

        Blocks are reused without being cleared, and attention multiplies values beyond a sequence's
        end by zero: a NaN there would spread to the next sequence.
        """

    @abstractmethod
    def free(self) -> None:
        """Frees the blocks."""


# ---- from a model's layers to the backend

_LIBRARY = torch.library.Library("opticnerve", "DEF")
_LIBRARY.define("attend(Tensor query, Tensor key_value, int layer, float scale) -> Tensor")


class _Active(threading.local):
    backend: AttentionBackend | None = None


_active = _Active()


@contextmanager
def active(backend: AttentionBackend) -> Iterator[None]:
    """While the context lasts, layers that run in this thread attend over ``backend``'s blocks."""
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
    """The attention function for transformers: [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    The mask has to be None: the backend knows which spans are bidirectional, and the window and the
    soft cap of each layer.
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
    """The attention function for fused layers; see
    ``opticnerve.models.decoders.fused.PackedAttention``."""
    if torch.compiler.is_compiling():
        rows: torch.Tensor = _attend_op(query, key_value, layer, scale)
        return rows
    return _attend(query, key_value, layer, scale)  # Saves the dispatcher's several microseconds.


AttentionInterface.register(ATTENTION_NAME, paged_attention)
register_packed(ATTENTION_NAME, attend_packed)
