"""Values of media and embeddings to messages and back.

A message has the fields of its class, by name, so that a field that is added to both travels.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from opticnerve.embeddings.ref import DTYPES, EmbeddingRef, Location, TensorSpec
from opticnerve.embeddings.seal import Seal
from opticnerve.embeddings.store import StoreState
from opticnerve.media.plan import Grid, Modality, Overrides, Plan, Span, SpanAttention
from opticnerve.pb import embedding_pb2 as pb
from opticnerve.pb import llm_pb2

_MODALITY = {
    Modality.IMAGE: pb.MODALITY_IMAGE,
    Modality.VIDEO: pb.MODALITY_VIDEO,
    Modality.AUDIO: pb.MODALITY_AUDIO,
}
_MODALITY_BACK = {number: modality for modality, number in _MODALITY.items()}
_ATTENTION = {
    SpanAttention.CAUSAL: pb.SPAN_ATTENTION_CAUSAL,
    SpanAttention.BIDIRECTIONAL: pb.SPAN_ATTENTION_BIDIRECTIONAL,
}
_ATTENTION_BACK = {number: attention for attention, number in _ATTENTION.items()}
_DTYPE = {name: pb.DType.Value(f"DTYPE_{name}") for name in DTYPES}
_DTYPE_BACK = {number: name for name, number in _DTYPE.items()}


def field_values(source: Any, message: type[Message]) -> dict[str, Any]:
    """What ``source``, a value or a message, has under the names of a message's fields."""
    return {name: getattr(source, name) for name in _names(message.DESCRIPTOR)}


@functools.cache
def _names(descriptor: Descriptor) -> tuple[str, ...]:
    return tuple(each.name for each in descriptor.fields)


def grid_to_pb(grid: Grid) -> pb.Grid:
    return pb.Grid(t=grid.t, h=grid.h, w=grid.w)


def grid_from_pb(message: pb.Grid) -> Grid:
    return Grid(message.t, message.h, message.w)


def plan_to_pb(plan: Plan) -> pb.Plan:
    values = field_values(plan, pb.Plan)
    values |= {"modality": _MODALITY[plan.modality], "grid": grid_to_pb(plan.grid)}
    return pb.Plan(**values)


def plan_from_pb(message: pb.Plan) -> Plan:
    values = field_values(message, pb.Plan)
    values |= {
        "modality": _MODALITY_BACK.get(message.modality, Modality.IMAGE),
        "grid": grid_from_pb(message.grid),
        "orientation": message.orientation or 1,
        "frames": message.frames or 1,
    }
    return Plan(**values)


def overrides_to_pb(overrides: Overrides) -> pb.ProcessorOverrides:
    return pb.ProcessorOverrides(
        min_pixels=overrides.min_pixels or 0,
        max_pixels=overrides.max_pixels or 0,
        background=overrides.background,
    )


def overrides_from_pb(message: pb.ProcessorOverrides) -> Overrides:
    background = message.background if message.HasField("background") else None
    return Overrides(message.min_pixels or None, message.max_pixels or None, background)


def span_to_pb(span: Span) -> llm_pb2.Span:
    values = field_values(span, llm_pb2.Span)
    values |= {
        "modality": _MODALITY[span.modality],
        "grid_thw": grid_to_pb(span.grid_thw),
        "attention": _ATTENTION[span.attention],
    }
    return llm_pb2.Span(**values)


def span_from_pb(message: llm_pb2.Span) -> Span:
    values = field_values(message, llm_pb2.Span)
    values |= {
        "modality": _MODALITY_BACK.get(message.modality, Modality.IMAGE),
        "grid_thw": grid_from_pb(message.grid_thw),
        "attention": _ATTENTION_BACK.get(message.attention, SpanAttention.CAUSAL),
    }
    return Span(**values)


def ref_to_pb(ref: EmbeddingRef) -> pb.EmbeddingRef:
    values = field_values(ref, pb.EmbeddingRef)
    values |= {
        "tensors": [
            pb.TensorSpec(name=each.name, dtype=_DTYPE[each.dtype], shape=each.shape)
            for each in ref.tensors
        ],
        "location": pb.Location(**field_values(ref.location, pb.Location)),
    }
    return pb.EmbeddingRef(**values)


def ref_from_pb(message: pb.EmbeddingRef) -> EmbeddingRef:
    values = field_values(message, pb.EmbeddingRef)
    values |= {
        "tensors": tuple(
            TensorSpec(each.name, _DTYPE_BACK.get(each.dtype, "F32"), tuple(each.shape))
            for each in message.tensors
        ),
        "location": Location(**field_values(message.location, pb.Location)),
    }
    return EmbeddingRef(**values)


def store_state_to_pb(state: StoreState, seal: Seal | None) -> pb.StoreState:
    """``seal`` signs values that leave the machine."""
    key_id = "" if seal is None else seal.id
    return pb.StoreState(kind=state.kind, reachable=state.reachable, key_id=key_id)


def store_state_from_pb(message: pb.StoreState) -> StoreState | None:
    """None for a worker of an earlier release, which does not report it."""
    if not message.kind:
        return None
    return StoreState(message.kind, message.reachable, message.key_id)
