"""The LLM service on the wire: one Generate call is one request of the engine."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import grpc

from llm_service.engine.client import EngineClient
from llm_service.engine.stream import EventStream
from llm_service.metrics import TOKENS
from llm_service.policy.engine_config import check_request
from llm_service.policy.messages import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerateRequest,
    NeedRowsEvent,
    PrefilledEvent,
    PromptLogprobsEvent,
    TokensEvent,
)
from llm_service.rows.fetcher import Fetcher
from llm_service.wire.row_resolver import AskCaller, NeededRows
from llm_service.wire.stages import GenerationStages
from opticnerve import addresses
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.store import check_key
from opticnerve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    OpticNerveError,
    Unavailable,
    UnsupportedFeature,
)
from opticnerve.generation.values import MAX_WEIGHT, MIN_WEIGHT, Delta, Done, Sampling, Usage
from opticnerve.media.plan import Modality
from opticnerve.models.family import Layout
from opticnerve.pb import embedding_pb2, llm_pb2_grpc
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.calls import FINISHED, WorkerServicer
from opticnerve.rpc.errors import from_failure
from opticnerve.telemetry import logs
from opticnerve.telemetry.metrics import CACHE_LOOKUPS

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "opticnerve.v1.LLM"
START_S = 10.0  # Timeout for the Start message of a call.

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that calls need, once the checkpoint is loaded."""

    engine: EngineClient
    fetcher: Fetcher
    layout: Layout
    max_logprobs: int
    description: pb.DescribeLLMResponse  # The part that does not change.
    embedding_wait_ms: int


class LLMServicer(WorkerServicer[Loaded], llm_pb2_grpc.LLMServicer):
    """See ``llm.proto``. Generate raises Unavailable while the server drains."""

    worker, kind = "the LLM worker", "llm"

    async def Generate(  # type: ignore[override]  # It writes to its context.
        self, request_iterator: AsyncIterator[pb.GenerateIn], context: Context
    ) -> None:
        async with self.server.running.work():
            loaded = self.require_loaded()
            start = await _first(request_iterator)
            if self.server.running.draining or not loaded.engine.alive:
                raise Unavailable("the LLM worker is stopping; use another", retry_after_s=1.0)
            received_at = time.perf_counter()
            logs.identify(start.request_id)
            logs.note(prompt_tokens=len(start.token_ids), items=len(start.items) or None)
            local_names = await loaded.fetcher.names(inline_items(start))
            call = GenerateCall(loaded, start, local_names, context, received_at)
            await call.run(request_iterator)

    async def Describe(
        self, request: pb.DescribeLLMRequest, context: Context
    ) -> pb.DescribeLLMResponse:
        return self.describe()

    def describe(self) -> pb.DescribeLLMResponse:
        loaded = self.require_loaded()
        stats, limits, fetcher = loaded.engine.stats, loaded.description.limits, loaded.fetcher
        answer = pb.DescribeLLMResponse(
            load=pb.LLMLoad(
                running=stats.running,
                waiting=stats.waiting,
                free_kv_blocks=stats.free_blocks if stats.steps else limits.num_kv_blocks,
                draining=self.server.running.draining,
            ),
            store=convert.store_state_to_pb(fetcher.store.state, fetcher.seal),
            instance_id=self.server.instance_id,
        )
        answer.MergeFrom(loaded.description)
        return answer


