"""A decoder in fewer, larger operations: the arithmetic of Hugging Face's layers, less Python.

On a small model, or for one token, the time of a layer grows with the number of its operations.
Here q, k and v come from one matrix product, gate and up from another, and q and k are rotated
together, in place and as complex numbers: about 12 operations a layer instead of 50. In float32 the
results equal those of transformers' layers; in half precision norms and rotations round only once.

A rotation acts on pairs of columns of a head. Where a pair's columns are not neighbours, the rows
of the q and k weights are reordered at load so that they are. Attention scores are sums over
columns, so they do not change.

Other differences between layers are declared (``LayerForm``) or read off the layer itself: norms of
q and k, biases, the activation, how many columns are rotated. A feed-forward that is not gated,
such as a mixture of experts, runs as transformers' own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from opticnerve.errors import FamilyError
from opticnerve.models.decoders.linear import Linear, num_bytes
from opticnerve.process import return_freed_memory

if TYPE_CHECKING:
    from opticnerve.models.decoders.spec import DecoderSpec, LayerSpec

PackedAttention = Callable[[torch.Tensor, torch.Tensor, int, float], torch.Tensor]
"""(query [tokens, heads, head_dim], keys then values [tokens, 2 * kv_heads, head_dim], index of
the layer, scale) -> [tokens, heads, head_dim]."""

_packed_attention: dict[str, PackedAttention] = {}


def register_packed(name: str, function: PackedAttention) -> None:
    """Makes fused layers whose attention is ``name`` call ``function``. A function registered with
    transformers alone works too, at the cost of a few more views and copies."""
    _packed_attention[name] = function


@dataclass(frozen=True, slots=True)
class LayerForm:
    """What differs between layers that are fused: where they normalise, and what they rotate.

    Norms go by the names of their attributes in transformers' layers. None: there is no such norm.
    """

    before_attention: str = "input_layernorm"
    after_attention: str | None = None  # Of attention's output.
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None  # Of the feed-forward's output.
    centred: bool = False  # Norms multiply by 1 + weight, as in Gemma.
    # Columns 2i and 2i + 1 are rotated as a pair, as in GLM; else i and i + n / 2 of n.
    neighbours: bool = False


PRE_NORM = LayerForm()  # Llama's.


def check_form(model: Any, form: LayerForm) -> None:
    """Raises FamilyError for layers of ``model`` that lack a norm of ``form``."""
    for name in (form.before_attention, form.after_attention, form.before_mlp, form.after_mlp):
        for layer in model.layers:
            if name is not None and not hasattr(layer, name):
                raise FamilyError(
                    f"{type(layer).__name__} has no {name!r}, a norm of the LayerForm that the "
                    "family declares; declare the layer's own norms, or fusable=False for one that "
                    "computes anything else"
                )


class Norm:
    """A root-mean-square norm over the last dimension: ``forward``."""

    __slots__ = ("_eps", "_shape", "_weight", "forward")

    def __init__(self, module: Any, centred: bool) -> None:
        self._eps = _eps(module)
        self._weight = _norm_weight(module, centred)
        self._shape = tuple(self._weight.shape)
        same = self._weight.dtype == module.weight.dtype
        self.forward = self._plain if same else self._in_float32

    def num_bytes(self) -> int:
        return num_bytes(self._weight)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._shape, self._weight, self._eps)

    def _in_float32(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self._shape, self._weight, self._eps).to(x.dtype)


def _eps(module: Any) -> float:
    eps: float = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return eps


def _norm_weight(module: Any, centred: bool) -> torch.Tensor:
    """The factor of a norm. 1 + weight is in float32: it needs more digits than half precision
    has."""
    weight: torch.Tensor = module.weight
    return 1.0 + weight.float() if centred else weight


class HeadNorm:
    """The norms of q and k, over each head."""

    def __init__(self, attn: Any, heads: int, kv_heads: int, centred: bool) -> None:
        q, k = (_norm_weight(norm, centred).float() for norm in (attn.q_norm, attn.k_norm))
        self.weight = torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1)))
        self._eps = _eps(attn.q_norm)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, heads and kv_heads, head_dim] -> the same, in memory of its own."""
        return F.rms_norm(heads, self.weight.shape[1:], None, self._eps).mul_(self.weight)


class GatedMlp:
    """A feed-forward down(activation(gate) * up). Takes over the weights of ``mlp``, whose
    projections are deleted as they are joined."""

    def __init__(self, mlp: Any) -> None:
        if hasattr(mlp, "gate_up_proj"):
            self.gate_up = Linear(mlp.gate_up_proj.weight, mlp.gate_up_proj.bias)
            del mlp.gate_up_proj
        else:
            self.gate_up = Linear(*_join(mlp.gate_proj, mlp.up_proj))
            del mlp.gate_proj, mlp.up_proj
        self.down = Linear(mlp.down_proj.weight, mlp.down_proj.bias)
        del mlp.down_proj
        act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
        self.activation: Callable[[torch.Tensor], torch.Tensor] = act.forward

    def num_bytes(self) -> int:
        return self.gate_up.num_bytes() + self.down.num_bytes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up.forward(x).chunk(2, dim=-1)
        return self.down.forward(self.activation(gate) * up)


