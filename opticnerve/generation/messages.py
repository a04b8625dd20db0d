"""Generation values to ``llm.proto`` messages and back, for whoever calls an LLM worker."""

from __future__ import annotations

from collections.abc import Iterable

from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import OpticNerveError
from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    Finished,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Sampling,
    Usage,
)
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.errors import to_detail

FINISH = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}


def item(key: str, ref: EmbeddingRef | None, *, own: bool = False) -> pb.Item:
    return pb.Item(key=key, ref=convert.ref_to_pb(ref) if ref else None, own=own)


def output(choice: ChoiceOutput) -> pb.ChoiceOutput:
    return pb.ChoiceOutput(
        choice=choice.choice, output_ids=choice.token_ids, finished=choice.finished
    )


def ready(ref: EmbeddingRef) -> pb.GenerateIn:
    return pb.GenerateIn(embedding_ready=pb.EmbeddingReady(ref=convert.ref_to_pb(ref)))


def failed(key: str, error: OpticNerveError) -> pb.GenerateIn:
    return pb.GenerateIn(
        embedding_failed=pb.EmbeddingFailed(
            key=key, status=error.grpc_status, detail=to_detail(error)
        )
    )


def sampling_to_pb(sampling: Sampling) -> pb.SamplingParams:
    """Field by field: the decoder knows no defaults. ``eos_token_ids`` that are None are none."""
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
        eos_token_ids=sampling.eos_token_ids or (),
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
        stop_token_id=message.stop_token_id if reason is FinishReason.STOP else None,
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


def finished_from_pb(message: pb.Done) -> Finished:
    usage, timings = message.usage, message.timings
    return Finished(
        Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            embedding_tokens=usage.embedding_tokens,
        ),
        {
            "queue": timings.queue_ms,
            "embedding_wait": timings.embedding_wait_ms,
            "get": timings.get_ms,
            "prefill": timings.prefill_ms,
            "decode": timings.decode_ms,
        },
        timings.preemptions,
    )