class GenerateCall:
    """One Generate call: sends the engine's events, receives references.

    When the call ends, for whatever reason, the engine has released the request.
    """

    def __init__(
        self,
        loaded: Loaded,
        start: pb.Start,
        local_names: Mapping[str, str],
        context: Context,
        received_at: float,
    ) -> None:
        """Raises the errors of ``read_start``."""
        self._loaded = loaded
        self._context = context
        request = read_start(start, loaded, local_names)
        self._request = replace(request, received_at=received_at)
        self._local_names = local_names
        self._keys = {name: key for key, name in local_names.items()}
        self._stages = GenerationStages(len(request.token_ids), received_at)
        self._broken: Exception | None = None  # The error of an invalid message after Start.
        self._tokens = 0  # Sent so far, of all choices.
        self._stream: EventStream
        self._needed = NeededRows(
            self._request.request_id,
            read_refs(start, local_names),
            rows_used(self._request),
            (start.embedding_wait_ms or loaded.embedding_wait_ms) / 1e3,
            loaded.engine,
            loaded.fetcher,
            lambda asked: self._stream.push(asked),
            self._request.sampling.n,
        )

    async def run(self, messages: AsyncIterator[pb.GenerateIn]) -> None:
        with self._loaded.fetcher.hold_own(self._keys):
            try:
                self._stream = self._loaded.engine.submit(self._request)
            except BaseException:
                self._needed.close()
                raise
            reader = asyncio.create_task(self._read(messages))
            try:
                while batch := await self._stream.read():
                    if self._broken is not None:
                        raise self._broken
                    for message in self._messages(batch):
                        await self._context.write(message)
            finally:
                logs.note(completion_tokens=self._tokens)
                self._stages.ended(self._tokens, self._needed.get_s)
                reader.cancel()
                self._needed.close()
                await asyncio.shield(asyncio.create_task(self._stream.release()))

    def _messages(self, batch: Iterable[Event]) -> Iterator[pb.GenerateOut]:
        """Converts the engine's events to messages, each made when the one before has been sent.
        Raises the request's error if it failed."""
        out = pb.GenerateOut()
        for event in batch:
            match event:
                case TokensEvent(delta=delta):
                    self._note(delta)
                    for piece in convert.delta_pieces(delta):
                        if out.ByteSize() >= convert.PIECE_BYTES:
                            yield out
                            out = pb.GenerateOut()
                        out.deltas.append(piece)
                case AskCaller(keys=()):
                    pass  # Sent by ``_read`` to wake ``run``, which raises the caller's error.
                case AskCaller():
                    out.embedding_needed.CopyFrom(self._embedding_needed(event))
                    yield out
                    out = pb.GenerateOut()
                case NeedRowsEvent():
                    self._needed.wanted(event.keys, event.preempted)
                case PrefilledEvent():
                    self._stages.prefilled(event)
                    timings = convert.timings_to_pb(event.timings)
                    prefilled = pb.Prefilled(cached_tokens=event.cached_tokens, timings=timings)
                    out.prefilled.CopyFrom(prefilled)
                case PromptLogprobsEvent(positions=positions):
                    for part in convert.prompt_pieces(positions):
                        out.prompt_logprobs.CopyFrom(part)
                        yield out
                        out = pb.GenerateOut()
                case FinishedEvent():
                    out.done.CopyFrom(self._done(event))
                case FailedEvent(error=error):
                    if isinstance(error, OpticNerveError):
                        error.param = self._keys.get(error.param or "", error.param)
                    raise error
                case AbortedEvent():
                    raise Unavailable("the LLM worker is stopping; use another", retry_after_s=1.0)
        if out.ByteSize():
            yield out

    def _embedding_needed(self, event: AskCaller) -> pb.EmbeddingNeeded:
        """Asks for rows by the keys that the caller gave."""
        return pb.EmbeddingNeeded(
            keys=[self._keys.get(key, key) for key in event.keys],
            reason=pb.NeededReason.Value(f"NEEDED_REASON_{event.reason}"),
        )

    def _done(self, event: FinishedEvent) -> pb.Done:
        done = Done(event.usage, replace(event.timings, get_ms=self._needed.get_s * 1e3))
        count(done.usage)
        self._stages.done(done.timings)
        timings = done.timings
        logs.note(
            ended=FINISHED,
            queue_ms=timings.queue_ms,
            embedding_wait_ms=timings.embedding_wait_ms or None,
            get_ms=timings.get_ms if event.usage.embedding_tokens else None,
            prefill_ms=timings.prefill_ms,
            decode_ms=timings.decode_ms,
            preemptions=timings.preemptions or None,
        )
        return convert.done_to_pb(done)

    def _note(self, delta: Delta) -> None:
        self._tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            logs.append(finish=delta.finish_reason.value)

    async def _read(self, messages: AsyncIterator[pb.GenerateIn]) -> None:
        """Reads what the caller sends after Start."""
        try:
            async for message in messages:
                match message.WhichOneof("message"):
                    case "embedding_ready":
                        ref = read_ref(message.embedding_ready.ref, self._local_names)
                        await self._loaded.fetcher.check_own(ref)
                        self._needed.ready(ref)
                    case "embedding_failed":
                        failure = message.embedding_failed
                        key = self._local_names.get(failure.key, failure.key)
                        self._needed.failed(key, from_failure(failure))
                    case _:
                        raise InvalidRequest(
                            "after Start, send only EmbeddingReady and EmbeddingFailed"
                        )
        except grpc.RpcError:
            pass  # The call has ended; the writing side reports why.
        except Exception as error:
            self._broken = error
            self._stream.push(AskCaller(self._request.request_id, ()))


# ---- a Start


async def _first(messages: AsyncIterator[pb.GenerateIn]) -> pb.Start:
    """The Start message. Raises DeadlineExceeded, and InvalidRequest if another comes first."""
    try:
        async with asyncio.timeout(START_S):
            first = await anext(aiter(messages), None)
    except TimeoutError as error:
        raise DeadlineExceeded(f"no Start arrived within {START_S:g} s") from error
    if first is None or not first.HasField("start"):
        raise InvalidRequest("the first message of Generate must be Start", param="start")
    return first.start


def inline_items(start: pb.Start) -> dict[str, bytes]:
    """The inline rows of a Start, by key; b"" for those that EmbeddingReady brings later."""
    found: dict[str, bytes] = {}
    for item in start.items:
        if item.own or item.ref.location.inline:
            found[item.key] = item.ref.location.inline or found.get(item.key, b"")
    return found


