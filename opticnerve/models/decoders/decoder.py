"""A transformers decoder and its head, run on packed tokens; shared by every family.

The layers are Hugging Face's, called one after the other with what they need and nothing else:
no mask is ever built (they get None; what is not plain causal is the attention function's job)
and rotary tables are computed once a step. Layers of known kinds are fused (``fused``); others
run as they are. ``attention`` names a function in transformers' attention interface. Called as
``attention(module, q, k, v, None, scaling=...)`` it gets q [1, heads, tokens, head_dim], k and v
[1, kv_heads, tokens, head_dim] of the step's tokens, rotated, as views that need not be
contiguous; it returns ([1, tokens, heads, head_dim], anything). ``module.layer_idx`` tells the
layer. Fused layers do not touch the cache object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from opticnerve.checkpoints.loader import load_module, resolve_device, resolve_dtype, rotary_buffers
from opticnerve.errors import CheckpointError, ConfigError, UnsupportedCheckpoint
from opticnerve.models.decoders.fused import fuse
from opticnerve.models.decoders.linear import Linear, narrowed, num_bytes

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

KEY_MAP = (
    (r"(?:language_model\.)?lm_head\.", "lm_head."),
    (r"model\.language_model\.", "model."),
    (r"language_model\.model\.", "model."),
    (r"model\.(?!visual\.|vision_tower\.|multi_modal_projector\.)", "model."),
)
"""Old Qwen: ``model.*``, ``lm_head.*``; old LLaVA: ``language_model.model.*`` and
``language_model.lm_head.*``; since transformers 5 ``model.language_model.*``, ``lm_head.*``."""

IGNORED = (r".*\.rotary_emb\.inv_freq$",)  # Computed; some old checkpoints carry it.
SMALL_HEAD = 1 << 22  # Elements that may be kept twice.
BATCH_ROPE_TYPES = ("dynamic", "longrope")  # Their frequencies depend on the whole packed batch.


class Decoder(nn.Module):  # type: ignore[misc]
    """The language half as one module: ``model`` and ``lm_head``."""

    def __init__(self, model_class: Any, config: Any) -> None:
        super().__init__()
        self.model = model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class PackedLanguage:
    """Implements ``opticnerve.models.family.Language``."""

    def __init__(self, decoder: nn.Module, config: Any, position_dims: int) -> None:
        model: Any = decoder.model
        self.decoder = decoder
        self.config = config
        self.position_dims = position_dims
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.layers[0].self_attn.head_dim  # Before layers are fused.
        self.dtype: torch.dtype = model.embed_tokens.weight.dtype
        self.device: torch.device = model.embed_tokens.weight.device
        self._embedding = model.embed_tokens.weight
        self._model = model
        self._head = self._make_head()
        self.fused = fuse(model, config._attn_implementation, position_dims)

    def _make_head(self) -> Linear:
        """A head of its own is kept in one form alone. A large one that is the embedding, too,
        would be in memory twice: both are kept in 16 bits where that loses nothing, or once."""
        weight = self.decoder.lm_head.weight
        tied = weight is self._embedding
        head = Linear(weight, pack=not tied or weight.numel() <= SMALL_HEAD)
        if head.in_halves:
            self._embedding = narrowed(self._embedding)
            del self._model.embed_tokens
        if head.in_halves or not tied:
            del self.decoder.lm_head
        return head

    def weight_bytes(self) -> int:
        """What the weights take in memory, shared ones once."""
        tensors = [self._embedding]
        if self.fused is None:
            tensors += [each for each in self._model.parameters() if each is not self._embedding]
        tied = any(each is self._embedding for each in self._head.tensors())
        head = 0 if tied else self._head.num_bytes()
        layers = 0 if self.fused is None else self.fused.weight_bytes()
        return sum(map(num_bytes, tensors)) + head + layers

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] -> [tokens, hidden_size]."""
        return F.embedding(token_ids, self._embedding).to(self.dtype)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``family.Language``. Run it under ``torch.inference_mode``."""
        if self.fused is not None:
            return self.fused.forward(inputs_embeds, positions, deepstack, rows)
        hidden = self._forward_layers(inputs_embeds, positions, cache, deepstack)
        return hidden if rows is None else hidden[rows]

    def _forward_layers(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """The same through the layers as transformers has them."""
        hidden = inputs_embeds[None]
        ids = positions[:, None] if self.position_dims == 3 else positions
        rotary = self._model.rotary_emb(hidden, ids)
        for i, layer in enumerate(self._model.layers):
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache)
            if i < len(deepstack):
                indices, added = deepstack[i]
                hidden[0].index_add_(0, indices, added.to(hidden.dtype))
        normed: torch.Tensor = self._model.norm(hidden)
        return normed[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden_size] -> fp32 [rows, vocab_size]."""
        return self._head.forward(hidden).float()


def load_decoder(
    checkpoint: Checkpoint,
    model_class: Any,
    config: Any,
    *,
    tied: bool,
    dtype: str | torch.dtype,
    device: str | torch.device,
    attention: str,
    position_dims: int,
) -> PackedLanguage:
    """The language half of ``checkpoint``. Raises CheckpointError, see ``loader.load_module``."""
    _check_supported(checkpoint, config)
    if attention != "eager" and attention not in AttentionInterface():
        raise ConfigError(f"no attention function is registered as {attention!r}")
    module = load_module(
        lambda: Decoder(model_class, config),
        checkpoint,
        KEY_MAP,
        dtype=resolve_dtype(dtype, checkpoint, resolve_device(device)),
        device=resolve_device(device),
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        recomputed=rotary_buffers("model.rotary_emb"),
        ignored=IGNORED,
    )
    config._attn_implementation = attention  # Once built: see varlen.use.
    return PackedLanguage(module, config, position_dims)


def _check_supported(checkpoint: Checkpoint, config: Any) -> None:
    """Raises for settings under which packed tokens would not compute what the model means."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") in BATCH_ROPE_TYPES:
        raise CheckpointError(
            f"{checkpoint.path} has rotary embeddings of type {rope['rope_type']!r}, whose "
            "frequencies depend on every sequence of a batch; it is not supported. Take the "
            "scaling out of rope_scaling to serve the model at its original length"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    mistral = getattr(config, "model_type", "") == "mistral" and config.sliding_window is not None
    if "sliding_attention" in kinds or mistral:
        raise UnsupportedCheckpoint(
            f"{checkpoint.path} has layers with sliding-window attention, which are not supported; "
            "set use_sliding_window to false in config.json if the window is longer than you need"
        )
