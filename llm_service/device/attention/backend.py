"""What an attention backend is: it owns pages of keys and values, and attends over them.

A step packs its tokens in this order: the D decoding sequences, one token each, longest sequence
first, then the chunks of the others, back to back. The runner describes the step once
(``AttentionStep``), the backend turns that into tensors of its device (``prepare``), and every
layer then calls ``attend``, which writes the step's keys and values into pages and attends over
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PageShape:
    """What one KV cache holds, for every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # Tokens a page.

    def bytes_per_block(self, element_size: int) -> int:
        """Bytes of one page, over all layers, keys and values."""
        per_token = 2 * self.num_kv_heads * self.head_dim * element_size
        return self.num_layers * self.block_size * per_token


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, of which more than one is computed or none is cached."""

    row: int  # First packed token.
    num_tokens: int
    start: int  # Tokens of the sequence that are in pages already.
    pages: NDArray[np.int64]  # Pages of tokens [0, start + num_tokens).
    # Ranges [begin, end) of the chunk whose tokens see one another both ways.
    bidirectional: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """One step's attention, on the host. T packed tokens, D of them decoding."""

    token_slots: NDArray[np.int64]  # [T]: page * block_size + offset that each token is written to.
    decode_pages: NDArray[np.int64]  # [D, most pages of one of them], padded with any valid page.
    # [D], never rising: tokens attended over, the new one included.
    decode_lengths: NDArray[np.int64]
    chunks: tuple[Chunk, ...] = ()


class AttentionBackend(ABC):
    """Pages of every layer, and the arithmetic over them.

    One step at a time: ``prepare``, then ``attend`` once a layer, in any thread.
    """

    name: ClassVar[str]
    page_sizes: ClassVar[tuple[int, ...]]  # Tokens a page that it can use, preferred first.

    @abstractmethod
    def allocate(
        self, shape: PageShape, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Makes ``num_blocks`` zeroed pages a layer."""

    @abstractmethod
    def prepare(self, step: AttentionStep) -> None:
        """Takes the description of the next forward pass to the device."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key_value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """``query`` [T, heads, head_dim], ``key_value`` [T, 2 * kv_heads, head_dim]: the keys of
        every head, then the values. Neither needs to be contiguous, but for its last dimension.

        Writes keys and values into the layer's pages and returns [T, heads, head_dim].
        """

    @abstractmethod
    def copy_pages(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copies whole pages (source, destination) of every layer."""

    @abstractmethod
    def scrub(self, pages: tuple[int, ...]) -> None:
        """Replaces what is not finite in these pages by zeros.

        A page is reused without being cleared, and attention multiplies what lies beyond a
        sequence's end by zero: one NaN there would spread to whoever gets the page next.
        """

    @abstractmethod
    def free(self) -> None:
        """Gives the pages back."""
