"""One Generate call to an LLM worker: opens it, feeds it references, reads it to its end.

Used by the gateway and by clients. References to embeddings that are known travel in the Start
message, others as EmbeddingReady once they are known; a reference is sent again when the worker
asks with EmbeddingNeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import grpc

from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import EngineFailure, OpticNerveError, Unavailable
from opticnerve.generation.values import Delta, Done, PromptPiece, Timings
from opticnerve.pb import llm_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.errors import to_detail
from opticnerve.telemetry.traces import Carrier

if TYPE_CHECKING:
    ClientCall = grpc.aio.StreamStreamCall[pb.GenerateIn, pb.GenerateOut]
    FindReference = Callable[[str], Awaitable[EmbeddingRef]]

StreamEvent = PromptPiece | Delta | Done

log = logging.getLogger(__name__)

# gRPC's details for a call that ended during a write, in place of the worker's own status.
HIDDEN_STATUS = "Internal error from Core"


class ReferenceSource(Protocol):
    """References to the embeddings of one generation, by content key.

    An OpticNerveError that a method raises fails the generation.
    """

    async def ready(self, key: str) -> EmbeddingRef:
        """The reference to the rows of an item that had none in Start."""
        ...

    async def again(self, key: str, reason: str) -> EmbeddingRef:
        """A new reference to rows that the worker did not find. ``reason``: a name of NeededReason,
        without its prefix."""
        ...


@dataclass(frozen=True, slots=True)
class StreamPolicy:
    """How a caller retries, and how long it waits for a worker.

    ``write_delays_s``: an attempt for each. If a worker refuses Start while the caller still
    writes, gRPC hides the status; the next attempt then waits this long after Start before it
    writes more, so that the refusal can be read. There is no further attempt once an event has
    come. ``max_reencodes``: how often one embedding is sent again after EmbeddingNeeded.
    ``fail_grace_s``: how long a worker may take to fail a request whose embedding cannot be had,
    before the call is cancelled.
    """

    write_delays_s: tuple[float, ...] = (0.0, 0.25)
    max_reencodes: int = 2
    fail_grace_s: float = 1.0


class GenerateStream:
    """One call. ``events()`` yields the prompt's log-probabilities, if the sampling asks for them,
    then deltas, then Done; closing it aborts the generation."""

    def __init__(
        self,
        stub: llm_pb2_grpc.LLMAsyncStub,
        start: pb.Start,
        source: ReferenceSource,
        timeout_s: float,
        policy: StreamPolicy,
        metadata: Carrier = (),
    ) -> None:
        """``metadata``: sent with the call."""
        self.delivered = False  # Whether Start was sent.
        self.cached_tokens = 0  # Of the prompt; set before the first delta.
        self.prefilled: Timings | None = None  # Up to the first token; set likewise.
        self._stub = stub
        self._start = start
        self._source = source
        self._ends = time.monotonic() + timeout_s  # When the time of all attempts is up.
        self._policy = policy
        self._metadata = metadata

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """Raises the source's error if an embedding cannot be sent, grpc.RpcError if the call
        fails, EngineFailure if it ends before Done, Unavailable if gRPC hides its status."""
        for delay_s in self._policy.write_delays_s:
            begun = False
            try:
                async with contextlib.aclosing(self._attempt(delay_s)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                if error.details() != HIDDEN_STATUS:
                    raise
                if begun or delay_s == self._policy.write_delays_s[-1]:
                    raise Unavailable("the LLM worker ended the call") from error

    async def _attempt(self, delay_s: float) -> AsyncGenerator[StreamEvent, None]:
        remaining_s = max(0.0, self._ends - time.monotonic())
        wait_ms = min(self._start.embedding_wait_ms, int(remaining_s * 1e3))
        self._start.embedding_wait_ms = max(wait_ms, 1) if self._start.embedding_wait_ms else 0
        call = self._stub.Generate(timeout=remaining_s, metadata=self._metadata)
        feeder = _Feeder(call, self._source, self._policy.fail_grace_s)
        try:
            self.delivered = await feeder.start(self._start, delay_s)
            async for message in call:
                if message.HasField("embedding_needed"):
                    feeder.answer(message.embedding_needed)
                if message.HasField("prefilled"):
                    self.cached_tokens = message.prefilled.cached_tokens
                    self.prefilled = convert.timings_from_pb(message.prefilled.timings)
                if message.HasField("prompt_logprobs"):
                    positions = message.prompt_logprobs.positions
                    yield PromptPiece(convert.positions_from_pb(positions))
                for delta in message.deltas:
                    yield convert.delta_from_pb(delta)
                if message.HasField("done"):
                    yield convert.done_from_pb(message.done)
                    return
        except grpc.RpcError as error:
            if feeder.failure is None:
                raise
            raise feeder.failure from error
        except asyncio.CancelledError:
            if feeder.failure is None or _cancelled_from_outside():
                raise
            raise feeder.failure from None
        finally:
            await feeder.close()
            call.cancel()
        raise EngineFailure("the LLM worker ended the answer before its end")


class _Feeder:
    """The writing side of a call: Start, then references as they come.

    An embedding that cannot be sent is reported to the worker, which fails the request; otherwise
    the call is cancelled after a while. ``failure`` is the source's error.
    """

    def __init__(self, call: ClientCall, source: ReferenceSource, fail_grace_s: float) -> None:
        self.failure: OpticNerveError | None = None
        self._call = call
        self._source = source
        self._fail_grace_s = fail_grace_s
        self._writing = asyncio.Lock()
        self._looking: set[str] = set()  # Keys that the source is looking up.
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, start: pb.Start, delay_s: float) -> bool:
        """Writes Start, and begins to feed the items that have no reference in it. Returns False if
        the call had ended before; the reading side then raises the reason."""
        delivered = False
        with contextlib.suppress(asyncio.InvalidStateError):
            await self._call.write(pb.GenerateIn(start=start))
            delivered = True
        for item in start.items:
            if not item.HasField("ref"):
                self._feed(item.key, self._source.ready, delay_s)
        return delivered

    def answer(self, message: pb.EmbeddingNeeded) -> None:
        """Answers EmbeddingNeeded, except for keys that the source is already looking up."""
        reason = pb.NeededReason.Name(message.reason).removeprefix("NEEDED_REASON_")
        for key in message.keys:
            self._feed(key, lambda key: self._source.again(key, reason))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _feed(self, key: str, find: FindReference, delay_s: float = 0.0) -> None:
        if key in self._looking:
            return
        self._looking.add(key)
        task = asyncio.create_task(self._feed_one(key, find, delay_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _feed_one(self, key: str, find: FindReference, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        try:
            ref = await find(key)
        except OpticNerveError as error:
            await self._fail(key, error)
        except Exception:
            log.exception("encoding %.12s failed", key)
            await self._fail(key, OpticNerveError("internal error; the log has the details"))
        else:
            self._looking.discard(key)  # The worker may answer before the write returns.
            ready = pb.EmbeddingReady(ref=convert.ref_to_pb(ref))
            await self._write(pb.GenerateIn(embedding_ready=ready))

    async def _fail(self, key: str, error: OpticNerveError) -> None:
        self.failure = self.failure or error
        failed = pb.EmbeddingFailed(key=key, status=error.grpc_status, detail=to_detail(error))
        await self._write(pb.GenerateIn(embedding_failed=failed))
        await asyncio.sleep(self._fail_grace_s)
        self._call.cancel()

    async def _write(self, message: pb.GenerateIn) -> None:
        """Writes to a call that may have ended; the reading side then raises the reason."""
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            async with self._writing:
                await self._call.write(message)


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
