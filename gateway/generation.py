"""One generation, which may outlive the worker that began it.

A call that breaks before its first token is sent again; one that breaks later goes on elsewhere
with ``output_ids``, so that no token is lost or comes twice. Several choices, which ``output_ids``
cannot tell apart, are written anew: randomness is a function of seed, choice and position, so what
was sent already comes again, is compared, and is left out. References to embeddings travel in
the Start message where they are known, as EmbeddingReady when they come, and again when the
worker says EmbeddingNeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import grpc

from gateway import wire
from gateway.deadline import Deadline
from gateway.events import (
    Delta,
    Event,
    Finished,
    Usage,
)
from gateway.lost import WorkerLost, lost_or_typed
from gateway.pools import Worker, WorkerPool
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import EngineFailure, OpticNerveError, Overloaded, Unavailable
from opticnerve.media.plan import Span
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.errors import to_detail

log = logging.getLogger(__name__)

MAX_DEATHS = 2  # Workers that one generation may take with it before it is given up.
PAUSE_S = 0.02
FAIL_GRACE_S = 1.0  # That a worker gets to fail a sequence whose item will not come.

if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.GenerateIn, pb.GenerateOut]


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
    sampling: pb.SamplingParams
    pair_id: str
    cache_salt: str = ""
    priority: int = 0


@dataclass
class _Progress:
    """What was handed on so far, of every choice."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(len(ids) for ids in self.tokens.values())


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
        self.choices = max(1, spec.sampling.n)
        self.worker = ""  # Address of the one at work.
        self._progress = _Progress()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Deltas, then Finished. Raises typed errors; see the module on what is tried again."""
        deaths = 0
        refusal: OpticNerveError | None = None
        tried: set[str] = set()
        while True:
            async with self.pool.lease(
                1,
                self.deadline.within(self.worker_wait_s),
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
                yield Finished(self.usage())
                return
            await asyncio.sleep(PAUSE_S)

    def _check_movable(self, lost: WorkerLost, deaths: int) -> None:
        """Raises where the generation has taken too many workers with it."""
        if self.complete:
            return
        log.warning("%s: worker %s was lost", self.spec.request_id, self.worker)
        if deaths > MAX_DEATHS:
            raise Unavailable(
                "the workers that served this request were lost one after another; "
                "it is not tried again"
            ) from lost

    @property
    def complete(self) -> bool:
        """Whether the worker has ended every choice."""
        return len(self._progress.finished) == self.choices

    def usage(self) -> Usage:
        """Usage by our own count, where no worker can tell it."""
        image_tokens = sum(span.num_tokens for span in self.spec.spans)
        return Usage(len(self.spec.token_ids), self._progress.total, 0, image_tokens)

    # ---- one attempt

    async def _attempt(self, worker: Worker) -> AsyncGenerator[Event, None]:
        self.deadline.check()
        self.worker = worker.address
        call = llm_pb2_grpc.LLMStub(worker.channel).Generate(timeout=self.deadline.remaining())
        feeder = _Feeder(call, self.embeddings)
        try:
            await feeder.start(self._start())
            async for message in call:
                if message.HasField("embedding_needed"):
                    feeder.needed(message.embedding_needed)
                for delta in message.deltas:
                    event = self._take(delta)
                    if event is not None:
                        yield event
                if message.HasField("done"):
                    yield wire.finished(message.done)
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
        output = self._progress.tokens.get(0, []) if self.choices == 1 else []
        return pb.GenerateIn(
            start=pb.Start(
                request_id=spec.request_id,
                token_ids=spec.token_ids,
                spans=[convert.span_to_pb(span) for span in spec.spans],
                items=[self._item(key) for key in spec.keys],
                sampling=spec.sampling,
                priority=spec.priority,
                cache_salt=spec.cache_salt,
                embedding_wait_ms=max(1, int(self.deadline.remaining() * 1000)),
                output_ids=output,
                first_output_index=len(output),
            )
        )

    def _item(self, key: str) -> pb.Item:
        ref = self.embeddings.known(key)
        return pb.Item(key=key, ref=convert.ref_to_pb(ref) if ref else None)

    def _take(self, delta: pb.TokenDelta) -> Delta | None:
        """The part of a delta that is new.

        Raises EngineFailure where tokens are missing, Unavailable where tokens that come again
        after a loss are others than before (near-ties on another device).
        """
        if delta.choice >= self.choices:
            raise EngineFailure(f"the LLM worker wrote choice {delta.choice} of {self.choices}")
        if delta.choice in self._progress.finished:
            return None
        have = self._progress.tokens.setdefault(delta.choice, [])
        if delta.first_index > len(have):
            raise EngineFailure("the LLM worker left out tokens of its answer")
        skip = len(have) - delta.first_index
        if have[delta.first_index :][: len(delta.token_ids)] != list(delta.token_ids[:skip]):
            raise Unavailable(
                "the worker was lost while it wrote several choices, and another one writes them "
                "differently; send the request again",
                retry_after_s=1.0,
            )
        new = tuple(delta.token_ids[skip:])
        finish = wire.FINISH.get(delta.finish_reason)
        have.extend(new)
        if finish is not None:
            self._progress.finished.add(delta.choice)
        if not new and finish is None:
            return None
        return wire.delta(delta, skip, finish)


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
            ready = pb.EmbeddingReady(ref=convert.ref_to_pb(ref))
            await self._write(pb.GenerateIn(embedding_ready=ready))

    async def _fail(self, key: str, error: OpticNerveError) -> None:
        self.failure = self.failure or error
        failed = pb.EmbeddingFailed(key=key, status=error.grpc_status, detail=to_detail(error))
        await self._write(pb.GenerateIn(embedding_failed=failed))
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
