"""One generation, which may outlive the worker that began it.

A call that breaks before its first token is sent again; one that breaks later goes on elsewhere
with the output of every choice so far, so that no token is lost or comes twice. References to
embeddings travel in the Start message where they are known, as EmbeddingReady when they come, and
again when the worker says EmbeddingNeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import grpc

from gateway.edge.auth import ANONYMOUS, Caller
from gateway.edge.deadline import Deadline
from gateway.workers.lost import WorkerLost, lost_or_typed
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Description, Worker
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import EngineFailure, OpticNerveError, Overloaded, Unavailable
from opticnerve.generation import messages as llm_messages
from opticnerve.generation.values import ChoiceOutput, Delta, Done, Sampling, Usage
from opticnerve.media.plan import Span
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.telemetry import events

log = logging.getLogger(__name__)

MAX_DEATHS = 2  # Workers that one generation may take with it before it is given up.
PAUSE_S = 0.02
FAIL_GRACE_S = 1.0  # That a worker gets to fail a sequence whose item will not come.

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.GenerateIn, pb.GenerateOut]


async def describe(channel: grpc.aio.Channel, timeout_s: float) -> Description:
    """What an LLM worker says of itself."""
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
        store=convert.store_state_from_pb(answer.store),
        extra={"attention": answer.attention},
    )


class Embeddings(Protocol):
    """Where a generation gets the references that it needs; one request's own."""

    def known(self, key: str) -> EmbeddingRef | None:
        """The reference, if it is here without waiting."""
        ...

    async def ready(self, key: str) -> EmbeddingRef:
        """Waits for the reference. Raises what encoding raised."""
        ...

    async def again(self, key: str, reason: str) -> EmbeddingRef:
        """A new reference for rows that a worker could not find."""
        ...


