"""A decoder in fewer, larger steps: the arithmetic of Hugging Face's layers, less of Python.

On a small model, or one token at a time, a layer costs what the number of its operations costs.
Here q, k and v come from one matrix product, gate and up from another, q and k are rotated
together and each norm is one kernel: 17 operations a layer instead of about 50. In float32 the
results equal the layers' own; in half precision a norm rounds once instead of twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from opticnerve.models.linear import Linear, return_freed_memory

FUSABLE = (
    LlamaDecoderLayer,
    MistralDecoderLayer,
    Qwen2DecoderLayer,
    Qwen2VLDecoderLayer,
    Qwen2_5_VLDecoderLayer,
)

CosSin = tuple[torch.Tensor, torch.Tensor]
"""Each [tokens, 1, head_dim]."""


class FusedLayer:
    """One pre-norm layer with rotary attention and a gated SiLU feed-forward.

    Takes the weights of ``layer``, whose projections are dropped as they are joined. No
    ``nn.Module``: looking a weight up in one costs as much as a small operation.
    """

    def __init__(self, layer: Any, attention: Callable[..., Any]) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.attention = attention
        self.source = attn  # What the attention function is told: layer_idx, sliding_window.
        self.scaling: float = attn.scaling
        self.head_dim: int = attn.head_dim
        self.num_heads = attn.q_proj.out_features // attn.head_dim
        self.num_rotated = self.num_heads + attn.k_proj.out_features // attn.head_dim
        self.input_norm: torch.Tensor = layer.input_layernorm.weight
        self.post_norm: torch.Tensor = layer.post_attention_layernorm.weight
        self.eps: float = layer.input_layernorm.variance_epsilon
        self.width = tuple(self.input_norm.shape)
        self.qkv = Linear(*_join(attn.q_proj, attn.k_proj, attn.v_proj))
        self.out = Linear(attn.o_proj.weight, attn.o_proj.bias)
        del attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        self.gate_up = Linear(*_join(mlp.gate_proj, mlp.up_proj))
        self.down = Linear(mlp.down_proj.weight, mlp.down_proj.bias)
        del mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def weights(self) -> list[torch.Tensor]:
        linears = (self.qkv, self.out, self.gate_up, self.down)
        tensors = [tensor for linear in linears for tensor in linear.tensors()]
        return [self.input_norm, self.post_norm, *tensors]

    def forward(self, hidden: torch.Tensor, rotary: CosSin) -> torch.Tensor:
        """[tokens, hidden_size] -> the same."""
        normed = F.rms_norm(hidden, self.width, self.input_norm, self.eps)
        hidden = hidden + self._attend(normed, rotary)
        normed = F.rms_norm(hidden, self.width, self.post_norm, self.eps)
        gate, up = self.gate_up.forward(normed).chunk(2, dim=-1)
        return hidden.add_(self.down.forward(F.silu(gate) * up))

    def _attend(self, normed: torch.Tensor, rotary: CosSin) -> torch.Tensor:
        heads = self.qkv.forward(normed).unflatten(-1, (-1, self.head_dim))
        rotated = _rotate(heads[:, : self.num_rotated], rotary)
        mixed, _ = self.attention(
            self.source,
            rotated[:, : self.num_heads].transpose(0, 1)[None],
            rotated[:, self.num_heads :].transpose(0, 1)[None],
            heads[:, self.num_rotated :].transpose(0, 1)[None],
            None,
            scaling=self.scaling,
        )
        return self.out.forward(mixed[0].flatten(1))


class RotaryTable:
    """cos and sin of a step's positions: of each column only the dimension that it follows.

    ``rotary``: transformers' rotary embedding, of which this takes the frequencies, and learns
    by asking which of three position dimensions turns which column.
    """

    def __init__(self, rotary: Any, position_dims: int, dtype: torch.dtype) -> None:
        device = rotary.inv_freq.device
        self.dtype = dtype
        self.scaling: float = rotary.attention_scaling
        self.frequencies = torch.cat((rotary.inv_freq, rotary.inv_freq))  # [head_dim]
        self.columns: torch.Tensor | None = None
        if position_dims > 1:
            one_by_one = torch.eye(position_dims, dtype=torch.int64, device=device)
            _, sin = rotary(self.frequencies.new_zeros(1), one_by_one[:, None])
            self.columns = sin[0].abs().argmax(0)  # [head_dim]; only its own dimension turns it.

    def __call__(self, positions: torch.Tensor) -> CosSin:
        """``positions``: int64 [position_dims, tokens]."""
        picked = positions[0][:, None] if self.columns is None else positions[self.columns].T
        angles = (picked * self.frequencies)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(self.dtype), sin.to(self.dtype)


class FusedDecoder:
    """Layers and last norm of a decoder; takes the weights of ``model`` over."""

    def __init__(self, model: Any, attention: Callable[..., Any], position_dims: int) -> None:
        self.layers = [FusedLayer(layer, attention) for layer in model.layers]
        self.norm: torch.Tensor = model.norm.weight
        self.eps: float = model.norm.variance_epsilon
        self.width = tuple(self.norm.shape)
        self.rotary = RotaryTable(model.rotary_emb, position_dims, self.norm.dtype)

    def weights(self) -> list[torch.Tensor]:
        return [self.norm, *(tensor for layer in self.layers for tensor in layer.weights())]

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> torch.Tensor:
        """See ``family.Language.forward``."""
        rotary = self.rotary(positions)
        for i, layer in enumerate(self.layers):
            hidden = layer.forward(hidden, rotary)
            if i < len(deepstack):
                indices, rows = deepstack[i]
                hidden.index_add_(0, indices, rows.to(hidden.dtype))
        return F.rms_norm(hidden, self.width, self.norm, self.eps)


def fuse(model: Any, attention: str, position_dims: int) -> FusedDecoder | None:
    """``model`` fused. None, and nothing done, where a layer is of a kind whose arithmetic is not
    known here."""
    function = AttentionInterface().get(attention)
    if function is None or not all(_fusable(layer) for layer in model.layers):
        return None
    with torch.no_grad():
        fused = FusedDecoder(model, function, position_dims)
    return_freed_memory()
    return fused


def _fusable(layer: Any) -> bool:
    activation = getattr(layer.mlp, "act_fn", None)
    return type(layer) in FUSABLE and activation.__class__.__name__ in ("SiLU", "SiLUActivation")


def _rotate(heads: torch.Tensor, rotary: CosSin) -> torch.Tensor:
    """[tokens, heads, head_dim], halves rotated against each other."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _join(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and one bias that compute all of ``linears`` side by side."""
    biases = [linear.bias for linear in linears]
    joined = None if biases[0] is None else torch.cat(biases)
    return torch.cat([linear.weight for linear in linears]), joined
