"""One request's generation with failover.

References to embeddings are sent as they become known. If an LLM worker is lost, another one takes
over: a call that breaks before its first token is sent again; after that, the next worker is sent
the output of every choice so far, and continues it. No token is lost or repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, replace

import grpc

from gateway import metrics
from gateway.clock import Deadline, Stopwatch
from gateway.edge.auth import ANONYMOUS, Caller
from gateway.edge.limits import MAX_LLM_DEATHS
from gateway.workers.affinity import PromptChain
from gateway.workers.dispatch import LeaseRequest
from gateway.workers.embeddings import RequestEmbeddings
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Description, Worker, WorkerLost, call_error
from opticnerve.errors import (
    EngineFailure,
    OpticNerveError,
    Overloaded,
    Unavailable,
)
from opticnerve.generation.generate_stream import GenerateStream, StreamEvent, StreamPolicy
from opticnerve.generation.values import (
    ChoiceOutput,
    Delta,
    Done,
    PromptPiece,
    Sampling,
    Timings,
    Usage,
)
from opticnerve.media.plan import Span
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.telemetry import logs, traces

PAUSE_S = 0.02  # Between attempts.
STREAM_POLICY = StreamPolicy()


async def describe_llm(channel: grpc.aio.Channel, timeout_s: float) -> Description:
    """An LLM worker's answer to Describe."""
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


@dataclass(frozen=True)
class GenerateSpec:
    """A generation's request, the same for each worker that is tried."""

    request_id: str
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    keys: tuple[str, ...]  # Content keys of the items; spans index them.
    sampling: Sampling
    pair_id: str
    cache_salt: str = ""
    caller: Caller = ANONYMOUS
    priority: int = 0


