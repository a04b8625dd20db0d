"""Messages of ``llm.proto`` to the engine's values and back, with every check that needs no
engine: what is wrong with a Start is said here, as InvalidRequest with the field at fault."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from llm_service.policy.limits import EngineConfig, check_request
from llm_service.policy.sequence import (
    ChoiceOutput,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    Logprobs,
    SamplingParams,
    TokensEvent,
)
from opticnerve import addresses
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.store import check_key
from opticnerve.errors import InvalidRequest, OpticNerveError, UnsupportedFeature
from opticnerve.media.plan import Modality
from opticnerve.models.family import Layout
from opticnerve.pb import embedding_pb2
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.errors import CLASS_BY_STATUS, STATUS_BY_NUMBER, from_detail
from opticnerve.telemetry.logs import safe_id

MAX_MESSAGE_BYTES = 7 * 2**20  # Of PromptLogprobs, which travel in one piece.
PIECE_BYTES = 2**20  # Of deltas in one message: those of a slow reader pile up.
MAX_BIAS = 1e30  # Far enough from what fp32 holds to be divided by any temperature.
MIN_REPETITION_PENALTY = 1e-3
LOGPROB_BYTES = 14
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 1000.0  # Of one share beside another.

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}

NO_NAMES: Mapping[str, str] = {}

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Accepted:
    """A checked Start."""

    request: GenerateRequest
    refs: dict[str, EmbeddingRef | None]
    rows: dict[str, int]  # Rows that the spans use, by key.
    embedding_wait_ms: int  # 0: the worker's default.
    own: Mapping[str, str]  # Names here of items that the caller brings itself, by its keys.


@dataclass(frozen=True, slots=True)
class Bounds:
    """What requests are checked against."""

    engine: EngineConfig
    layout: Layout
    max_logprobs: int


def own_items(start: pb.Start) -> dict[str, bytes]:
    """Of items that the caller brings itself, the bytes by key; b"" of those that come later."""
    own: dict[str, bytes] = {}
    for item in start.items:
        if item.own or item.ref.location.inline:
            own[item.key] = item.ref.location.inline or own.get(item.key, b"")
    return own


def read_start(start: pb.Start, bounds: Bounds, own: Mapping[str, str] = NO_NAMES) -> Accepted:
    """``own``: this worker's names of ``own_items``, which stand for the caller's keys from here
    on. Raises InvalidRequest, ContextLengthExceeded, UnsupportedFeature."""
    if start.adapter:
        raise UnsupportedFeature("adapters are not served; leave adapter empty", param="adapter")
    spans = tuple(convert.span_from_pb(span) for span in start.spans)
    if any(span.modality is Modality.AUDIO for span in spans):
        raise UnsupportedFeature("audio is not served; send pictures", param="spans")
    request = GenerateRequest(
        # Unique: a caller may try again before the first try has left the engine.
        request_id=f"{safe_id(start.request_id)}/{next(_numbers)}",
        token_ids=tuple(start.token_ids),
        spans=spans,
        items=tuple(own.get(check_key(item.key), item.key) for item in start.items),
        sampling=read_sampling(start.sampling, bounds),
        priority=start.priority,
        cache_salt=start.cache_salt,
        outputs=tuple(
            ChoiceOutput(output.choice, tuple(output.output_ids), output.finished)
            for output in start.outputs
        ),
        skip_prefix_cache=start.skip_prefix_cache,
        share=start.share,
        weight=start.weight or 1.0,
    )
    if not LEAST_WEIGHT <= request.weight <= MOST_WEIGHT:  # Not a number is in no range.
        raise InvalidRequest(
            f"weight must be between {LEAST_WEIGHT:g} and {MOST_WEIGHT:g}", param="weight"
        )
    check_request(request, bounds.engine)
    _check_prompt_logprobs(request)
    if spans:
        bounds.layout.positions(len(request.token_ids), spans)
    return Accepted(request, _refs(start, own), _rows(request), start.embedding_wait_ms, own)


def _refs(start: pb.Start, own: Mapping[str, str]) -> dict[str, EmbeddingRef | None]:
    refs: dict[str, EmbeddingRef | None] = {}
    for item in start.items:
        if item.HasField("ref") and item.ref.key != item.key:
            raise InvalidRequest("a reference has another key than its item", param="items")
        ref = read_ref(item.ref, own) if item.HasField("ref") else None
        key = own.get(item.key, item.key)
        refs[key] = ref or refs.get(key)
    return refs


def read_ref(
    message: embedding_pb2.EmbeddingRef, own: Mapping[str, str] = NO_NAMES
) -> EmbeddingRef:
    """Of the caller's own rows under their name here. Raises InvalidRequest for a reference that
    describes nothing or names no address, and for inline rows under a key that others share."""
    ref = convert.ref_from_pb(message)
    check_key(ref.key)
    if ref.location.fetch_address:
        try:
            addresses.check(ref.location.fetch_address)
        except ValueError as error:
            raise InvalidRequest(f"a reference's fetch_address: {error}", param="ref") from error
    if not ref.tensors or ref.num_rows < 1:
        raise InvalidRequest("a reference describes its tensors and rows", param="ref")
    name, inline = own.get(ref.key), ref.location.inline
    if (name is None) != (not inline):
        raise InvalidRequest(
            "rows of the caller's own come inline, and Start says of which items (own): what comes "
            "inline is used for no other item",
            param="ref",
        )
    return ref if name is None else replace(ref, key=name, location=Location(inline=inline))


def _rows(request: GenerateRequest) -> dict[str, int]:
    rows = dict.fromkeys(request.items, 0)
    for span in request.spans:
        key = request.items[span.item]
        rows[key] = max(rows[key], span.row_start + span.num_tokens)
    return rows


def _check_prompt_logprobs(request: GenerateRequest) -> None:
    count = request.sampling.prompt_logprobs
    if count is None:
        return
    if len(request.token_ids) * (count + 1) * LOGPROB_BYTES > MAX_MESSAGE_BYTES:
        raise InvalidRequest(
            "the log-probabilities of so long a prompt do not fit a message; ask for fewer",
            param="prompt_logprobs",
        )


def read_sampling(message: pb.SamplingParams, bounds: Bounds) -> SamplingParams:
    """Raises InvalidRequest or UnsupportedFeature. Zeros that mean "off" become neutral values."""
    if message.grammar:
        raise UnsupportedFeature("structured output is not served yet", param="grammar")
    _check_range(message, "temperature", 0.0, 100.0)
    _check_range(message, "top_p", 0.0, 1.0)
    _check_range(message, "min_p", 0.0, 1.0)
    _check_range(message, "frequency_penalty", -100.0, 100.0)
    _check_range(message, "presence_penalty", -100.0, 100.0)
    if message.repetition_penalty:
        _check_range(message, "repetition_penalty", MIN_REPETITION_PENALTY, 100.0)
    vocabulary = bounds.engine.vocab_size
    words = tuple(tuple(word.token_ids) for word in message.bad_words)
    _check_ids("logit_bias", message.logit_bias, vocabulary)
    _check_ids("allowed_token_ids", message.allowed_token_ids, vocabulary)
    _check_ids("bad_words", (token for word in words for token in word), vocabulary)
    if not all(abs(bias) <= MAX_BIAS for bias in message.logit_bias.values()):
        raise InvalidRequest(f"biases are within {MAX_BIAS:g} of 0", param="logit_bias")
    if not all(words):
        raise InvalidRequest("a bad word has at least one token", param="bad_words")
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        seed=message.seed,
        n=message.n or 1,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        eos_token_ids=tuple(message.eos_token_ids),
        logprobs=_logprobs(message, "logprobs", bounds),
        prompt_logprobs=_logprobs(message, "prompt_logprobs", bounds),
        logit_bias=tuple(message.logit_bias.items()),
        bad_words=words,
        allowed_token_ids=tuple(message.allowed_token_ids),
    )


def _check_range(message: pb.SamplingParams, name: str, low: float, high: float) -> None:
    if not low <= getattr(message, name) <= high:  # Not a number is in no range.
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}", param=name)


def _check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    if vocabulary and any(token >= vocabulary for token in ids):
        raise InvalidRequest(f"token ids of {name} must be below {vocabulary}", param=name)


def _logprobs(message: pb.SamplingParams, name: str, bounds: Bounds) -> int | None:
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    count = int(getattr(message, name))
    if count > bounds.max_logprobs:
        raise InvalidRequest(f"{name} is at most {bounds.max_logprobs} here", param=name)
    return count


def read_failure(message: pb.EmbeddingFailed) -> OpticNerveError:
    """The error that the caller reports for an item."""
    if message.HasField("detail"):
        return from_detail(message.detail)
    status = STATUS_BY_NUMBER.get(message.status)
    cls = CLASS_BY_STATUS.get(status, OpticNerveError) if status else OpticNerveError
    return cls("the picture could not be encoded", param=message.key)


# ---- outwards


def deltas(event: TokensEvent) -> Iterator[pb.TokenDelta]:
    """The event, in pieces of about PIECE_BYTES; what ends the choice is on the last."""
    width = len(event.logprobs[0].top) + 1 if event.logprobs else 0
    size = max(PIECE_BYTES // (4 + width * LOGPROB_BYTES), 1)
    count = len(event.token_ids)
    for begin in range(0, max(count, 1), size):
        piece = slice(begin, begin + size)
        finish = event.finish if begin + size >= count else None
        yield pb.TokenDelta(
            choice=event.choice,
            first_index=event.first_index + begin,
            token_ids=event.token_ids[piece],
            logprobs=map(position, event.logprobs[piece]),
            finish_reason=_FINISH[finish] if finish else pb.FINISH_REASON_UNSPECIFIED,
            stop_token_id=(event.stop_token_id or 0) if finish else 0,
        )


def position(logprobs: Logprobs) -> pb.PositionLogprobs:
    if logprobs.absent:
        return pb.PositionLogprobs(absent=True)
    return pb.PositionLogprobs(
        sampled=_token(logprobs.sampled), top=[_token(entry) for entry in logprobs.top]
    )


def _token(entry: tuple[int, float, int]) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry[0], logprob=entry[1], rank=entry[2])


def done(event: FinishedEvent, get_s: float) -> pb.Done:
    timings = event.timings
    return pb.Done(
        usage=pb.Usage(
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            cached_tokens=event.cached_tokens,
            embedding_tokens=event.embedding_tokens,
        ),
        timings=pb.GenerateTimings(
            queue_ms=timings.queue_ms,
            embedding_wait_ms=timings.embedding_wait_ms,
            get_ms=get_s * 1e3,
            prefill_ms=timings.prefill_ms,
            decode_ms=timings.decode_ms,
            preemptions=timings.preemptions,
        ),
    )
