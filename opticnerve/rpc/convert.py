"""Plain values to messages and back: the only place that knows both."""

from __future__ import annotations

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
_DTYPE = {name: pb.DType.Value(f"DTYPE_{name}") for name in DTYPES}
_DTYPE_BACK = {number: name for name, number in _DTYPE.items()}


def grid_to_pb(grid: Grid) -> pb.Grid:
    return pb.Grid(t=grid.t, h=grid.h, w=grid.w)


def grid_from_pb(message: pb.Grid) -> Grid:
    return Grid(message.t, message.h, message.w)


def plan_to_pb(plan: Plan) -> pb.Plan:
    return pb.Plan(
        modality=_MODALITY[plan.modality],
        format=plan.format,
        width=plan.width,
        height=plan.height,
        orientation=plan.orientation,
        resized_width=plan.resized_width,
        resized_height=plan.resized_height,
        grid=grid_to_pb(plan.grid),
        num_tokens=plan.num_tokens,
        num_patches=plan.num_patches,
        frames=plan.frames,
        seconds_per_grid=plan.seconds_per_grid,
    )


def plan_from_pb(message: pb.Plan) -> Plan:
    return Plan(
        modality=_MODALITY_BACK.get(message.modality, Modality.IMAGE),
        format=message.format,
        width=message.width,
        height=message.height,
        orientation=message.orientation or 1,
        resized_width=message.resized_width,
        resized_height=message.resized_height,
        grid=grid_from_pb(message.grid),
        num_tokens=message.num_tokens,
        num_patches=message.num_patches,
        frames=message.frames or 1,
        seconds_per_grid=message.seconds_per_grid,
    )


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
    return llm_pb2.Span(
        token_offset=span.token_offset,
        num_tokens=span.num_tokens,
        item=span.item,
        row_start=span.row_start,
        modality=_MODALITY[span.modality],
        grid_thw=grid_to_pb(span.grid_thw),
        seconds_per_grid=span.seconds_per_grid,
        attention=(
            pb.SPAN_ATTENTION_BIDIRECTIONAL
            if span.attention is SpanAttention.BIDIRECTIONAL
            else pb.SPAN_ATTENTION_CAUSAL
        ),
    )


def span_from_pb(message: llm_pb2.Span) -> Span:
    bidirectional = message.attention == pb.SPAN_ATTENTION_BIDIRECTIONAL
    return Span(
        token_offset=message.token_offset,
        num_tokens=message.num_tokens,
        item=message.item,
        row_start=message.row_start,
        modality=_MODALITY_BACK.get(message.modality, Modality.IMAGE),
        grid_thw=grid_from_pb(message.grid_thw),
        seconds_per_grid=message.seconds_per_grid,
        attention=SpanAttention.BIDIRECTIONAL if bidirectional else SpanAttention.CAUSAL,
    )


def ref_to_pb(ref: EmbeddingRef) -> pb.EmbeddingRef:
    return pb.EmbeddingRef(
        key=ref.key,
        fingerprint=ref.fingerprint,
        tensors=[
            pb.TensorSpec(name=t.name, dtype=_DTYPE[t.dtype], shape=t.shape) for t in ref.tensors
        ],
        num_rows=ref.num_rows,
        location=pb.Location(
            shm_tier_id=ref.location.shm_tier_id,
            redis=ref.location.redis,
            fetch_address=ref.location.fetch_address,
            inline=ref.location.inline,
        ),
    )


def ref_from_pb(message: pb.EmbeddingRef) -> EmbeddingRef:
    location = message.location
    return EmbeddingRef(
        key=message.key,
        fingerprint=message.fingerprint,
        tensors=tuple(
            TensorSpec(t.name, _DTYPE_BACK.get(t.dtype, "F32"), tuple(t.shape))
            for t in message.tensors
        ),
        num_rows=message.num_rows,
        location=Location(
            shm_tier_id=location.shm_tier_id,
            redis=location.redis,
            fetch_address=location.fetch_address,
            inline=location.inline,
        ),
    )


def store_state_to_pb(state: StoreState, seal: Seal | None) -> pb.StoreState:
    """``seal``: what signs values that leave the machine."""
    key_id = "" if seal is None else seal.id
    return pb.StoreState(kind=state.kind, reachable=state.reachable, key_id=key_id)


def store_state_from_pb(message: pb.StoreState) -> StoreState | None:
    """None for a worker that does not tell."""
    if not message.kind:
        return None
    return StoreState(message.kind, message.reachable, message.key_id)
