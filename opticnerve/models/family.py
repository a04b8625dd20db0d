"""The interface that a model family implements, and nothing else.

A family is a folder ``opticnerve/models/<family>/`` with three files:

* ``layout.py``: sizing, placeholders and positions. numpy only; the gateway imports it.
* ``vision.py``: the tower and projector, on torch. The encoder imports it.
* ``language.py``: the language model and its head, on torch. The LLM service imports it.

``opticnerve.models.registry`` finds a family by the ``model_type`` of ``config.json``. A new
family adds a folder and one registry entry; no service changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opticnerve.media.plan import Overrides, Plan, Span, Structure

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from opticnerve.checkpoints.checkpoint import Checkpoint

KeyMap = Sequence[tuple[str, str]]
"""Ordered (regular expression, replacement) pairs; the first that matches at the start renames
a checkpoint's key to a module's. A key that no pattern matches is not of this side."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive placeholders of one expansion that take consecutive rows."""

    offset: int  # In Expansion.token_ids.
    num_tokens: int
    row_start: int


@dataclass(frozen=True, slots=True)
class Expansion:
    """What replaces the one placeholder token that the chat template wrote for an item.

    ``token_ids`` may hold other tokens than placeholders (row breaks, tile markers); ``runs``
    says which of them are overwritten by rows.
    """

    token_ids: tuple[int, ...]
    runs: tuple[Run, ...]


class Layout(Protocol):
    """Sizing, placeholders and positions of one checkpoint. Holds no tensors, decodes nothing."""

    family: str
    image_token_id: int  # Of the one that the chat template writes for a picture.
    # Every token that stands for media, by the name that processors have for it ("image_token"):
    # text may not become one. How they are spelled, the tokenizer knows.
    placeholder_ids: Mapping[str, int]
    hidden_size: int  # Columns of an embedding: the language model's width.
    deepstack_levels: int  # "deepstack.<i>" tensors that an embedding has beside its rows.
    max_positions: int  # max_position_embeddings of the language model.
    position_dims: int  # 1, or 3 for (t, h, w) positions.

    def plan(self, structure: Structure, overrides: Overrides = ...) -> Plan:
        """Sizes a picture. Raises InvalidMedia for one that the family cannot take."""
        ...

    def expand(self, plan: Plan) -> Expansion: ...

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        """Positions of a prompt: int64 [position_dims, num_tokens], and the delta of what follows.

        Token ``i >= num_tokens`` (output) has position ``i + delta`` in every dimension.
        """
        ...

    def settings(self) -> Mapping[str, Any]:
        """The processor settings that decide an item's pixels; hashed into content keys."""
        ...


class Preprocessor(Protocol):
    """Turns one decoded picture into the tower's input. numpy and Pillow only: it runs in the
    encoder's CPU pool, several at once, outside the event loop."""

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.float32]:
        """``image``: RGB, already oriented, of the plan's displayed size.

        Returns float32 [num_patches, patch_dim] (or [tiles, 3, H, W] where the family says so).
        """
        ...


class Tower(Protocol):
    """Vision tower and projector on a device."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    preprocess: Preprocessor

    def encode(
        self, pixels: Sequence[NDArray[np.float32]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """Encodes a batch in one forward pass.

        Returns for each item its named tensors, each [num_tokens, hidden_size] in ``dtype`` on
        ``device``: "rows", and "deepstack.<i>" where the family has such levels.
        """
        ...


class Language(Protocol):
    """Language model and head, run on packed tokens through a registered attention function."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] -> [tokens, hidden_size]."""
        ...

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]] = ...,
        rows: torch.Tensor | None = ...,
    ) -> torch.Tensor:
        """One packed step.

        ``inputs_embeds`` [tokens, hidden_size]; ``positions`` int64 [position_dims, tokens];
        ``cache`` (see ``passthrough``) is handed to layers that run as transformers has them and
        returns k and v untouched; fused layers need none. The attention function that the model
        was loaded with (see ``decoder`` for how it is called) writes pages and attends.
        ``deepstack``: for layer i, (indices [m], rows [m, hidden_size]) added after that layer.
        ``rows``: int64 [n], the tokens whose hidden states are wanted; None: all. Returns the last
        hidden states [n, hidden_size], normalised.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden_size] -> fp32 [rows, vocab_size]."""
        ...


class FamilyModule(Protocol):
    """What the registry finds by name in the three files."""

    def make_layout(self, checkpoint: Checkpoint) -> Layout: ...  # layout.py

    def load_tower(self, checkpoint: Checkpoint, dtype: Any, device: Any) -> Tower: ...  # vision.py

    def load_language(
        self, checkpoint: Checkpoint, dtype: Any, device: Any, attention: str
    ) -> Language: ...  # language.py
