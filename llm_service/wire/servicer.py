"""The LLM service on the wire: one Generate call is one request of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from llm_service import metrics
from llm_service.engine.client import EngineClient
from llm_service.engine.stream import EventStream
from llm_service.policy.protocol import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    NeedRowsEvent,
    PrefilledEvent,
    PromptLogprobsEvent,
    TokensEvent,
)
from llm_service.rows.fetcher import Fetcher
from llm_service.wire import messages as wire
from llm_service.wire.messages import Accepted, Bounds
from llm_service.wire.needed_rows import AskCaller, NeededRows
from opticnerve.errors import DeadlineExceeded, InvalidRequest, OpticNerveError, Unavailable
from opticnerve.generation.values import Delta, Done
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.calls import FINISHED, WorkerServicer
from opticnerve.telemetry import logs

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "opticnerve.v1.LLM"
RELEASE_TIMEOUT_S = 30.0  # The engine ends its step and releases an aborted request.
START_S = 10.0  # How long a call waits for its Start message.

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that calls need, once the checkpoint is loaded."""

    engine: EngineClient
    fetcher: Fetcher
    bounds: Bounds
    description: pb.DescribeLLMResponse  # The part that does not change.
    embedding_wait_ms: int


class LLMServicer(WorkerServicer[Loaded], llm_pb2_grpc.LLMServicer):
    """See ``llm.proto``. Generate raises Unavailable while the server drains."""

    worker = "the LLM worker"

    async def Generate(  # type: ignore[override]  # It writes to its context.
        self, request_iterator: AsyncIterator[pb.GenerateIn], context: Context
    ) -> None:
        async with self.server.running.work():
            await self._generate(request_iterator, context)

    async def _generate(
        self, request_iterator: AsyncIterator[pb.GenerateIn], context: Context
    ) -> None:
        loaded = self.require_loaded()
        try:
            async with asyncio.timeout(START_S):
                first = await anext(aiter(request_iterator), None)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no Start came within {START_S:g} s") from error
        if first is None or not first.HasField("start"):
            raise InvalidRequest("the first message of Generate is Start", param="start")
        if self.server.running.draining or not loaded.engine.alive:
            raise Unavailable("the LLM worker is stopping; use another", retry_after_s=1.0)
        logs.identify(first.start.request_id)
        logs.note(prompt_tokens=len(first.start.token_ids), items=len(first.start.items) or None)
        local_names = await loaded.fetcher.names(wire.inline_items(first.start))
        accepted = wire.read_start(first.start, loaded.bounds, local_names)
        await GenerateCall(loaded, accepted, context).run(request_iterator)

    async def Describe(
        self, request: pb.DescribeLLMRequest, context: Context
    ) -> pb.DescribeLLMResponse:
        loaded = self.require_loaded()
        stats, limits, fetcher = loaded.engine.stats, loaded.description.limits, loaded.fetcher
        answer = pb.DescribeLLMResponse(
            load=pb.LLMLoad(
                running=stats.running,
                waiting=stats.waiting,
                free_kv_blocks=stats.free_blocks if stats.steps else limits.num_kv_blocks,
                draining=self.server.running.draining,
            ),
            store=convert.store_state_to_pb(fetcher.store_state, fetcher.seal),
        )
        answer.MergeFrom(loaded.description)
        return answer


