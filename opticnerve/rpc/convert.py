"""Converts values of media, embeddings and generation to messages and back.

Messages and classes name their fields alike, so most conversions are by name: a field that is added
to both is converted without further code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, Sequence
from dataclasses import fields, replace
from enum import Enum
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from opticnerve.embeddings.ref import DTYPES, EmbeddingRef, Location, TensorSpec
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import StoreState
from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    Done,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Sampling,
    Timings,
    Usage,
)
from opticnerve.media.plan import Grid, Modality, Overrides, Plan, Span, SpanAttention
from opticnerve.pb import embedding_pb2 as pb
from opticnerve.pb import llm_pb2

PIECE_BYTES = 2**20  # Deltas in one message; those for a slow reader are merged.
PROMPT_PIECE_BYTES = 2**14  # Prompt log-probabilities in one message; more take long to make.
LOGPROB_BYTES = 14  # One log-probability in a message.

E = TypeVar("E", bound=Enum)


def _numbers(values: type[E], enum: Any, prefix: str) -> tuple[dict[E, Any], dict[int, E]]:
    """(value -> number in messages, number -> value) of an enum."""
    numbers = {each: enum.Value(prefix + each.name) for each in values}
    return numbers, {number: each for each, number in numbers.items()}


_MODALITY, _MODALITY_BACK = _numbers(Modality, pb.Modality, "MODALITY_")
_ATTENTION, _ATTENTION_BACK = _numbers(SpanAttention, pb.SpanAttention, "SPAN_ATTENTION_")
_FINISH, _FINISH_BACK = _numbers(FinishReason, llm_pb2.FinishReason, "FINISH_REASON_")
_DTYPE = {name: pb.DType.Value(f"DTYPE_{name}") for name in DTYPES}
_DTYPE_BACK = {number: name for name, number in _DTYPE.items()}
_OPTIONAL = {each.name for each in llm_pb2.SamplingParams.DESCRIPTOR.fields if each.has_presence}


def field_values(source: Any, message: type[Message]) -> dict[str, Any]:
    """The attributes of ``source``, a value or a message, for each field of ``message``."""
    return {name: getattr(source, name) for name in _names(message.DESCRIPTOR)}


def numbers_of(message: Message) -> dict[str, int]:
    """A message's numeric fields by name, rounded."""
    return {name: round(getattr(message, name)) for name in _names(message.DESCRIPTOR)}


@functools.cache
def _names(descriptor: Descriptor) -> tuple[str, ...]:
    return tuple(each.name for each in descriptor.fields)


# ---- media and embeddings


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
        one_of_several=overrides.one_of_several,
    )


def overrides_from_pb(message: pb.ProcessorOverrides) -> Overrides:
    background = message.background if message.HasField("background") else None
    return Overrides(
        message.min_pixels or None,
        message.max_pixels or None,
        background,
        message.one_of_several,
    )


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
    """``seal``: the worker's, whose id the message names."""
    key_id = "" if seal is None else seal.id
    return pb.StoreState(kind=state.kind, reachable=state.reachable, key_id=key_id)


def store_state_from_pb(message: pb.StoreState) -> StoreState | None:
    """None for a worker of an earlier release, which does not report it."""
    if not message.kind:
        return None
    return StoreState(message.kind, message.reachable, message.key_id)


# ---- a generation's request


def sampling_to_pb(sampling: Sampling) -> llm_pb2.SamplingParams:
    """Sets every field: workers do not apply defaults of a model or a gateway."""
    values: dict[str, Any] = {each.name: getattr(sampling, each.name) for each in fields(Sampling)}
    values["bad_words"] = [llm_pb2.TokenSequence(token_ids=word) for word in sampling.bad_words]
    return llm_pb2.SamplingParams(**values)


def sampling_from_pb(message: llm_pb2.SamplingParams) -> Sampling:
    """Zeros that mean "off" become neutral values. Raises InvalidRequest for a value out of
    range."""
    values: dict[str, Any] = {}
    for each in fields(Sampling):
        name, value = each.name, _plain(getattr(message, each.name))
        unset = name in _OPTIONAL and not message.HasField(name)  # type: ignore[arg-type]
        off = not value and each.metadata.get("zero_is_off")
        values[name] = each.default if unset or off else value
    values["bad_words"] = tuple(tuple(word.token_ids) for word in message.bad_words)
    return Sampling(**values)


