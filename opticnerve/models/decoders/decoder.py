"""A transformers decoder and its head, run on packed tokens; shared by every family.

Layers that the family declares fusable are fused (``fused``). Others run as transformers' own
modules, without a mask (attention that is not plainly causal is the attention function's job) and
without a cache; rotary factors are computed once a step.

The attention function is registered by name in transformers' attention interface. Called as
``attention(module, q, k, v, None, scaling=...)`` it gets q [1, heads, tokens, head_dim] and k and v
[1, kv_heads, tokens, head_dim] of the step's tokens, rotated, as views that need not be
contiguous; it returns ([1, tokens, heads, head_dim], anything). ``module.layer_idx`` is the
layer's index, by which it finds the layer's window and soft cap in ``PackedLanguage.layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from opticnerve.models.decoders.fused import fuse
from opticnerve.models.decoders.linear import Linear, narrowed, num_bytes

if TYPE_CHECKING:
    from opticnerve.models.decoders.spec import DecoderSpec

SMALL_HEAD = 1 << 22  # Elements up to which a tied weight is kept in two forms.


class PackedLanguage:
    """Implements ``opticnerve.models.family.LanguageModel``."""

    def __init__(self, decoder: nn.Module, spec: DecoderSpec) -> None:
        """``decoder`` has a ``model`` and an ``lm_head``, loaded."""
        model: Any = decoder.model
        config = spec.config
        self.decoder = decoder
        self.spec = spec
        self.position_dims = spec.position_dims
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.layers = spec.layers
        self.num_layers = len(spec.layers)
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.layers[0].self_attn.head_dim  # Before layers are fused.
        self.dtype: torch.dtype = model.embed_tokens.weight.dtype
        self.device: torch.device = model.embed_tokens.weight.device
        self._embedding = model.embed_tokens.weight
        self._scale = float(torch.tensor(spec.embedding_scale, dtype=self.dtype))  # Rounded.
        self._model = model
        self._head = self._make_head()
        self.fused = fuse(model, config._attn_implementation, spec)

    def _make_head(self) -> Linear:
        """A head with its own weight is laid out anew, and the original dropped. A large head that
        is tied to the embedding would then be in memory twice: both keep sharing the weight as it
        is, or are both kept in 16 bits where that changes no value."""
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
        """Bytes of the weights; a tied one counts once."""
        tensors = [self._embedding]
        if self.fused is None:
            tensors += [each for each in self._model.parameters() if each is not self._embedding]
        tied = any(each is self._embedding for each in self._head.tensors())
        head = 0 if tied else self._head.num_bytes()
        layers = 0 if self.fused is None else self.fused.weight_bytes()
        return sum(map(num_bytes, tensors)) + head + layers

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [tokens] -> [tokens, hidden_size]."""
        rows = F.embedding(token_ids, self._embedding).to(self.dtype)
        return rows if self._scale == 1.0 else rows * self._scale

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``family.LanguageModel``. Run it under ``torch.inference_mode``."""
        if self.fused is not None:
            return self.fused.forward(inputs_embeds, positions, deepstack, rows)
        hidden = self._forward_layers(inputs_embeds, positions, deepstack)
        return hidden if rows is None else hidden[rows]

    def _forward_layers(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Runs transformers' own layers."""
        hidden = inputs_embeds[None]
        ids = positions[:, None] if self.position_dims == 3 else positions
        factors = {
            kind: self._model.rotary_emb(hidden, ids, *(() if kind is None else (kind,)))
            for kind in {layer.rotary for layer in self.layers}
        }
        text_ids = positions if self.position_dims == 1 else None
        for i, (layer, spec) in enumerate(zip(self._model.layers, self.layers, strict=True)):
            rotary = factors[spec.rotary]
            hidden = layer(hidden, position_embeddings=rotary, position_ids=text_ids)
            if i < len(deepstack):
                indices, added = deepstack[i]
                hidden[0].index_add_(0, indices, added.to(hidden.dtype))
        normed: torch.Tensor = self._model.norm(hidden)
        return normed[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden_size] -> fp32 [rows, vocab_size]."""
        logits = self._head.forward(hidden).float()
        cap = self.spec.logit_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap
