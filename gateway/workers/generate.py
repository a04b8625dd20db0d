"""One generation with failover: another LLM worker continues it when its worker is lost.

A call that breaks before its first token is sent again. One that breaks later continues on another
worker, which gets the output of every choice so far: no token is lost or comes twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from gateway.edge.auth import ANONYMOUS, Caller
from gateway.edge.deadline import Deadline
from gateway.edge.limits import MAX_LLM_DEATHS
from gateway.workers.dispatch import LeaseRequest
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Description, Worker, WorkerLost, call_error
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import EngineFailure, OpticNerveError, Overloaded, Unavailable
from opticnerve.generation.stream import GenerateStream, ReferenceSource, StreamPolicy
from opticnerve.generation.values import ChoiceOutput, Delta, Done, Sampling, Usage
from opticnerve.media.plan import Span
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.telemetry import logs

PAUSE_S = 0.02  # Between attempts.
POLICY = StreamPolicy()


async def describe_llm(channel: grpc.aio.Channel, timeout_s: float) -> Description:
    """What an LLM worker reports about itself."""
    answer = await llm_pb2_grpc.LLMStub(channel).Describe(
        pb.DescribeLLMRequest(), timeout=timeout_s
    )
    description = Description.read(
        answer,
        cost=answer.load.running + answer.load.waiting,
        extra={"attention": answer.attention},
    )
    description.limits["vocab_size"] = answer.vocab_size
    return description


class RequestReferences(ReferenceSource, Protocol):
    """The references of one request."""

    def known(self, key: str) -> EmbeddingRef | None:
        """The reference, or None if it is not here yet."""
        ...


@dataclass(frozen=True)
class GenerateSpec:
    """What to generate; the same for every worker that is tried."""

    request_id: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    keys: tuple[str, ...]  # Content keys of the items; spans index them.
    sampling: Sampling
    pair_id: str
    cache_salt: str = ""
    caller: Caller = ANONYMOUS
    priority: int = 0


@dataclass
class _Progress:
    """The output so far, by choice."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)  # Choices that the worker has ended.
    unwanted: set[int] = field(default_factory=set)  # Choices that need no more tokens.
    cached_tokens: int = 0  # Prompt tokens that the current worker took from its prefix cache.

    @property
    def total(self) -> int:
        return sum(len(ids) for ids in self.tokens.values())

    def outputs(self) -> list[ChoiceOutput]:
        """For the next worker: the output of every choice that has begun."""
        ended = self.finished | self.unwanted
        return [ChoiceOutput(i, tuple(ids), i in ended) for i, ids in self.tokens.items()]


class FailoverGeneration:
    """Runs one ``GenerateSpec`` to its end. Closing ``events()`` aborts the generation."""

    def __init__(
        self,
        spec: GenerateSpec,
        pool: WorkerPool,
        embeddings: RequestReferences,
        deadline: Deadline,
        worker_wait_s: float,
    ) -> None:
        self.spec = spec
        self.pool = pool
        self.embeddings = embeddings
        self.deadline = deadline
        self.worker_wait_s = worker_wait_s
        self.choices = spec.sampling.n
        self.worker = ""  # Address of the current one.
        self._progress = _Progress()

    async def events(self) -> AsyncGenerator[Delta | Done, None]:
        """Deltas, then Done. Raises typed errors; the module's docstring says what is retried."""
        deaths = 0
        refusal: OpticNerveError | None = None
        tried: set[str] = set()
        while True:
            request = LeaseRequest(1, self.deadline, self._is_paired, avoid=tried)
            async with self.pool.lease(request, self.worker_wait_s) as worker:
                if refusal is not None and worker.address in tried:
                    raise refusal
                try:
                    async with contextlib.aclosing(self._attempt(worker)) as events:
                        async for event in events:
                            yield event
                    return
                except WorkerLost as lost:
                    self.pool.report_down(worker)
                    tried.add(worker.address)
                    deaths += lost.delivered
                    self._check_retry(lost, deaths)
                except Overloaded as error:
                    refusal = error
                    tried.add(worker.address)
            if self.complete:
                yield Done(self.usage())
                return
            await asyncio.sleep(PAUSE_S)

    def _is_paired(self, worker: Worker) -> bool:
        return worker.description.pair_id == self.spec.pair_id

    def _check_retry(self, lost: WorkerLost, deaths: int) -> None:
        """Raises Unavailable if too many workers were lost while they had the generation."""
        if self.complete:
            return
        logs.append(lost=self.worker)
        if deaths > MAX_LLM_DEATHS:
            raise Unavailable(
                "the workers that served this request were lost one after another; "
                "it is not tried again"
            ) from lost

    @property
    def complete(self) -> bool:
        """Whether the worker has ended every choice."""
        return len(self._progress.finished) == self.choices

    def leave(self, choice: int) -> None:
        """The choice needs no more tokens: after a failover, no worker continues it."""
        self._progress.unwanted.add(choice)

    def usage(self) -> Usage:
        """Usage by our own count, for a generation that is left before its end."""
        item_tokens = sum(span.num_tokens for span in self.spec.spans)
        progress = self._progress
        return Usage(len(self.spec.token_ids), progress.total, progress.cached_tokens, item_tokens)

    # ---- one attempt

    async def _attempt(self, worker: Worker) -> AsyncGenerator[Delta | Done, None]:
        self.deadline.check()
        self.worker = worker.address
        logs.append(llm=worker.address)
        stream = GenerateStream(
            llm_pb2_grpc.LLMStub(worker.channel),
            self._start(),
            self.embeddings,
            self.deadline.remaining(),
            POLICY,
        )
        try:
            async with contextlib.aclosing(stream.events()) as received:
                async for event in received:
                    self._progress.cached_tokens = stream.cached_tokens
                    yield self._take(event) if isinstance(event, Delta) else event
        except grpc.RpcError as error:
            raise call_error(error, delivered=stream.delivered) from error

    def _start(self) -> pb.Start:
        spec = self.spec
        known = self.embeddings.known
        return pb.Start(
            request_id=spec.request_id,
            token_ids=spec.token_ids,
            spans=[convert.span_to_pb(span) for span in spec.spans],
            items=[convert.item_to_pb(key, known(key)) for key in spec.keys],
            sampling=convert.sampling_to_pb(spec.sampling),
            priority=spec.priority,
            share=spec.caller.share,
            weight=spec.caller.weight,
            cache_salt=spec.cache_salt,
            embedding_wait_ms=max(1, int(self.deadline.remaining() * 1000)),
            outputs=map(convert.output_to_pb, self._progress.outputs()),
        )

    def _take(self, delta: Delta) -> Delta:
        """Adds a delta to the output. Raises EngineFailure if it does not continue its choice."""
        have = self._progress.tokens.setdefault(delta.choice, [])
        ended = delta.choice in self._progress.finished
        if delta.choice >= self.choices or ended or delta.first_index != len(have):
            raise EngineFailure("the LLM worker does not continue the answer where it stood")
        have.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self._progress.finished.add(delta.choice)
        return delta