def output_to_pb(output: ChoiceOutput) -> llm_pb2.ChoiceOutput:
    return llm_pb2.ChoiceOutput(**field_values(output, llm_pb2.ChoiceOutput))


def output_from_pb(message: llm_pb2.ChoiceOutput) -> ChoiceOutput:
    return ChoiceOutput(message.choice, tuple(message.output_ids), message.finished)


def item_to_pb(key: str, ref: EmbeddingRef | None, *, own: bool = False) -> llm_pb2.Item:
    return llm_pb2.Item(key=key, ref=ref_to_pb(ref) if ref else None, own=own)


# ---- a generation's answer


def delta_to_pb(delta: Delta) -> llm_pb2.TokenDelta:
    values = field_values(delta, llm_pb2.TokenDelta)
    values |= {
        "logprobs": map(position_to_pb, delta.logprobs),
        "finish_reason": _FINISH[delta.finish_reason] if delta.finish_reason else None,
    }
    return llm_pb2.TokenDelta(**values)


def delta_pieces(delta: Delta) -> Iterator[llm_pb2.TokenDelta]:
    """The delta in messages of about PIECE_BYTES; the finish reason is on the last."""
    width = len(delta.logprobs[0].top) + 1 if delta.logprobs else 0
    size = max(PIECE_BYTES // (4 + width * LOGPROB_BYTES), 1)
    count = len(delta.token_ids)
    if count <= size:
        yield delta_to_pb(delta)
        return
    for begin in range(0, count, size):
        piece = replace(
            delta,
            first_index=delta.first_index + begin,
            token_ids=delta.token_ids[begin : begin + size],
            logprobs=delta.logprobs[begin : begin + size],
        )
        if begin + size < count:
            piece = replace(piece, finish_reason=None, stop_token_id=None)
        yield delta_to_pb(piece)


def delta_from_pb(message: llm_pb2.TokenDelta) -> Delta:
    reason = _FINISH_BACK.get(message.finish_reason)
    return Delta(
        choice=message.choice,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        logprobs=positions_from_pb(message.logprobs),
        finish_reason=reason,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
    )


def position_to_pb(position: PositionLogprobs) -> llm_pb2.PositionLogprobs:
    sampled = position.sampled
    return llm_pb2.PositionLogprobs(
        sampled=None if sampled is None else _logprob_to_pb(sampled),
        top=map(_logprob_to_pb, position.top),
    )


def positions_from_pb(messages: Iterable[llm_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(
            _logprob_from_pb(message.sampled) if message.HasField("sampled") else None,
            tuple(map(_logprob_from_pb, message.top)),
        )
        for message in messages
    )


def prompt_pieces(positions: Sequence[PositionLogprobs]) -> Iterator[llm_pb2.PromptLogprobs]:
    """A prompt's log-probabilities in messages of about PROMPT_PIECE_BYTES."""
    width = max(len(position.top) for position in positions) + 1 if positions else 1
    size = max(PROMPT_PIECE_BYTES // (width * LOGPROB_BYTES), 1)
    for begin in range(0, len(positions), size):
        piece = positions[begin : begin + size]
        yield llm_pb2.PromptLogprobs(positions=map(position_to_pb, piece))


def _logprob_to_pb(logprob: Logprob) -> llm_pb2.TokenLogprob:
    return llm_pb2.TokenLogprob(token_id=logprob[0], logprob=logprob[1], rank=logprob[2])


def _logprob_from_pb(message: llm_pb2.TokenLogprob) -> Logprob:
    return Logprob(message.token_id, message.logprob, message.rank)


def timings_to_pb(timings: Timings) -> llm_pb2.GenerateTimings:
    return llm_pb2.GenerateTimings(**field_values(timings, llm_pb2.GenerateTimings))


def timings_from_pb(message: llm_pb2.GenerateTimings) -> Timings:
    return Timings(**field_values(message, llm_pb2.GenerateTimings))


def done_to_pb(done: Done) -> llm_pb2.Done:
    return llm_pb2.Done(
        usage=llm_pb2.Usage(**field_values(done.usage, llm_pb2.Usage)),
        timings=timings_to_pb(done.timings),
    )


def done_from_pb(message: llm_pb2.Done) -> Done:
    return Done(
        Usage(**field_values(message.usage, llm_pb2.Usage)),
        timings_from_pb(message.timings),
    )


def _plain(value: Any) -> Any:
    """A message's value without protobuf's containers."""
    if isinstance(value, MutableMapping):
        return dict(value)
    return tuple(value) if isinstance(value, MutableSequence) else value