class GenerateCall:
    """One Generate call: the engine's events go out, references come in.

    However the call ends, the engine then holds nothing of it.
    """

    def __init__(self, loaded: Loaded, accepted: Accepted, context: Context) -> None:
        self._loaded = loaded
        self._context = context
        self._request = accepted.request
        self._local_names = accepted.local_names
        self._keys = {name: key for key, name in accepted.local_names.items()}
        self._started = time.perf_counter()
        self._broken: Exception | None = None  # What is wrong with a message after Start.
        self._tokens = 0  # Written so far, all choices together.
        self._stream: EventStream
        self._needed = NeededRows(
            accepted.request.request_id,
            accepted.refs,
            accepted.rows,
            (accepted.embedding_wait_ms or loaded.embedding_wait_ms) / 1e3,
            loaded.engine,
            loaded.fetcher,
            lambda asked: self._stream.push(asked),
            accepted.request.sampling.n,
        )

    async def run(self, messages: AsyncIterator[pb.GenerateIn]) -> None:
        with self._loaded.fetcher.own.hold(self._keys):
            self._stream = self._loaded.engine.submit(self._request)
            reader = asyncio.create_task(self._read(messages))
            try:
                while batch := await self._stream.read():
                    if self._broken is not None:
                        raise self._broken
                    for message in self._messages(batch):
                        await self._context.write(message)
            finally:
                logs.note(completion_tokens=self._tokens)
                reader.cancel()
                self._needed.close()
                released = release(self._loaded.engine, self._stream)
                await asyncio.shield(asyncio.create_task(released))

    def _messages(self, batch: Iterable[Event]) -> list[pb.GenerateOut]:
        """The messages for events of the engine. Raises the error of a request that failed."""
        out = [pb.GenerateOut()]
        for event in batch:
            match event:
                case TokensEvent(delta=delta):
                    self._note(delta)
                    for piece in wire.deltas(delta):
                        if out[-1].ByteSize() >= wire.PIECE_BYTES:
                            out.append(pb.GenerateOut())
                        out[-1].deltas.append(piece)
                case AskCaller(keys=()):
                    pass  # A later message was wrong: ``run`` raises its error.
                case AskCaller():
                    needed = pb.EmbeddingNeeded(
                        keys=[self._keys.get(key, key) for key in event.keys],
                        reason=pb.NeededReason.Value(f"NEEDED_REASON_{event.reason}"),
                    )
                    out += (pb.GenerateOut(embedding_needed=needed), pb.GenerateOut())
                case NeedRowsEvent():
                    self._needed.wanted(event.keys, event.preempted)
                case PrefilledEvent():
                    logs.note(
                        cached_tokens=event.cached_tokens,
                        ttft_ms=(time.perf_counter() - self._started) * 1e3,
                    )
                    out[-1].prefilled.CopyFrom(pb.Prefilled(cached_tokens=event.cached_tokens))
                case PromptLogprobsEvent():
                    positions = pb.PromptLogprobs(
                        positions=map(convert.position_to_pb, event.positions)
                    )
                    out += (pb.GenerateOut(prompt_logprobs=positions), pb.GenerateOut())
                case FinishedEvent():
                    out[-1].done.CopyFrom(self._done(event))
                case FailedEvent(error=error):
                    if isinstance(error, OpticNerveError):
                        error.param = self._keys.get(error.param or "", error.param)
                    raise error
                case AbortedEvent():
                    raise Unavailable("the LLM worker is stopping; use another", retry_after_s=1.0)
        return [message for message in out if message.ByteSize()]

    def _done(self, event: FinishedEvent) -> pb.Done:
        done = Done(event.usage, replace(event.timings, get_ms=self._needed.get_s * 1e3))
        observe(done)
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
                        ref = wire.read_ref(message.embedding_ready.ref, self._local_names)
                        await self._loaded.fetcher.check_own(ref)
                        self._needed.ready(ref)
                    case "embedding_failed":
                        failure = message.embedding_failed
                        key = self._local_names.get(failure.key, failure.key)
                        self._needed.failed(key, wire.read_failure(failure))
                    case _:
                        raise InvalidRequest("a call has one Start, its first message")
        except grpc.RpcError:
            pass  # The call has ended; the writing side reports why.
        except Exception as error:
            self._broken = error
            self._stream.push(AskCaller(self._request.request_id, ()))


async def release(engine: EngineClient, stream: EventStream) -> None:
    """Ends a request that may still run, and waits until the engine has released it."""
    if not stream.ended:
        engine.abort(stream.request_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                while await stream.read():
                    pass
        if not stream.ended:
            log.error("the engine does not release an aborted request")
    stream.close()


def observe(done: Done) -> None:
    """Counts a finished request."""
    usage, timings = done.usage, done.timings
    tokens = metrics.TOKENS
    tokens.labels(kind="prompt").inc(usage.prompt_tokens)
    tokens.labels(kind="cached").inc(usage.cached_tokens)
    tokens.labels(kind="image").inc(usage.embedding_tokens)
    tokens.labels(kind="completion").inc(usage.completion_tokens)
    prefix = "hit" if usage.cached_tokens else "miss"
    metrics.CACHE_LOOKUPS.labels(tier="prefix", result=prefix).inc()
    stages = metrics.STAGE_SECONDS
    stages.labels(stage="prefill").observe(timings.prefill_ms / 1e3)
    stages.labels(stage="decode").observe(timings.decode_ms / 1e3)
    if usage.embedding_tokens:
        stages.labels(stage="get").observe(timings.get_ms / 1e3)
