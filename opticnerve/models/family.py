"""What a model family is: one declaration, and the interfaces of its parts.

A family is a folder of ``opticnerve/models`` whose ``__init__.py`` declares ``FAMILY``, a
``Family``. ``opticnerve.models.registry`` finds it there by the ``model_type`` of a checkpoint's
config.json: a new family adds a folder, and edits no other file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opticnerve.media.plan import Modality, Overrides, Plan, Span, Structure

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from opticnerve.models.decoders.spec import LayerSpec

KeyMap = Sequence[tuple[str, str]]
"""Ordered (regular expression, replacement) pairs that rename a checkpoint's keys to the module's.
The first pair that matches the start of a key applies; a key that no pair matches belongs to the
other half."""


def wanted(key_map: KeyMap, ignored: Sequence[str] = ()) -> Callable[[str], bool]:
    """A predicate over checkpoint keys: whether ``key_map`` renames the key, and no pattern of
    ``ignored`` matches it."""
    renamed = [re.compile(pattern) for pattern, _ in key_map]
    unused = [re.compile(pattern) for pattern in ignored]

    def is_wanted(key: str) -> bool:
        return any(p.match(key) for p in renamed) and not any(p.match(key) for p in unused)

    return is_wanted


def module_name(key_map: KeyMap, key: str) -> str:
    """The module's name for a checkpoint's ``key``. Raises KeyError if no pattern matches its
    start."""
    for pattern, replacement in key_map:
        match = re.match(pattern, key)
        if match:
            return match.expand(replacement) + key[match.end() :]
    raise KeyError(key)


@dataclass(frozen=True, slots=True)
class Family:
    """One family's declaration.

    A part is named "module:attribute", the module relative to ``package`` where it begins with a
    dot. Parts are imported when they are needed: declarations, layouts and preprocessing without
    torch, towers in encoders, decoders in LLM workers.
    """

    package: str  # The declaring package: its __name__.
    title: str  # For messages and documents: "Qwen2-VL".
    # model_types of config.json: "llava", or "llava/pixtral" where the vision_config's model_type
    # decides between families. The longer form takes precedence.
    model_types: tuple[str, ...]
    layout: str  # (Checkpoint) -> Layout
    preprocess: str  # (Layout) -> Preprocessor
    tower: str  # (Checkpoint) -> TowerSpec, see ``towers.tower``.
    decoder: str  # (Checkpoint) -> DecoderSpec, see ``decoders.spec``.
    vision_keys: KeyMap  # Tower and projector.
    language_keys: KeyMap  # Decoder and head: ``model.*`` and ``lm_head.*`` of the module.
    # (Tower) -> TowerGraph, see ``towers.graph``. "": the tower cannot be exported.
    graph: str = ""
    # (model_type, reason) of related checkpoints that are refused. The reason completes "this
    # checkpoint ...", and says what to use instead.
    unserved: Sequence[tuple[str, str]] = ()

    @property
    def name(self) -> str:
        """The folder's name, which is part of content keys."""
        return self.package.rpartition(".")[2]

    def load_part(self, part: str) -> Any:
        """Imports ``part``, one of the strings above, and returns what it names."""
        module, _, attribute = part.partition(":")
        return getattr(import_module(module, self.package), attribute)


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive placeholders of one expansion that consecutive rows of the item overwrite."""

    offset: int  # Index in Expansion.token_ids.
    num_tokens: int
    row_start: int


@dataclass(frozen=True, slots=True)
class Expansion:
    """What replaces the one placeholder token that the chat template wrote for an item.

    ``token_ids`` may hold other tokens than placeholders (row breaks); ``runs`` are
    the placeholders among them.
    """

    token_ids: tuple[int, ...]
    runs: tuple[RowRun, ...]

    @classmethod
    def of_rows(cls, placeholder: int, count: int) -> Expansion:
        """``count`` placeholders and nothing else."""
        return cls((placeholder,) * count, (RowRun(0, count, 0),))


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How a processor changes a template's text before it tokenizes it. Ids cannot be inserted
    afterwards, since the added text may form one token with its neighbours. Tokens are named as in
    ``Layout.placeholder_ids``."""

    written: str  # What templates write for a picture: "boi_token".
    text: str  # What replaces it, with the placeholder in it: "\n\n{boi_token}{image_token}".


