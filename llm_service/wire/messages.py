"""Messages of ``llm.proto`` as the engine's values, and the checks of a Start that need no engine.

What is wrong with a Start is an InvalidRequest that names the field.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llm_service.policy.limits import EngineConfig, check_request
from llm_service.policy.protocol import GenerateRequest
from opticnerve import addresses
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.store import check_key
from opticnerve.errors import InvalidRequest, OpticNerveError, UnsupportedFeature
from opticnerve.generation.values import Delta, Sampling
from opticnerve.media.plan import Modality
from opticnerve.models.family import Layout
from opticnerve.pb import embedding_pb2
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.errors import CLASS_BY_STATUS, STATUS_BY_NUMBER, from_detail
from opticnerve.telemetry.logs import safe_id

MAX_MESSAGE_BYTES = 7 * 2**20  # PromptLogprobs travel in one message.
PIECE_BYTES = 2**20  # Deltas of one message: those for a slow reader pile up.
LOGPROB_BYTES = 14
MIN_WEIGHT, MAX_WEIGHT = 0.01, 1000.0  # Weight of one share, relative to others'.

NO_NAMES: Mapping[str, str] = {}

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Accepted:
    """A checked Start."""

    request: GenerateRequest
    refs: dict[str, EmbeddingRef | None]
    rows: dict[str, int]  # How many rows the spans use, by key.
    embedding_wait_ms: int  # 0: the worker's default.
    local_names: Mapping[str, str]  # See ``read_start``.


@dataclass(frozen=True, slots=True)
class Bounds:
    """What requests are checked against."""

    engine: EngineConfig
    layout: Layout
    max_logprobs: int


def inline_items(start: pb.Start) -> dict[str, bytes]:
    """The bytes of items whose rows the caller sends itself, by key; b"" if they come later."""
    found: dict[str, bytes] = {}
    for item in start.items:
        if item.own or item.ref.location.inline:
            found[item.key] = item.ref.location.inline or found.get(item.key, b"")
    return found


def read_start(
    start: pb.Start, bounds: Bounds, local_names: Mapping[str, str] = NO_NAMES
) -> Accepted:
    """``local_names``: this worker's names of ``inline_items``, by the caller's keys, which they
    replace. Raises InvalidRequest, ContextLengthExceeded, UnsupportedFeature."""
    if start.adapter:
        raise UnsupportedFeature("adapters are not served; leave adapter empty", param="adapter")
    spans = tuple(convert.span_from_pb(span) for span in start.spans)
    if any(span.modality is Modality.AUDIO for span in spans):
        raise UnsupportedFeature("audio is not served; send pictures", param="spans")
    request = GenerateRequest(
        # Made unique: a caller may retry before the engine has let go of the first attempt.
        request_id=f"{safe_id(start.request_id)}/{next(_numbers)}",
        token_ids=tuple(start.token_ids),
        spans=spans,
        items=tuple(local_names.get(check_key(item.key), item.key) for item in start.items),
        sampling=_sampling(start.sampling, bounds),
        priority=start.priority,
        cache_salt=start.cache_salt,
        outputs=tuple(map(convert.output_from_pb, start.outputs)),
        skip_prefix_cache=start.skip_prefix_cache,
        share=start.share,
        weight=start.weight or 1.0,
    )
    if not MIN_WEIGHT <= request.weight <= MAX_WEIGHT:  # Not a number is in no range.
        raise InvalidRequest(
            f"weight must be between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}", param="weight"
        )
    check_request(request, bounds.engine)
    _check_prompt_logprobs(request)
    if spans:
        bounds.layout.positions(len(request.token_ids), spans)
    refs = _refs(start, local_names)
    return Accepted(request, refs, _rows(request), start.embedding_wait_ms, local_names)


def _refs(start: pb.Start, local_names: Mapping[str, str]) -> dict[str, EmbeddingRef | None]:
    refs: dict[str, EmbeddingRef | None] = {}
    for item in start.items:
        if item.HasField("ref") and item.ref.key != item.key:
            raise InvalidRequest("a reference has another key than its item", param="items")
        ref = read_ref(item.ref, local_names) if item.HasField("ref") else None
        key = local_names.get(item.key, item.key)
        refs[key] = ref or refs.get(key)
    return refs


def read_ref(
    message: embedding_pb2.EmbeddingRef, local_names: Mapping[str, str] = NO_NAMES
) -> EmbeddingRef:
    """The reference; one with inline rows gets its local name. Raises InvalidRequest if it
    describes nothing, if its address is none, and for inline rows under a key that others share."""
    ref = convert.ref_from_pb(message)
    check_key(ref.key)
    if ref.location.fetch_address:
        try:
            addresses.check_host_port(ref.location.fetch_address)
        except ValueError as error:
            raise InvalidRequest(f"a reference's fetch_address: {error}", param="ref") from error
    if not ref.tensors or ref.num_rows < 1:
        raise InvalidRequest("a reference describes its tensors and rows", param="ref")
    name, inline = local_names.get(ref.key), ref.location.inline
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


def _sampling(message: pb.SamplingParams, bounds: Bounds) -> Sampling:
    """Raises InvalidRequest or UnsupportedFeature."""
    if message.grammar:
        raise UnsupportedFeature("structured output is not served yet", param="grammar")
    sampling = convert.sampling_from_pb(message)
    vocabulary = bounds.engine.vocab_size
    for name, ids in (
        ("logit_bias", sampling.logit_bias),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("bad_words", itertools.chain.from_iterable(sampling.bad_words)),
    ):
        if vocabulary and max(ids, default=0) >= vocabulary:
            raise InvalidRequest(f"token ids of {name} must be below {vocabulary}", param=name)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(sampling, name) or 0) > bounds.max_logprobs:
            raise InvalidRequest(f"{name} is at most {bounds.max_logprobs} here", param=name)
    return sampling


def read_failure(message: pb.EmbeddingFailed) -> OpticNerveError:
    """The error that the caller reports for an item that it could not get."""
    if message.HasField("detail"):
        return from_detail(message.detail)
    status = STATUS_BY_NUMBER.get(message.status)
    cls = CLASS_BY_STATUS.get(status, OpticNerveError) if status else OpticNerveError
    return cls("the picture could not be encoded", param=message.key)


# ---- outwards


def deltas(delta: Delta) -> Iterator[pb.TokenDelta]:
    """The delta in pieces of about PIECE_BYTES; what ends the choice is on the last."""
    width = len(delta.logprobs[0].top) + 1 if delta.logprobs else 0
    size = max(PIECE_BYTES // (4 + width * LOGPROB_BYTES), 1)
    count = len(delta.token_ids)
    if count <= size:
        yield convert.delta_to_pb(delta)
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
        yield convert.delta_to_pb(piece)
