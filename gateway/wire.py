"""Messages of ``llm.proto`` to the gateway's plain values, and back."""

from __future__ import annotations

import grpc

from gateway.events import Delta, Finish, Finished, PositionLogprobs, TokenLogprob, Usage
from gateway.pools import Description
from gateway.sampling import ResolvedSampling
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc

FINISH = {
    pb.FINISH_REASON_STOP: Finish.STOP,
    pb.FINISH_REASON_LENGTH: Finish.LENGTH,
    pb.FINISH_REASON_ABORT: Finish.ABORT,
}


async def describe(channel: grpc.aio.Channel, timeout_s: float) -> Description:
    answer = await llm_pb2_grpc.LLMStub(channel).Describe(
        pb.DescribeLLMRequest(), timeout=timeout_s
    )
    limits, load = answer.limits, answer.load
    return Description(
        fingerprint=answer.fingerprint,
        pair_id=answer.pair_id,
        family=answer.family,
        device=answer.device,
        dtype=answer.dtype,
        version=answer.version,
        shm_tier_id=answer.shm_tier_id,
        hidden_size=answer.hidden_size,
        draining=load.draining,
        cost=load.running + load.waiting,
        limits={
            "vocab_size": answer.vocab_size,
            **{each.name: getattr(limits, each.name) for each in limits.DESCRIPTOR.fields},
        },
        load={
            "running": load.running,
            "waiting": load.waiting,
            "free_kv_blocks": load.free_kv_blocks,
        },
        extra={"attention": answer.attention},
    )


def sampling_to_pb(sampling: ResolvedSampling) -> pb.SamplingParams:
    """Field by field: the decoder knows no defaults."""
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
        bad_words=[pb.TokenSequence(token_ids=ids) for ids in sampling.bad_words],
        allowed_token_ids=sampling.allowed_token_ids,
    )


def delta(message: pb.TokenDelta, skip: int, finish: Finish | None) -> Delta:
    """A delta without its first ``skip`` tokens."""
    return Delta(
        choice=message.choice,
        first_index=message.first_index + skip,
        token_ids=tuple(message.token_ids[skip:]),
        logprobs=tuple(_position(position) for position in message.logprobs[skip:]),
        finish=finish,
        stop_token_id=message.stop_token_id if finish is Finish.STOP else None,
    )


def _position(message: pb.PositionLogprobs) -> PositionLogprobs:
    if message.absent:
        return PositionLogprobs(None)
    return PositionLogprobs(_token(message.sampled), tuple(_token(token) for token in message.top))


def _token(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, message.rank)


def finished(message: pb.Done) -> Finished:
    usage, timings = message.usage, message.timings
    return Finished(
        Usage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            usage.embedding_tokens,
        ),
        {
            "queue": timings.queue_ms,
            "embedding_wait": timings.embedding_wait_ms,
            "get": timings.get_ms,
            "prefill": timings.prefill_ms,
            "decode": timings.decode_ms,
        },
    )