class Layout(Protocol):
    """Sizing, placeholders and positions of one checkpoint. Holds no tensors, decodes nothing."""

    family: str  # The family's name.
    # The placeholder that the chat template writes for an item, by modality.
    item_token_ids: Mapping[Modality, int]
    # The tokens that stand for media, and the special tokens that ``expand`` or ``rewrite`` puts
    # around them, by their names in processors ("image_token"). No text of a user may become one.
    # The tokenizer has their spelling.
    placeholder_ids: Mapping[str, int]
    rewrite: Rewrite | None  # None: templates write the placeholder, and the text stays as it is.
    hidden_size: int  # Columns of an embedding: the language model's width.
    deepstack_levels: int  # "deepstack.<i>" tensors that an embedding has beside its rows.
    max_positions: int  # max_position_embeddings of the language model.
    position_dims: int  # 1, or 3 for (t, h, w) positions.

    def plan(self, structure: Structure, overrides: Overrides = ...) -> Plan:
        """Sizes a picture. Raises InvalidMedia for one that the family cannot take."""
        ...

    def expand(self, plan: Plan) -> Expansion:
        """The tokens of an item: ``plan.num_tokens`` placeholders among them."""
        ...

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        """Positions of a prompt, int64 [position_dims, num_tokens], and the delta of its output.

        Token ``i >= num_tokens`` (output) has position ``i + delta`` in every dimension. Raises
        InvalidRequest for spans that do not fit the prompt.
        """
        ...

    def settings(self) -> Mapping[str, Any]:
        """The processor settings that decide an item's pixels; hashed into content keys.

        The gateway also reads ``max_pixels``, the largest size of a picture unless a request sets
        another, and ``several_pictures``, which only models have that plan pictures differently in
        a prompt with more than one (``media.plan.planned_as_several``).
        """
        ...


class Preprocessor(Protocol):
    """Turns one decoded picture into the tower's input, with numpy and Pillow only.

    It runs in the encoder's CPU pool, several at once, and is pickled for processes that decode.
    """

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        """``image``: RGB, already oriented, of the plan's displayed size.

        Returns contiguous 8-bit pixels, red first: uint8 [num_patches, patch, patch, 3] in the
        tower's order of patches (of a video, [num_patches, frames, patch, patch, 3]), or [tiles,
        height, width, 3] for a tower of whole squares. The tower rescales and normalises them, see
        ``towers.pixels``.
        """
        ...


class Tower(Protocol):
    """Vision tower and projector on a device."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """Encodes a batch in one forward pass. ``pixels``: what the preprocessor returned for each
        item. Raises PlanMismatch if their shape is not the plan's.

        Returns for each item its named tensors, each [num_tokens, hidden_size] in ``dtype`` on
        ``device``: "rows", and "deepstack.<i>" where the family has such levels. On a CPU each
        tensor has its own memory; on other devices they may be views of the batch's.
        """
        ...


class LanguageModel(Protocol):
    """Language model and head, run on packed tokens through a registered attention function."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    layers: tuple[LayerSpec, ...]  # What the attention function must know of each layer.
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
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]] = ...,
        rows: torch.Tensor | None = ...,
    ) -> torch.Tensor:
        """One packed step.

        ``inputs_embeds`` [tokens, hidden_size]; ``positions`` int64 [position_dims, tokens]. The
        attention function owns keys and values: it writes them to KV blocks and attends to them
        (``decoders.decoder`` says how it is called). ``deepstack``: for layer i, (indices [m], rows
        [m, hidden_size]) added after that layer. ``rows``: int64 [n], the tokens whose hidden
        states are wanted; None: all. Returns the last hidden states [n, hidden_size], normalised.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden_size] -> fp32 [rows, vocab_size]."""
        ...