class FailoverGeneration:
    """Runs one ``GenerateSpec`` to its end. Closing ``events()`` aborts the generation."""

    def __init__(
        self,
        spec: GenerateSpec,
        pool: WorkerPool,
        embeddings: RequestEmbeddings,
        deadline: Deadline,
        worker_wait_s: float,
        watch: Stopwatch | None = None,
    ) -> None:
        """``watch`` records the first token's wait for a worker, and its time on the wire."""
        self.prefilled: Timings | None = None  # The worker's timings up to the first token.
        self._spec = spec
        self._watch = watch or Stopwatch()
        self._prompt = PromptChain.of(
            spec.token_ids,
            spec.spans,
            spec.keys,
            spec.cache_salt,
            reads_cache=spec.sampling.prompt_logprobs is None,
        )
        self._pool = pool
        self._embeddings = embeddings
        self._deadline = deadline
        self._worker_wait_s = worker_wait_s
        self._tokens: dict[int, list[int]] = {}  # The output so far, by choice.
        self._finished: set[int] = set()  # Choices that the worker has ended.
        self._unwanted: set[int] = set()  # Choices that need no more tokens.
        self._cached_tokens = 0  # Prompt tokens from the current worker's prefix cache.
        self._scored = 0  # Prompt tokens whose log-probabilities have arrived, from any worker.

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """The events of ``GenerateStream``, each once. Raises typed errors; the module's docstring
        says what is retried."""
        deaths = 0
        refusal: OpticNerveError | None = None
        tried: set[str] = set()
        failed = ""  # Why the attempt before this one failed.
        attempts = -1
        while True:
            request = self._lease_request(tried)
            asked = time.monotonic()
            async with self._pool.lease(request, self._worker_wait_s) as worker:
                if self.prefilled is None:
                    self._watch.ended("worker_wait", asked)
                if refusal is not None and worker.address in tried:
                    raise refusal
                if failed:
                    self._count_retry(failed)
                attempts += 1
                try:
                    made = self._attempt(worker, request, attempts)
                    async with contextlib.aclosing(made) as events:
                        async for event in events:
                            yield event
                    return
                except WorkerLost as lost:
                    failed, request.failed = "lost", True
                    self._pool.report_down(worker)
                    tried.add(worker.address)
                    deaths += lost.delivered
                    if not self.complete:
                        logs.append(lost=worker.address)
                        _check_deaths(deaths, lost)
                except Overloaded as error:
                    failed, request.failed, refusal = "full", True, error
                    tried.add(worker.address)
            if self.complete:
                yield Done(self.usage())
                return
            await asyncio.sleep(PAUSE_S)

    def _lease_request(self, tried: Collection[str]) -> LeaseRequest:
        """``tried``: addresses to use only if no other worker serves."""
        return LeaseRequest(1, self._deadline, self._is_paired, tried, prompt=self._prompt)

    def _count_retry(self, reason: str) -> None:
        if self._tokens:
            metrics.FAILOVERS.inc()
        else:
            metrics.RETRIES.labels("generate", reason).inc()

    def _is_paired(self, worker: Worker) -> bool:
        return worker.description.pair_id == self._spec.pair_id

    @property
    def complete(self) -> bool:
        """Whether the worker has ended every choice."""
        return len(self._finished) == self._spec.sampling.n

    def leave(self, choice: int) -> None:
        """The choice needs no more tokens: after a failover, no worker continues it."""
        self._unwanted.add(choice)

    def usage(self) -> Usage:
        """Usage by the gateway's count, for a generation that it ends early."""
        return Usage(
            prompt_tokens=len(self._spec.token_ids),
            completion_tokens=sum(map(len, self._tokens.values())),
            cached_tokens=self._cached_tokens,
            embedding_tokens=sum(span.num_tokens for span in self._spec.spans),
        )

    # ---- one attempt

    async def _attempt(
        self, worker: Worker, lease: LeaseRequest, retry: int
    ) -> AsyncGenerator[StreamEvent, None]:
        """``lease``: the worker's lease. ``retry``: the number of earlier attempts."""
        self._deadline.check()
        metrics.LLM_CHOICES.labels(lease.reason).inc()
        logs.append(llm=worker.address, llm_by=lease.reason)
        began = time.monotonic()
        # Not the current span: this generator may be closed from another task.
        span = traces.begin(
            "Generate", calls=True, worker=worker.address, retry=retry, chosen_by=lease.reason
        )
        stream = GenerateStream(
            llm_pb2_grpc.LLMStub(worker.channel),
            self._start(),
            self._embeddings,
            self._deadline.remaining(),
            STREAM_POLICY,
            span.carrier,
        )
        scored = 0  # Prompt tokens whose log-probabilities have arrived from this worker.
        try:
            async with contextlib.aclosing(stream.events()) as received:
                async for event in received:
                    self._pool.dispatcher.prompt_computed(lease)
                    self._cached_tokens = stream.cached_tokens
                    if self.prefilled is None and isinstance(event, Delta):
                        self._note_first(stream.prefilled or Timings(), began)
                    if isinstance(event, PromptPiece):
                        yield self._score(event, scored)
                        scored += len(event.logprobs)
                    else:
                        yield self._take(event) if isinstance(event, Delta) else event
        except grpc.RpcError as error:
            failure = call_error(error, delivered=stream.delivered)
            span.fail(failure)
            raise failure from error
        finally:
            span.end()

    def _note_first(self, prefilled: Timings, began: float) -> None:
        """Records the first token of a call that began at ``began``: the time that the worker did
        not account for was spent on the wire."""
        self.prefilled = prefilled
        worker_s = (prefilled.queue_ms + prefilled.prefill_ms) / 1000
        self._watch.measured("wire", max(0.0, time.monotonic() - began - worker_s))

    def _start(self) -> pb.Start:
        spec, known = self._spec, self._embeddings.known
        ended = self._finished | self._unwanted
        return pb.Start(
            request_id=spec.request_id,
            token_ids=spec.token_ids,
            spans=[convert.span_to_pb(span) for span in spec.spans],
            items=[convert.item_to_pb(key, known(key)) for key in spec.keys],
            sampling=convert.sampling_to_pb(self._sampling()),
            priority=spec.priority,
            share=spec.caller.share,
            weight=spec.caller.weight,
            cache_salt=spec.cache_salt,
            embedding_wait_ms=max(1, int(self._deadline.remaining() * 1000)),
            outputs=[
                convert.output_to_pb(ChoiceOutput(choice, tuple(ids), choice in ended))
                for choice, ids in self._tokens.items()
            ],
        )

    def _sampling(self) -> Sampling:
        """The request's sampling. Leaves out the prompt's log-probabilities once all have arrived,
        since a worker that computes them cannot use its prefix cache."""
        if self._scored < len(self._spec.token_ids):
            return self._spec.sampling
        return replace(self._spec.sampling, prompt_logprobs=None)

    def _score(self, piece: PromptPiece, before: int) -> PromptPiece:
        """The part of a piece that is new. ``before``: the number of tokens that came before it
        from the same worker. Raises EngineFailure for more tokens than the prompt has."""
        new = piece.logprobs[max(0, self._scored - before) :]
        self._scored += len(new)
        if self._scored > len(self._spec.token_ids):
            raise EngineFailure("the LLM worker sent log-probabilities beyond the prompt's end")
        return PromptPiece(new)

    def _take(self, delta: Delta) -> Delta:
        """Adds a delta to the output. Raises EngineFailure if it does not continue its choice."""
        have = self._tokens.setdefault(delta.choice, [])
        ended = delta.choice in self._finished
        if delta.choice >= self._spec.sampling.n or ended or delta.first_index != len(have):
            raise EngineFailure("the LLM worker sent tokens out of sequence")
        have.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self._finished.add(delta.choice)
        return delta


def _check_deaths(deaths: int, last: WorkerLost) -> None:
    """Raises Unavailable, from the ``last`` loss, where too many workers died with a request."""
    if deaths > MAX_LLM_DEATHS:
        raise Unavailable(
            "the workers that served this request were lost one after another; it is not tried "
            "again"
        ) from last