class ModuleMlp:
    """transformers' own feed-forward, such as a mixture of experts."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def num_bytes(self) -> int:
        return sum(map(num_bytes, self.mlp.parameters()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.mlp(x[None])
        return added[0]


class FusedLayer:
    """One layer with rotary attention and a feed-forward, of ``form``.

    Takes over the weights of ``layer``, whose projections are deleted as they are joined. Not an
    ``nn.Module``: looking up a weight in one costs as much as a small operation.
    """

    def __init__(
        self, layer: Any, form: LayerForm, rotary_dim: int, attention: PackedAttention
    ) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.attention = attention
        self.index: int = attn.layer_idx
        self.scaling: float = attn.scaling
        self.head_dim: int = attn.head_dim
        self.num_heads = attn.q_proj.out_features // attn.head_dim
        self.num_rotated = self.num_heads + attn.k_proj.out_features // attn.head_dim
        self.rotary_dim: int | None = None if rotary_dim == self.head_dim else rotary_dim
        self.before_attention = Norm(getattr(layer, form.before_attention), form.centred)
        self.after_attention = _optional_norm(layer, form.after_attention, form.centred)
        self.before_mlp = Norm(getattr(layer, form.before_mlp), form.centred)
        self.after_mlp = _optional_norm(layer, form.after_mlp, form.centred)
        if not form.neighbours:
            for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
                _interleave(getattr(attn, name, None), self.head_dim, rotary_dim)
        self.head_norm: HeadNorm | None = None
        if hasattr(attn, "q_norm"):
            kv_heads = self.num_rotated - self.num_heads
            self.head_norm = HeadNorm(attn, self.num_heads, kv_heads, form.centred)
        self.qkv = Linear(*_join(attn.q_proj, attn.k_proj, attn.v_proj))
        self.out = Linear(attn.o_proj.weight, attn.o_proj.bias)
        del attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        self.mlp = GatedMlp(mlp) if hasattr(mlp, "down_proj") else ModuleMlp(mlp)

    def weight_bytes(self) -> int:
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        held = sum(norm.num_bytes() for norm in norms if norm is not None)
        if self.head_norm is not None:
            held += num_bytes(self.head_norm.weight)
        return held + self.qkv.num_bytes() + self.out.num_bytes() + self.mlp.num_bytes()

    def forward(
        self, hidden: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[tokens, hidden_size] -> the same shape, or [len(rows), hidden_size].

        With ``rows``, keys and values of every token are stored, but only these tokens go on after
        attention. ``factors``: see RotaryTable.
        """
        mixed = self._attend(self.before_attention.forward(hidden), factors)
        if rows is not None:
            hidden, mixed = hidden[rows], mixed[rows]
            if not len(rows):
                return hidden
        mixed = self.out.forward(mixed)
        if self.after_attention is not None:
            mixed = self.after_attention.forward(mixed)
        hidden = hidden + mixed
        added = self.mlp.forward(self.before_mlp.forward(hidden))
        if self.after_mlp is not None:
            added = self.after_mlp.forward(added)
        return hidden.add_(added)

    def _attend(self, normed: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        tokens = len(normed)
        heads = self.qkv.forward(normed).view(tokens, -1, self.head_dim)
        self._turn_(heads[:, : self.num_rotated], factors)
        mixed = self.attention(
            heads[:, : self.num_heads], heads[:, self.num_heads :], self.index, self.scaling
        )
        return mixed.reshape(tokens, -1)

    def _turn_(self, heads: torch.Tensor, factors: torch.Tensor) -> None:
        """Normalises q and k, and rotates pairs of neighbouring columns, in place."""
        wide = heads.float()  # A float32 tensor is returned as it is, not copied.
        if self.head_norm is not None:
            wide = self.head_norm.forward(wide)
        turned = wide if self.rotary_dim is None else wide[..., : self.rotary_dim]
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(factors)
        if wide is not heads:
            heads.copy_(wide)


class RotaryTable:
    """A step's rotary factors: complex64 [tokens, 1, rotary_dim / 2].

    With three position dimensions, each column is rotated by one of them. Frequencies come from
    ``rotary``, transformers' rotary embedding; which dimension rotates which column is found by
    calling it with one dimension set at a time. ``kind``: see ``spec.LayerSpec.rotary``.
    """

    def __init__(self, rotary: Any, kind: str | None, position_dims: int, neighbours: bool) -> None:
        prefix = "" if kind is None else f"{kind}_"
        frequencies: torch.Tensor = getattr(rotary, f"{prefix}inv_freq")
        self.frequencies = frequencies.float()  # [rotary_dim / 2]
        self.length = self.frequencies.new_full((1,), getattr(rotary, f"{prefix}attention_scaling"))
        self.columns: torch.Tensor | None = None
        if position_dims > 1:
            device = self.frequencies.device
            one_by_one = torch.eye(position_dims, dtype=torch.int64, device=device)
            named = () if kind is None else (kind,)
            _, sin = rotary(self.frequencies.new_zeros(1), one_by_one[:, None], *named)
            dimensions = sin[0].abs().argmax(0)  # [rotary_dim]: the one whose sine is not zero.
            pairs = dimensions[::2] if neighbours else dimensions[: len(self.frequencies)]
            self.columns = pairs

    @property
    def rotary_dim(self) -> int:
        """Columns of a head that are rotated, its first."""
        return 2 * len(self.frequencies)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """``positions``: int64 [position_dims, tokens]."""
        picked = positions[0][:, None] if self.columns is None else positions[self.columns].T
        return torch.polar(self.length, (picked * self.frequencies)[:, None])


class FusedDecoder:
    """Layers and last norm of a decoder. Takes over the weights of ``model``."""

    def __init__(self, model: Any, attention: str, spec: DecoderSpec) -> None:
        form = spec.form
        self.tables = {
            kind: RotaryTable(model.rotary_emb, kind, spec.position_dims, form.neighbours)
            for kind in {layer.rotary for layer in spec.layers}
        }
        self.kinds = [layer.rotary for layer in spec.layers]
        self.layers = [
            FusedLayer(
                each, form, self.tables[layer.rotary].rotary_dim, _packed(attention, each, layer)
            )
            for each, layer in zip(model.layers, spec.layers, strict=True)
        ]
        self.norm = Norm(model.norm, form.centred)
        self.query_scale = spec.query_scale

    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self.norm.num_bytes() + sum(layer.weight_bytes() for layer in self.layers)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        deepstack: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``family.LanguageModel.forward``."""
        factors = {kind: table(positions) for kind, table in self.tables.items()}
        if self.query_scale is not None:
            scale = self._scale(self.query_scale(positions[0]))
            factors = {kind: each * scale for kind, each in factors.items()}
        last = len(self.layers) - 1
        early = rows if len(deepstack) <= last else None  # DeepStack indices count all tokens.
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            hidden = layer.forward(hidden, factors[kind], early if i == last else None)
            if i < len(deepstack):
                indices, added = deepstack[i]
                hidden.index_add_(0, indices, added.to(hidden.dtype))
        if rows is not None and early is None:
            hidden = hidden[rows]
        return self.norm.forward(hidden)

    def _scale(self, of_queries: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, heads and kv_heads, 1]: keys keep their lengths."""
        layer = self.layers[0]
        scale = of_queries.new_ones(len(of_queries), layer.num_rotated, 1)
        scale[:, : layer.num_heads, 0] = of_queries[:, None]
        return scale


def fuse(model: Any, attention: str, spec: DecoderSpec) -> FusedDecoder | None:
    """Fuses ``model``. Returns None and leaves it unchanged if the family does not declare it
    fusable, or ``attention`` is not a registered function."""
    if attention not in AttentionInterface() or not spec.fusable:
        return None
    with torch.no_grad():
        fused = FusedDecoder(model, attention, spec)
    return_freed_memory()
    return fused


def _packed(name: str, layer: Any, spec: LayerSpec) -> PackedAttention:
    """The attention of that name as fused layers call it."""
    if name in _packed_attention:
        return _packed_attention[name]
    function, source = AttentionInterface()[name], layer.self_attn
    limits = {"sliding_window": spec.window, "softcap": spec.soft_cap}

    def attend(
        query: torch.Tensor, key_value: torch.Tensor, index: int, scale: float
    ) -> torch.Tensor:
        heads = (query, *key_value.chunk(2, dim=1))
        q, k, v = (each.transpose(0, 1)[None] for each in heads)
        mixed: torch.Tensor = function(source, q, k, v, None, scaling=scale, **limits)[0]
        return mixed[0]

    return attend


def _optional_norm(layer: Any, name: str | None, centred: bool) -> Norm | None:
    return None if name is None else Norm(getattr(layer, name), centred)


def _interleave(module: nn.Module | None, head_dim: int, rotary_dim: int) -> None:
    """Makes rows i and i + rotary_dim / 2 of every head neighbours, in a projection or a norm over
    heads. Does nothing for None."""
    if module is None:
        return
    order = torch.arange(head_dim)
    order[:rotary_dim] = order[:rotary_dim].view(2, -1).T.flatten()
    for tensor in module.parameters(recurse=False):
        heads = tensor.data.unflatten(0, (-1, head_dim))
        tensor.data = heads[:, order.to(tensor.device)].flatten(0, 1)


def _join(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and one bias that compute all of ``linears`` side by side."""
    biases = [linear.bias for linear in linears]
    joined = None if biases[0] is None else torch.cat(biases)
    return torch.cat([linear.weight for linear in linears]), joined