@dataclass(frozen=True)
class GenerateSpec:
    """What is generated: the same for every worker that works on it."""

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
    """What was handed on so far, of every choice."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)  # The worker has ended them.
    left: set[int] = field(default_factory=set)  # Nobody wants more of them.
    cached_tokens: int = 0  # Of the prompt, as the worker said that is at work.

    @property
    def total(self) -> int:
        return sum(len(ids) for ids in self.tokens.values())

    def outputs(self) -> list[ChoiceOutput]:
        """What the next worker has to know: every choice that has begun."""
        ended = self.finished | self.left
        return [ChoiceOutput(i, tuple(ids), i in ended) for i, ids in self.tokens.items()]


class Generation:
    """Runs one ``GenerateSpec`` to its end. Closing ``events()`` aborts the sequence."""

    def __init__(
        self,
        spec: GenerateSpec,
        pool: WorkerPool,
        embeddings: Embeddings,
        deadline: Deadline,
        worker_wait_s: float,
    ) -> None:
        self.spec = spec
        self.pool = pool
        self.embeddings = embeddings
        self.deadline = deadline
        self.worker_wait_s = worker_wait_s
        self.choices = spec.sampling.n
        self.worker = ""  # Address of the one at work.
        self._progress = _Progress()

    async def events(self) -> AsyncGenerator[Delta | Done, None]:
        """Deltas, then Done. Raises typed errors; see the module on what is tried again."""
        deaths = 0
        refusal: OpticNerveError | None = None
        tried: set[str] = set()
        while True:
            async with self.pool.lease(
                1,
                self.deadline,
                self.worker_wait_s,
                lambda worker: worker.description.pair_id == self.spec.pair_id,
                avoid=tried,
            ) as worker:
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
                    self._check_movable(lost, deaths)
                except Overloaded as error:
                    refusal = error
                    tried.add(worker.address)
            if self.complete:
                yield Done(self.usage())
                return
            await asyncio.sleep(PAUSE_S)

    def _check_movable(self, lost: WorkerLost, deaths: int) -> None:
        """Raises where the generation has taken too many workers with it."""
        if self.complete:
            return
        events.also(lost=self.worker)
        if deaths > MAX_DEATHS:
            raise Unavailable(
                "the workers that served this request were lost one after another; "
                "it is not tried again"
            ) from lost

    @property
    def complete(self) -> bool:
        """Whether the worker has ended every choice."""
        return len(self._progress.finished) == self.choices

    def leave(self, choice: int) -> None:
        """Nobody wants more of a choice: should its worker be lost, no other one writes it on."""
        self._progress.left.add(choice)

    def usage(self) -> Usage:
        """Usage by our own count, where no worker has come to its end."""
        image_tokens = sum(span.num_tokens for span in self.spec.spans)
        progress = self._progress
        return Usage(len(self.spec.token_ids), progress.total, progress.cached_tokens, image_tokens)

    # ---- one attempt

    async def _attempt(self, worker: Worker) -> AsyncGenerator[Delta | Done, None]:
        self.deadline.check()
        self.worker = worker.address
        events.also(llm=worker.address)
        call = llm_pb2_grpc.LLMStub(worker.channel).Generate(timeout=self.deadline.remaining())
        feeder = _Feeder(call, self.embeddings)
        try:
            await feeder.start(self._start())
            async for message in call:
                if message.HasField("embedding_needed"):
                    feeder.needed(message.embedding_needed)
                if message.HasField("prefilled"):
                    self._progress.cached_tokens = message.prefilled.cached_tokens
                for delta in message.deltas:
                    yield self._take(llm_messages.delta_from_pb(delta))
                if message.HasField("done"):
                    yield llm_messages.done_from_pb(message.done)
                    return
        except grpc.RpcError as error:
            raise feeder.failure or lost_or_typed(error, delivered=feeder.delivered) from error
        except asyncio.CancelledError:
            if feeder.failure is None or _cancelled_from_outside():
                raise
            raise feeder.failure from None
        finally:
            await feeder.close()
            call.cancel()
        raise EngineFailure("the LLM worker ended the answer before its end")

    def _start(self) -> pb.GenerateIn:
        spec = self.spec
        known = self.embeddings.known
        return pb.GenerateIn(
            start=pb.Start(
                request_id=spec.request_id,
                token_ids=spec.token_ids,
                spans=[convert.span_to_pb(span) for span in spec.spans],
                items=[llm_messages.item(key, known(key)) for key in spec.keys],
                sampling=llm_messages.sampling_to_pb(spec.sampling),
                priority=spec.priority,
                share=spec.caller.share,
                weight=spec.caller.weight,
                cache_salt=spec.cache_salt,
                embedding_wait_ms=max(1, int(self.deadline.remaining() * 1000)),
                outputs=map(llm_messages.output_to_pb, self._progress.outputs()),
            )
        )

    def _take(self, delta: Delta) -> Delta:
        """Books a delta. Raises EngineFailure where it does not go on where its choice stood."""
        have = self._progress.tokens.setdefault(delta.choice, [])
        ended = delta.choice in self._progress.finished
        if delta.choice >= self.choices or ended or delta.first_index != len(have):
            raise EngineFailure("the LLM worker does not go on where the answer stood")
        have.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self._progress.finished.add(delta.choice)
        return delta


class _Feeder:
    """The writing side of a Generate call: Start, then references as they come.

    An item that cannot be had is told to the worker, which fails the sequence; the call is
    cancelled where it does not. ``failure`` is then what the request failed with.
    """

    def __init__(self, call: Call, embeddings: Embeddings) -> None:
        self.delivered = False
        self.failure: OpticNerveError | None = None
        self._call = call
        self._embeddings = embeddings
        self._writing = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, message: pb.GenerateIn) -> None:
        """Writes Start, and goes on to feed what it carries no reference for."""
        with contextlib.suppress(asyncio.InvalidStateError):  # Ended: the reading side knows why.
            await self._call.write(message)
            self.delivered = True
        for item in message.start.items:
            if not item.HasField("ref"):
                self._feed(item.key, self._embeddings.ready)

    def needed(self, message: pb.EmbeddingNeeded) -> None:
        """Answers EmbeddingNeeded; a key that is on its way already is not asked for twice."""
        reason = pb.NeededReason.Name(message.reason).removeprefix("NEEDED_REASON_")
        for key in message.keys:
            self._feed(key, lambda key: self._embeddings.again(key, reason))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _feed(self, key: str, source: Callable[[str], Awaitable[EmbeddingRef]]) -> None:
        if key not in self._tasks or self._tasks[key].done():
            self._tasks[key] = asyncio.create_task(self._feed_one(key, source))

    async def _feed_one(self, key: str, source: Callable[[str], Awaitable[EmbeddingRef]]) -> None:
        try:
            ref = await source(key)
        except OpticNerveError as error:
            await self._fail(key, error)
        except Exception:
            log.exception("encoding %.12s failed", key)
            await self._fail(key, OpticNerveError("internal error; the log has the details"))
        else:
            await self._write(llm_messages.ready(ref))

    async def _fail(self, key: str, error: OpticNerveError) -> None:
        self.failure = self.failure or error
        await self._write(llm_messages.failed(key, error))
        await asyncio.sleep(FAIL_GRACE_S)
        self._call.cancel()

    async def _write(self, message: pb.GenerateIn) -> None:
        """Writes to a call that may have ended: then the reading side knows why."""
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            async with self._writing:
                await self._call.write(message)


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
