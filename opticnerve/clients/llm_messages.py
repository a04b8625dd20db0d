"""Generation values to ``llm.proto`` messages and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opticnerve.clients.generation import Delta, Logprob, PositionLogprobs, Sampling, Usage
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import OpticNerveError
from opticnerve.media.plan import Span
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.errors import to_detail

START_INLINE_BYTES = 2**20  # Of tensors in the first message.

FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


def start(
    request_id: str,
    token_ids: Sequence[int],
    refs: Sequence[EmbeddingRef],
    spans: Sequence[Span],
    sampling: Sampling,
) -> pb.GenerateIn:
    """The first message. It carries references whole, except those with bytes of their own that
    would make it large: these it only names, and each follows in a message of its own."""
    items, room = [], START_INLINE_BYTES
    for ref in refs:
        room -= len(ref.location.inline)
        fits = room >= 0 or not ref.location.inline
        items.append(pb.Item(key=ref.key, ref=convert.ref_to_pb(ref) if fits else None))
    return pb.GenerateIn(
        start=pb.Start(
            request_id=request_id,
            token_ids=token_ids,
            spans=[convert.span_to_pb(span) for span in spans],
            items=items,
            sampling=sampling_to_pb(sampling),
        )
    )


def is_sent(first: pb.GenerateIn, ref: EmbeddingRef) -> bool:
    """Whether the first message carries the reference."""
    return any(item.key == ref.key and item.HasField("ref") for item in first.start.items)


def ready(ref: EmbeddingRef) -> pb.GenerateIn:
    return pb.GenerateIn(embedding_ready=pb.EmbeddingReady(ref=convert.ref_to_pb(ref)))


def failed(key: str, error: OpticNerveError) -> pb.GenerateIn:
    return pb.GenerateIn(
        embedding_failed=pb.EmbeddingFailed(
            key=key, status=error.grpc_status, detail=to_detail(error)
        )
    )


def sampling_to_pb(sampling: Sampling) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        n=sampling.n,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        eos_token_ids=sampling.eos_token_ids,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        logit_bias=dict(sampling.logit_bias),
        bad_words=[pb.TokenSequence(token_ids=word) for word in sampling.bad_words],
        allowed_token_ids=sampling.allowed_token_ids,
    )


def delta_from_pb(message: pb.TokenDelta) -> Delta:
    reason = FINISH.get(message.finish_reason)
    return Delta(
        choice=message.choice,
        first_index=message.first_index,
        token_ids=tuple(message.token_ids),
        logprobs=positions_from_pb(message.logprobs),
        finish_reason=reason,
        stop_token_id=message.stop_token_id if reason == "stop" else None,
    )


def positions_from_pb(messages: Iterable[pb.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(
            None if message.absent else _logprob(message.sampled),
            tuple(_logprob(token) for token in message.top),
        )
        for message in messages
    )


def _logprob(message: pb.TokenLogprob) -> Logprob:
    return Logprob(message.token_id, message.logprob, message.rank)


def usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        embedding_tokens=message.embedding_tokens,
    )
