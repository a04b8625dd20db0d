"""The values of ``opticnerve.generation.values`` as messages of ``llm.proto``, and back.

A message has the fields of its class, by name, so that most conversions name none of them: a field
that is added to both travels.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, MutableSequence
from dataclasses import fields
from typing import Any

from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import OpticNerveError
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
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc.convert import field_values, ref_to_pb
from opticnerve.rpc.errors import to_detail

_FINISH = {reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}
_OPTIONAL = {each.name for each in pb.SamplingParams.DESCRIPTOR.fields if each.has_presence}


# ---- requests


def sampling_to_pb(sampling: Sampling) -> pb.SamplingParams:
    """Every field explicitly: a worker knows no defaults of a model or a gateway."""
    values: dict[str, Any] = {each.name: getattr(sampling, each.name) for each in fields(Sampling)}
    values["bad_words"] = [pb.TokenSequence(token_ids=word) for word in sampling.bad_words]
    return pb.SamplingParams(**values)


def sampling_from_pb(message: pb.SamplingParams) -> Sampling:
    """Zeros that mean "off" become neutral values. Raises InvalidRequest for a value out of its
    range."""
    values: dict[str, Any] = {}
    for each in fields(Sampling):
        name, value = each.name, _plain(getattr(message, each.name))
        unset = name in _OPTIONAL and not message.HasField(name)  # type: ignore[arg-type]
        off = not value and each.metadata.get("zero_is_off")
        values[name] = each.default if unset or off else value
    values["bad_words"] = tuple(tuple(word.token_ids) for word in message.bad_words)
    return Sampling(**values)


def output_to_pb(output: ChoiceOutput) -> pb.ChoiceOutput:
    return pb.ChoiceOutput(**field_values(output, pb.ChoiceOutput))


def output_from_pb(message: pb.ChoiceOutput) -> ChoiceOutput:
    return ChoiceOutput(message.choice, tuple(message.output_ids), message.finished)


def item_to_pb(key: str, ref: EmbeddingRef | None, *, own: bool = False) -> pb.Item:
    return pb.Item(key=key, ref=ref_to_pb(ref) if ref else None, own=own)


def ready_to_pb(ref: EmbeddingRef) -> pb.GenerateIn:
    return pb.GenerateIn(embedding_ready=pb.EmbeddingReady(ref=ref_to_pb(ref)))


def failure_to_pb(key: str, error: OpticNerveError) -> pb.GenerateIn:
    return pb.GenerateIn(
        embedding_failed=pb.EmbeddingFailed(
            key=key, status=error.grpc_status, detail=to_detail(error)
        )
    )


# ---- answers


def delta_to_pb(delta: Delta) -> pb.TokenDelta:
    values = field_values(delta, pb.TokenDelta)
    values |= {
        "logprobs": map(position_to_pb, delta.logprobs),
        "finish_reason": _FINISH[delta.finish_reason] if delta.finish_reason else None,
    }
    return pb.TokenDelta(**values)


def delta_from_pb(message: pb.TokenDelta) -> Delta:
    reason = _FINISH_BACK.get(message.finish_reason)
    return Delta(
        choice=message.choice,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        logprobs=positions_from_pb(message.logprobs),
        finish_reason=reason,
        stop_token_id=message.stop_token_id if reason is FinishReason.STOP else None,
    )


def position_to_pb(position: PositionLogprobs) -> pb.PositionLogprobs:
    sampled = position.sampled
    return pb.PositionLogprobs(
        sampled=None if sampled is None else _logprob_to_pb(sampled),
        top=map(_logprob_to_pb, position.top),
    )


def positions_from_pb(messages: Iterable[pb.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(
            _logprob_from_pb(message.sampled) if message.HasField("sampled") else None,
            tuple(map(_logprob_from_pb, message.top)),
        )
        for message in messages
    )


def _logprob_to_pb(logprob: Logprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=logprob[0], logprob=logprob[1], rank=logprob[2])


def _logprob_from_pb(message: pb.TokenLogprob) -> Logprob:
    return Logprob(message.token_id, message.logprob, message.rank)


def done_to_pb(done: Done) -> pb.Done:
    return pb.Done(
        usage=pb.Usage(**field_values(done.usage, pb.Usage)),
        timings=pb.GenerateTimings(**field_values(done.timings, pb.GenerateTimings)),
    )


def done_from_pb(message: pb.Done) -> Done:
    return Done(
        Usage(**field_values(message.usage, pb.Usage)),
        Timings(**field_values(message.timings, pb.GenerateTimings)),
    )


def _plain(value: Any) -> Any:
    """A message's value without protobuf's containers."""
    if isinstance(value, MutableMapping):
        return dict(value)
    return tuple(value) if isinstance(value, MutableSequence) else value
