"""A decoder's declaration by its family, and its loading.

The declaration says what differs between decoders of this kind, layer by layer where layers
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface

from opticnerve.checkpoints.json_files import positive
from opticnerve.checkpoints.loader import Recompute, check_module, load_module, rotary_buffers
from opticnerve.errors import CheckpointError, ConfigError, UnsupportedCheckpoint
from opticnerve.models.decoders.decoder import PackedLanguage
from opticnerve.models.decoders.fused import PRE_NORM, LayerForm, check_form

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.checkpoints.sizes import HalfSize
    from opticnerve.models.family import KeyMap

ROTARY = "rotary_emb"
IGNORED = (rf".*\.{ROTARY}\.inv_freq$",)  # Computed; some old checkpoints carry it.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
BATCH_ROPE_TYPES = ("dynamic", "longrope")  # Their frequencies depend on the whole packed batch.


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's attention. Its scale is the transformers layer's own."""

    window: int | None = None  # Tokens that a token attends to, itself included; None: all.
    # Which table, where the rotary embedding has several, by transformers' name:
    # "sliding_attention". None: it has one.
    rotary: str | None = None
    soft_cap: float | None = None  # Of attention scores.


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A transformers decoder and its head. ``load`` makes it a ``family.LanguageModel``."""

    model_class: Any  # The decoder without its head; made from ``config``.
    config: Any  # transformers' configuration of the text model.
    tied: bool  # Whether a checkpoint without a head uses the embedding as head.
    position_dims: int
    layers: tuple[LayerSpec, ...]
    fusable: bool  # Whether every layer computes what ``fused.FusedLayer`` does.
    form: LayerForm = PRE_NORM  # Of fusable layers.
    embedding_scale: float = 1.0  # Of tokens' input embeddings, not of an item's rows.
    logit_soft_cap: float | None = None
    # Factors of queries: positions [tokens] -> float32 [tokens]. They are part of the rotary
    # factors, so all columns of a head must be rotated.
    query_scale: Callable[[torch.Tensor], torch.Tensor] | None = None
    recomputed: Mapping[str, Recompute] = field(default_factory=dict)  # As in ``load_module``.
    ignored: tuple[str, ...] = IGNORED  # As in ``load_module``.

    def load(
        self,
        checkpoint: Checkpoint,
        keys: KeyMap,
        dtype: str | torch.dtype,
        device: str | torch.device,
        attention: str,
    ) -> PackedLanguage:
        """The language half of ``checkpoint``, whose keys ``keys`` renames. Raises CheckpointError,
        see ``loader.load_module``, and ConfigError for an unknown ``attention``."""
        self.check_supported(checkpoint)
        if attention != "eager" and attention not in AttentionInterface():
            raise ConfigError(f"no attention function is registered as {attention!r}")
        module = load_module(
            self._make_module,
            checkpoint,
            keys,
            dtype=dtype,
            device=device,
            tied=self._tied_weights(),
            recomputed={
                **rotary_buffers(f"model.{ROTARY}", {layer.rotary for layer in self.layers}),
                **self.recomputed,
            },
            ignored=self.ignored,
        )
        self.config._attn_implementation = attention  # Once built: see varlen.use.
        return PackedLanguage(module, self)

    def check(self, checkpoint: Checkpoint, keys: KeyMap) -> HalfSize:
        """The size of what ``load`` would load. Raises its errors; see ``loader.check_module``."""
        self.check_supported(checkpoint)
        return check_module(
            self._make_module, checkpoint, keys, tied=self._tied_weights(), ignored=self.ignored
        )

    def _make_module(self) -> Decoder:
        decoder = Decoder(self.model_class, self.config)
        if self.fusable:
            check_form(decoder.model, self.form)
        return decoder

    def _tied_weights(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.tied else {}

    def check_supported(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for a configuration that would be computed wrongly."""
        self._check_experts(checkpoint.text_config)
        for kind in {layer.rotary for layer in self.layers}:
            rope = self.config.rope_parameters or {}
            rope = rope if kind is None else rope.get(kind) or {}
            if rope.get("rope_type") in BATCH_ROPE_TYPES:
                raise CheckpointError(
                    f"{checkpoint.path} has rotary embeddings of type {rope['rope_type']!r}, whose "
                    "frequencies depend on every sequence of a batch; it is not supported. Take "
                    "the scaling out of rope_scaling to serve the model at its original length"
                )

    def _check_experts(self, text: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a mixture of no experts, or of fewer than a token asks for."""
        for name in (*EXPERT_COUNTS, "num_experts_per_tok"):
            if text.get(name) is not None:
                positive(text, name)
        counts = (getattr(self.config, name, None) for name in EXPERT_COUNTS)
        experts = next((count for count in counts if count is not None), None)
        asked = getattr(self.config, "num_experts_per_tok", None)
        if experts is not None and asked is not None and asked > experts:
            raise CheckpointError(
                f"every token asks {asked} experts (num_experts_per_tok) of {experts}; fetch "
                "config.json again"
            )


class Decoder(nn.Module):  # type: ignore[misc]
    """The language half as one module: ``model`` and ``lm_head``."""

    def __init__(self, model_class: Any, config: Any) -> None:
        super().__init__()
        self.model = model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def llama_like(config: Any, model_class: Any, position_dims: int) -> DecoderSpec:
    """A decoder of pre-norm layers with rotary attention and a gated feed-forward.

    ``config``: transformers' configuration of the whole model; ``model_class``: its text model.
    """
    text = config.text_config
    return DecoderSpec(
        model_class,
        text,
        tied=config.tie_word_embeddings,
        position_dims=position_dims,
        layers=tuple(map(LayerSpec, layer_windows(text))),
        fusable=True,
    )


def layer_windows(text: Any) -> list[int | None]:
    """The window of each layer of a text model. Raises CheckpointError for a window of no tokens,
    and UnsupportedCheckpoint for layers that attend otherwise."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:  # A window is every layer's, as in Mistral.
        whole = _window(text) if text.model_type in ("mistral", "ministral3") else None
        return [whole] * text.num_hidden_layers
    served = ("full_attention", "sliding_attention")
    unknown = sorted(set(kinds).difference(served))
    if unknown:
        raise UnsupportedCheckpoint(
            f"the language model ({text.model_type}) has layers of {', '.join(unknown)}; "
            f"{' and '.join(served)} are supported"
        )
    window = _window(text) if "sliding_attention" in kinds else None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _window(text: Any) -> int | None:
    if text.sliding_window is None:
        return None
    return positive({"sliding_window": text.sliding_window}, "sliding_window")
