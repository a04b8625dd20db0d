"""Encodes items on a pool of encoders: sends the compressed bytes, and gets a reference.

An item waits for an encoder with room until its request's deadline, in the order of the requests; a
request that would wait too long is refused on arrival. Encoding is idempotent: if an encoder dies,
the call is retried on another one, or on the same one after its restart, within the deadline. All
items that an encoder had when it died are suspects. An encoder gets only one suspect at a time, so
that another death is blamed on that item; after two deaths an item is refused for a while.
Concurrent requests for one key share one run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import grpc

from gateway.clock import Deadline
from gateway.edge.limits import MAX_ENCODER_DEATHS
from gateway.metrics import RETRIES
from gateway.workers.dispatch import Accepts, LeaseRequest
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import Description, Worker, WorkerLost, call_error
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import (
    DeadlineExceeded,
    Mispaired,
    OpticNerveError,
    Overloaded,
    PoisonousItem,
    Unavailable,
)
from opticnerve.lru import LRU
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.pb import encoder_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.channel import EncodeItem, EncodeUpload
from opticnerve.single_flight import Flights
from opticnerve.telemetry import logs, traces
from opticnerve.telemetry.metrics import STAGE_SECONDS

log = logging.getLogger(__name__)

MAX_SUSPECTS = 1_000  # Items whose encoders' deaths are remembered.
DEATHS_REMEMBERED_S = 600.0  # Counted from an item's last one.
PAUSE_S = 0.02  # Between attempts, so as not to hammer a pool that refuses everything.
MAX_BATCHES_IN_FLIGHT = 3  # For one encoder: one runs, one is decoded, one is uploaded.
MAX_IN_FLIGHT_S = 30.0  # Most work sent to one encoder, in seconds; well within a call's timeout.
HEAVY_FRACTION = 0.5  # Part of an encoder's queue reserved for pictures that are heavy to decode.
PASS_S = 5e-9  # Seconds of one core to decode one pixel in one pass.


@dataclass(frozen=True, slots=True)
class Encodable(EncodeItem):
    """One item of a request."""

    param: str | None = None  # The request's field that holds it.
    passes_before: int = 0  # Decode cost of the earlier pictures of its request.
    share: str = ""  # Fair-queueing key: items with equal keys are scheduled as one client.
    weight: float = 1.0  # The client's part of the encoders, relative to other clients'.


@dataclass(frozen=True, slots=True)
class Encoded:
    """The reference to an embedding, and what the encoding cost.

    ``cached``: "ref" (the gateway knew the reference), "store" (the encoder had the rows) or "no".
    ``answered``: when the encoder's answer came, on the monotonic clock, in seconds.
    """

    ref: EmbeddingRef
    cached: str
    bytes_sent: int = 0
    timings: dict[str, float] = field(default_factory=dict)  # Milliseconds by stage.
    answered: float = 0.0


async def describe_encoder(channel: grpc.aio.Channel, timeout_s: float) -> Description:
    answer = await encoder_pb2_grpc.EncoderStub(channel).Describe(
        pb.DescribeEncoderRequest(), timeout=timeout_s
    )
    limits, load = answer.limits, answer.load
    return Description.read(
        answer,
        cost=load.queued_patches,
        cost_per_s=load.patches_per_s,
        max_cost_in_flight=_max_patches_in_flight(limits.max_batch_patches, load.patches_per_s),
        max_heavy_cost_in_flight=int(limits.max_queue_patches * HEAVY_FRACTION),
        extra={"backend": answer.backend, "precision": answer.precision},
    )


def _max_patches_in_flight(max_batch_patches: int, patches_per_s: float) -> int:
    """The most patches that one gateway has in flight to an encoder: enough to keep it busy, and no
    more than it encodes within MAX_IN_FLIGHT_S; one batch while its speed is unknown."""
    if not patches_per_s:
        return max_batch_patches
    return max(
        1, min(MAX_BATCHES_IN_FLIGHT * max_batch_patches, int(patches_per_s * MAX_IN_FLIGHT_S))
    )


class References(LRU[str, EmbeddingRef]):
    """The most recent references to embeddings, by content key; about 1 KiB each, without tensors.

    An entry may be out of date: an LLM worker that finds no rows behind a reference asks for the
    item (``EmbeddingNeeded``), and the entry is removed.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        super().__init__(capacity)

    def remember(self, ref: EmbeddingRef) -> None:
        """Keeps the reference. Inline rows are dropped if they can also be read elsewhere."""
        location = replace(ref.location, inline=b"")
        if location.shm_tier_id or location.redis or location.fetch_address:
            self[ref.key] = ref.at(location)


@dataclass(frozen=True, slots=True)
class _EncodeRun:
    """A series of attempts to encode an item, shared by all requests that wait for it."""

    request_id: str  # The id of the request that started it, which encoders log.
    called: list[str] = field(default_factory=list)  # Addresses of the encoders that were tried.