def read_start(start: pb.Start, loaded: Loaded, local_names: Mapping[str, str]) -> GenerateRequest:
    """Converts and checks a Start. ``local_names``: this worker's names of ``inline_items``, by the
    caller's keys, which they replace. Raises InvalidRequest, ContextLengthExceeded,
    UnsupportedFeature."""
    if start.adapter:
        raise UnsupportedFeature("adapters are not served; leave adapter empty", param="adapter")
    spans = tuple(convert.span_from_pb(span) for span in start.spans)
    if any(span.modality is Modality.AUDIO for span in spans):
        raise UnsupportedFeature("audio is not served; send pictures", param="spans")
    request = GenerateRequest(
        # Made unique: a caller may retry before the engine has released the first attempt.
        request_id=f"{logs.safe_id(start.request_id)}/{next(_numbers)}",
        token_ids=tuple(start.token_ids),
        spans=spans,
        items=tuple(local_names.get(check_key(item.key), item.key) for item in start.items),
        sampling=_sampling(start.sampling, loaded),
        priority=start.priority,
        cache_salt=start.cache_salt,
        outputs=tuple(map(convert.output_from_pb, start.outputs)),
        skip_prefix_cache=start.skip_prefix_cache,
        share=start.share,
        weight=start.weight or 1.0,
    )
    if not MIN_WEIGHT <= request.weight <= MAX_WEIGHT:  # Also true of NaN.
        raise InvalidRequest(
            f"weight must be between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}", param="weight"
        )
    check_request(request, loaded.engine.config)
    if spans:
        loaded.layout.positions(len(request.token_ids), spans)
    return request


def read_refs(start: pb.Start, local_names: Mapping[str, str]) -> dict[str, EmbeddingRef | None]:
    """References by key; None where EmbeddingReady will bring it. Raises InvalidRequest."""
    refs: dict[str, EmbeddingRef | None] = {}
    for item in start.items:
        if item.HasField("ref") and item.ref.key != item.key:
            raise InvalidRequest("an item's reference must have the item's key", param="items")
        ref = read_ref(item.ref, local_names) if item.HasField("ref") else None
        key = local_names.get(item.key, item.key)
        refs[key] = ref or refs.get(key)
    return refs


def read_ref(message: embedding_pb2.EmbeddingRef, local_names: Mapping[str, str]) -> EmbeddingRef:
    """The reference; one with inline rows gets its local name. Raises InvalidRequest if it has no
    tensors or a wrong address, or if its inline rows do not belong to an ``own`` item."""
    ref = convert.ref_from_pb(message)
    check_key(ref.key)
    if ref.location.fetch_address:
        try:
            addresses.check_host_port(ref.location.fetch_address)
        except ValueError as error:
            raise InvalidRequest(f"a reference's fetch_address: {error}", param="ref") from error
    if not ref.tensors or ref.num_rows < 1:
        raise InvalidRequest("a reference must list its tensors and num_rows >= 1", param="ref")
    name, inline = local_names.get(ref.key), ref.location.inline
    if (name is None) != (not inline):
        raise InvalidRequest(
            "items with inline rows, and only those, must be marked own=true in Start",
            param="ref",
        )
    return ref if name is None else replace(ref, key=name, location=Location(inline=inline))


def rows_used(request: GenerateRequest) -> dict[str, int]:
    """How many rows of each item the spans use, by key."""
    rows = dict.fromkeys(request.items, 0)
    for span in request.spans:
        key = request.items[span.item]
        rows[key] = max(rows[key], span.row_start + span.num_tokens)
    return rows


def _sampling(message: pb.SamplingParams, loaded: Loaded) -> Sampling:
    """Raises InvalidRequest or UnsupportedFeature."""
    sampling = convert.sampling_from_pb(message)
    vocabulary = loaded.engine.config.vocab_size
    for name, ids in (
        ("logit_bias", sampling.logit_bias),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("bad_words", itertools.chain.from_iterable(sampling.bad_words)),
    ):
        if vocabulary and max(ids, default=0) >= vocabulary:
            raise InvalidRequest(f"token ids of {name} must be below {vocabulary}", param=name)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(sampling, name) or 0) > loaded.max_logprobs:
            raise InvalidRequest(f"{name} is at most {loaded.max_logprobs} here", param=name)
    return sampling


# ---- metrics


def count(usage: Usage) -> None:
    """Counts the tokens of a finished request."""
    tokens = TOKENS
    tokens.labels(kind="prompt").inc(usage.prompt_tokens)
    tokens.labels(kind="cached").inc(usage.cached_tokens)
    tokens.labels(kind="image").inc(usage.embedding_tokens)
    tokens.labels(kind="completion").inc(usage.completion_tokens)
    prefix = "hit" if usage.cached_tokens else "miss"
    CACHE_LOOKUPS.labels(tier="prefix", result=prefix).inc()
