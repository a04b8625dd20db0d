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
"""Ordered (regular expression, replacement) pairs. The first that matches the start of a
checkpoint's key renames it to the module's; a key that none matches belongs to the other half."""


def wanted(key_map: KeyMap, ignored: Sequence[str] = ()) -> Callable[[str], bool]:
    """Whether a checkpoint's key belongs to the half that ``key_map`` describes, and is used."""
    renamed = [re.compile(pattern) for pattern, _ in key_map]
    unused = [re.compile(pattern) for pattern in ignored]

    def is_wanted(key: str) -> bool:
        return any(p.match(key) for p in renamed) and not any(p.match(key) for p in unused)

    return is_wanted


def module_name(key_map: KeyMap, key: str) -> str:
    """The module's name of a checkpoint's ``key``, by the first pattern that matches its start.
    Raises KeyError."""
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
    title: str  # As its users call it: "Qwen2-VL".
    # Of config.json: "llava", or "llava/pixtral" where the model_type of its vision_config decides
    # between families. The longer one goes before the other.
    model_types: tuple[str, ...]
    layout: str  # (Checkpoint) -> Layout
    preprocess: str  # (Layout) -> Preprocessor
    tower: str  # (Checkpoint) -> TowerSpec, see ``towers.tower``.
    decoder: str  # (Checkpoint) -> DecoderSpec, see ``decoders.spec``.
    vision_keys: KeyMap  # Tower and projector.
    language_keys: KeyMap  # Decoder and head: ``model.*`` and ``lm_head.*`` of the module.
    # (Tower) -> TowerGraph, see ``towers.graph``. "": the tower cannot be exported.
    graph: str = ""
    # Other model_types of these models, which are refused, each with the rest of "this checkpoint
    # ...": why, and what to use instead.
    unserved: Sequence[tuple[str, str]] = ()

    @property
    def name(self) -> str:
        """The folder's name, which is part of content keys."""
        return self.package.rpartition(".")[2]

    def load_part(self, part: str) -> Any:
        """What ``part``, one of the strings above, names."""
        module, _, attribute = part.partition(":")
        return getattr(import_module(module, self.package), attribute)


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive placeholders of one expansion that consecutive rows of the item overwrite."""

    offset: int  # In Expansion.token_ids.
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
    """How processors change a template's text before they tokenize it: what they add may form one
    token with its neighbours. Tokens go by their names in ``Layout.placeholder_ids``."""

    written: str  # What templates write for a picture: "boi_token".
    text: str  # What replaces it, with the placeholder in it: "\n\n{boi_token}{image_token}".


class Layout(Protocol):
    """Sizing, placeholders and positions of one checkpoint. Holds no tensors, decodes nothing."""

    family: str  # The family's name.
    # The placeholder that the chat template writes for an item, by modality.
    item_token_ids: Mapping[Modality, int]
    # Every token that stands for media, and every special one that ``expand`` or ``rewrite`` puts
    # around them, by its name in processors ("image_token"). No text may become one. Their spelling
    # is the tokenizer's.
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

        The gateway also reads ``max_pixels``, the most that a picture has unless a request says
        otherwise, and ``several_pictures``, how pictures are planned in a prompt that has more
        than one, where that differs (``media.plan.planned_as_several``).
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
        """Encodes a batch in one forward pass. ``pixels``: what the preprocessor returned for
        each item. Raises PlanMismatch where they are not those that the plan has.

        Returns for each item its named tensors, each [num_tokens, hidden_size] in ``dtype`` on
        ``device``: "rows", and "deepstack.<i>" where the family has such levels. On a CPU each has
        memory of its own; on another device several may share the batch's.
        """
        ...


class LanguageModel(Protocol):
    """Language model and head, run on packed tokens through a registered attention function."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    layers: tuple[LayerSpec, ...]  # What the attention function must know of each.
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

        ``inputs_embeds`` [tokens, hidden_size]; ``positions`` int64 [position_dims, tokens].
        Keys and values are the attention function's: it writes them to blocks and attends (see
        ``decoders.decoder`` for how it is called). ``deepstack``: for layer i, (indices [m], rows
        [m, hidden_size]) added after that layer. ``rows``: int64 [n], the tokens whose hidden
        states are wanted; None: all. Returns the last hidden states [n, hidden_size], normalised.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden_size] -> fp32 [rows, vocab_size]."""
        ...