@dataclass(frozen=True, slots=True)
class _Claim:
    """The encoder work that an admitted item will cause."""

    share: str
    weight: float
    patches: int

    @classmethod
    def of(cls, item: Encodable) -> _Claim:
        return cls(item.share, item.weight, item.plan.num_patches)


class Encoders:
    """Encodes items on a pool, and caches their references."""

    def __init__(
        self,
        pool: WorkerPool,
        encode_timeout_s: float,
        worker_wait_s: float,
        max_wait_s: float = 0.0,
    ) -> None:
        """``max_wait_s``: see ``--max-encode-wait-s``."""
        self.pool = pool
        self.references = References()
        self.encode_timeout_s = encode_timeout_s
        self.worker_wait_s = worker_wait_s
        self.max_wait_s = max_wait_s
        self._flights: Flights[Encoded] = Flights()
        self._runs: dict[str, _EncodeRun] = {}  # By the key under which requests share them.
        self._admitted: dict[str, _Claim] = {}  # Items not encoded yet, by key.
        # By key: how many workers died while they had the item, and when the last one did.
        self._deaths: LRU[str, tuple[int, float]] = LRU(MAX_SUSPECTS)

    def admit(self, items: Iterable[Encodable], deadline: Deadline) -> None:
        """Counts a request's items as encoder work ahead of later requests, until ``leave``. Raises
        Overloaded as ``check`` does."""
        fresh = self.check(items, deadline)
        self._admitted.update({item.key: _Claim.of(item) for item in fresh})

    def check(self, items: Iterable[Encodable], deadline: Deadline) -> Collection[Encodable]:
        """The items of a request that need a new run: those without a known reference that are not
        admitted yet.

        Raises Overloaded if one of them would have to wait too long: beyond the request's
        deadline, or longer than ``max_wait_s``.
        """
        limit = min(self.max_wait_s or math.inf, deadline.remaining())
        fresh = {
            item.key: item
            for item in items
            if item.key not in self._admitted and self.references.get(item.key) is None
        }.values()
        ahead = self._ahead_of(fresh)
        for item in fresh:
            wait = self.pool.dispatcher.expected_wait_s(ahead, _has_fingerprint(item))
            if wait > limit:
                raise Overloaded(
                    f"the expected wait for an encoder is {wait:.1f} s (limit {limit:.1f} s); "
                    "retry later",
                    retry_after_s=max(1.0, wait - limit),
                )
        return fresh

    def _ahead_of(self, items: Collection[Encodable]) -> int:
        """Patches that fair queueing encodes before a request's new ``items``: all that wait in its
        own share, and from each other share at most as much, by weight, as those and the largest
        new item together."""
        patches: dict[str, float] = {}  # Patches that wait, by share, divided by its weight.
        weights: dict[str, float] = {}
        for claim in self._admitted.values():
            patches[claim.share] = patches.get(claim.share, 0.0) + claim.patches / claim.weight
            weights[claim.share] = claim.weight
        most = max((item.plan.num_patches / item.weight for item in items), default=0.0)
        mine = next((item.share for item in items), "")
        until = patches.get(mine, 0.0) + most
        patches = {share: min(each, until) for share, each in patches.items()}
        return round(sum(weights[share] * each for share, each in patches.items()))

    def leave(self, key: str) -> None:
        """Ends ``admit`` for an item, unless a run is under way for another request."""
        if key not in self._flights:
            self._admitted.pop(key, None)

    async def encode(self, item: Encodable, deadline: Deadline, request_id: str) -> Encoded:
        """The item's embedding: a known reference, or the result of a run, joined or started.

        Raises InvalidMedia, Overloaded, PoisonousItem, Unavailable, DeadlineExceeded.
        """
        known = self.references.get(item.key)
        if known is not None:
            return Encoded(known, "ref")
        while True:
            joined = item.key in self._flights
            try:
                done = await self._join(item, deadline, request_id)
            except DeadlineExceeded:
                if not joined or deadline.remaining() == 0:
                    raise
                continue  # Only the deadline of the run's first request has passed.
            return replace(done, bytes_sent=0) if joined else done

    async def _join(self, item: Encodable, deadline: Deadline, request_id: str) -> Encoded:
        """The result of the item's current run, or of a new one."""
        starts = item.key not in self._flights
        if starts:
            self._runs[item.key] = _EncodeRun(request_id)
            self._admitted[item.key] = _Claim.of(item)
        run = self._runs[item.key]
        try:
            async with deadline.timeout():
                return await self._flights.run(
                    item.key,
                    lambda: self._encode_on_some(item, deadline, run),
                    lambda: self._forget_run(item.key, run) if starts else None,
                )
        finally:
            _note(run, request_id)

    def _forget_run(self, key: str, run: _EncodeRun) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
            self._admitted.pop(key, None)

    # ---- attempts

    async def _encode_on_some(
        self, item: Encodable, deadline: Deadline, run: _EncodeRun
    ) -> Encoded:
        """Tries encoders until one answers; the module's docstring says what is retried."""
        tried: set[str] = set()
        refusal: OpticNerveError | None = None
        failed = ""  # Why the attempt before this one failed.
        waited = 0.0  # Seconds, for encoders with room.
        while True:
            self._check_not_poisonous(item.key)
            request = _lease_request(item, deadline, tried, suspect=item.key in self._deaths)
            asked = time.monotonic()
            async with self.pool.lease(request, self.worker_wait_s) as worker:
                waited += time.monotonic() - asked
                traces.record("encoder_wait", asked, time.monotonic())
                if refusal is not None and worker.address in tried:
                    raise refusal
                if failed:
                    RETRIES.labels("encode", failed).inc()
                run.called.append(worker.address)
                try:
                    encoded = await self._call(worker, item, deadline, run)
                except WorkerLost as lost:
                    failed, request.failed = "lost", True
                    self.pool.report_down(worker)
                    if lost.delivered:
                        self._blame(item.key, worker)
                        tried.add(worker.address)
                except Overloaded as error:  # Full of other gateways' work: the item waits here.
                    failed, request.failed = "full", True
                    self.pool.report_full(worker, error.retry_after_s)
                except Mispaired as error:
                    failed, request.failed, refusal = "mispaired", True, error
                    tried.add(worker.address)
                    worker.wake.set()  # Its description is out of date.
                else:
                    return self._answered(item.key, encoded, waited)
            await asyncio.sleep(PAUSE_S)

    def _answered(self, key: str, encoded: Encoded, waited_s: float) -> Encoded:
        """Remembers what was encoded. ``waited_s``: for encoders with room."""
        self.references.remember(encoded.ref)
        self._deaths.pop(key)
        STAGE_SECONDS.labels("encoder_wait").observe(waited_s)
        return replace(encoded, timings={"encoder_wait": waited_s * 1000, **encoded.timings})

    def _blame(self, key: str, worker: Worker) -> None:
        deaths = (self._deaths.get(key) or (0, 0.0))[0] + 1
        self._deaths[key] = (deaths, time.monotonic())
        log.warning("encoder %s was lost while it had item %.12s", worker.address, key)
        if deaths >= MAX_ENCODER_DEATHS:
            raise Unavailable(
                "two encoders were lost while they had this picture; it is not tried again"
            )

    def _check_not_poisonous(self, key: str) -> None:
        deaths, last = self._deaths.get(key) or (0, 0.0)
        if time.monotonic() - last > DEATHS_REMEMBERED_S:
            self._deaths.pop(key)
        elif deaths >= MAX_ENCODER_DEATHS:
            raise PoisonousItem(
                "two encoders were lost while they had this picture; send another picture"
            )

    async def _call(
        self, worker: Worker, item: Encodable, deadline: Deadline, run: _EncodeRun
    ) -> Encoded:
        """One Encode call. Raises WorkerLost, and the encoder's own typed errors."""
        deadline.check()
        upload = EncodeUpload(item, run.request_id)
        attempt = {"worker": worker.address, "retry": len(run.called) - 1}
        with traces.span("Encode", calls=True, bytes=len(item.data), **attempt) as span:
            call = encoder_pb2_grpc.EncoderStub(worker.channel).Encode(
                upload.messages(),
                timeout=deadline.within(self.encode_timeout_s).remaining(),
                metadata=span.carrier,
            )
            try:
                answer = await call
            except grpc.RpcError as error:
                raise call_error(error, delivered=upload.delivered) from error
            finally:
                call.cancel()
        timings = answer.timings
        return Encoded(
            ref=_without_unproven_address(convert.ref_from_pb(answer.ref), worker),
            cached="store" if timings.hit else "no",
            bytes_sent=len(item.data),
            timings={
                "queue": timings.queue_ms,
                "preprocess": timings.preprocess_ms,
                "encode": timings.encode_ms,
                "put": timings.put_ms,
            },
            answered=time.monotonic(),
        )


def _without_unproven_address(ref: EmbeddingRef, worker: Worker) -> EmbeddingRef:
    """Removes the ``fetch_address`` if the encoder has a fault: it may lead to another process."""
    return ref if worker.fault is None else ref.at(replace(ref.location, fetch_address=""))


def _note(run: _EncodeRun, request_id: str) -> None:
    """Notes the encoders that were called, and the request id they were given, for the log line."""
    for address in run.called:
        logs.append(encoder=address)
    if run.request_id != request_id:
        logs.append(encoded_as=run.request_id)


def _lease_request(
    item: Encodable, deadline: Deadline, tried: set[str], *, suspect: bool
) -> LeaseRequest:
    """``tried``: addresses to use only if no other encoder serves."""
    return LeaseRequest(
        item.plan.num_patches,
        deadline,
        _has_fingerprint(item),
        avoid=tried,
        heavy=item.plan.is_heavy,
        suspect=suspect,
        delay_within_request_s=item.passes_before * PASS_S,
        share=item.share,
        weight=item.weight,
    )


def _has_fingerprint(item: Encodable) -> Accepts:
    return lambda worker: worker.description.fingerprint == item.fingerprint
