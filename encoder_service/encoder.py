"""One item's way through the encoder: look up, check, decode, encode, publish. Knows no wire.

Everything that an item holds on its way (a place in the backlog, decoded pixels, its mark in the
poison record) is released when its flight ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields

from PIL import Image

from encoder_service import metrics
from encoder_service.backends.base import Backend, Capacity, Embedding
from encoder_service.backlog import Backlog
from encoder_service.batcher import Batcher, Failure, Finished
from encoder_service.item import Answer, Identity, Limits, Request, Timings
from encoder_service.pictures.decode_process import Pixels, Work, prepare
from encoder_service.pictures.preprocess import Job, PreprocessPool
from encoder_service.poison import PoisonRecord
from encoder_service.shelf import Shelf
from opticnerve.config import LEAST_IMAGE_PIXELS
from opticnerve.embeddings.ref import EmbeddingRef, TensorSpec, tensor_names
from opticnerve.embeddings.store import Store, check_key
from opticnerve.errors import (
    EngineFailure,
    InvalidRequest,
    Mispaired,
    OpticNerveError,
    PayloadTooLarge,
    PlanMismatch,
    UnsupportedFeature,
)
from opticnerve.media.keys import content_key
from opticnerve.media.plan import WHITE, Modality, Overrides, Plan, Structure
from opticnerve.media.structure import parse_structure
from opticnerve.models.family import Layout
from opticnerve.single_flight import Flights

STAGED_BATCHES = 2  # Decoded ahead of the device: one that runs, one that waits.
QUEUE_BATCHES = 16
MAX_QUEUE_ITEMS = 4096
INLINE_BYTES = 2**14  # Hashed and parsed on the event loop: quicker than a trip to a thread.
MAX_QUEUE_BYTES = 2**30  # Compressed.

HIT = Timings(hit=True)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """One item whose bytes are here and belong to its key and plan."""

    request: Request
    data: bytes
    structure: Structure
    deaths: int  # Of workers, in this item's name.
    landed: int  # Flights that had landed when the store did not have the item yet.
    replaces: bool  # What the store has under the key does not fit the plan.


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What the batcher carries: one item, decoded."""

    request: Request
    pixels: Pixels


class Encoder:
    """Owns the threads: preprocess pool, device, shelf. Borrows backend, store and record."""

    def __init__(
        self,
        backend: Backend,
        layout: Layout,
        store: Store,
        poison: PoisonRecord,
        identity: Identity,
        limits: Limits,
        capacity: Capacity,
        preprocess_workers: int,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.backend = backend
        self.layout = layout
        self.poison = poison
        self.identity = identity
        self.limits = limits
        self.capacity = capacity
        self._landed = 0
        self._suspects = asyncio.Lock()
        batch = capacity.max_batch_patches
        queue = limits.max_queue_patches or QUEUE_BATCHES * max(batch, capacity.max_item_patches)
        self.backlog = Backlog(queue, MAX_QUEUE_ITEMS, MAX_QUEUE_BYTES)
        self.shelf = Shelf(store, identity)
        self.pool = PreprocessPool(
            backend.preprocess,
            poison,
            preprocess_workers,
            STAGED_BATCHES * batch,
            limits.max_decode_bytes,
            limits.decode_timeout_s,
        )
        self._flights: Flights[Answer] = Flights()
        self._batcher: Batcher[_Prepared, Embedding] = Batcher(
            self._forward,
            batch,
            classify=backend.classify,
            on_lost=on_lost,
        )

    def rehearse(self) -> None:
        """Runs a blank picture over every thread but the store's, so that the first request does
        not pay for their first steps. Blocks. Raises what encoding a picture raises."""
        buffer = io.BytesIO()
        side = math.isqrt(LEAST_IMAGE_PIXELS)
        Image.new("RGB", (side, side), (127, 127, 127)).save(buffer, "JPEG")
        data = buffer.getvalue()
        plan = self.layout.plan(parse_structure(data), Overrides())
        request = Request("rehearsal", "", "", plan, Overrides(), len(data))
        pixels = prepare(self.backend.preprocess, self._work(request, data))
        self._batcher.submit(_Prepared(request, pixels), plan.num_patches).result()

    async def encode(self, request: Request, read: Callable[[], Awaitable[bytes]]) -> Answer:
        """The embedding of one item, from the store or by encoding it.

        ``read`` brings the item's bytes and is called only when they are needed. Cancelling
        drops the item unless another call waits for it or it is on the device already.
        Raises what ``encoder.proto`` says of Encode.
        """
        self._check(request)
        if request.key in self._flights:
            return await self._flights.join(request.key)
        landed = self._landed
        look_up = self.shelf.renew if request.lost else self.shelf.look_up
        known = await look_up(request.key)
        if known is not None and self._fits(known, request.plan):
            return Answer(known, HIT)
        deaths = self.poison.check(request.key)
        cost = request.plan.num_patches, request.num_bytes
        self.backlog.check_room(*cost)
        data = await read()
        slot = self.backlog.admit(*cost)  # From here on it keeps others waiting.
        try:
            if len(data) <= INLINE_BYTES:
                structure = self._verify(request, data)
            else:
                structure = await self.pool.run(self._verify, request, data)
        except BaseException:
            slot.release()
            raise
        item = _Arrived(request, data, structure, deaths, landed, replaces=known is not None)
        return await self._flights.run(request.key, lambda: self._fly(item), slot.release)

    @property
    def encoded_items(self) -> int:
        """Since start."""
        return self._landed

    def close(self) -> None:
        """Ends the threads. Blocks until what runs on them has ended."""
        self._batcher.close()
        self.pool.close()
        self.shelf.close()

    # ---- checks, cheapest first

    def _check(self, request: Request) -> None:
        check_key(request.key)
        mine, plan = self.identity.fingerprint, request.plan
        if request.fingerprint != mine:
            raise Mispaired(
                f"this encoder's fingerprint is {mine[:12]}…, the item was named for "
                f"{request.fingerprint[:12] or 'none'}…; ask Describe and name it again"
            )
        if plan.modality is not Modality.IMAGE or plan.frames != 1:
            raise UnsupportedFeature(
                "video and animation cannot be encoded yet; send still pictures"
            )
        if (request.overrides.background or 0) > WHITE:
            raise InvalidRequest("the background should be 0xRRGGBB", param="background")
        if request.num_bytes > self.limits.max_item_bytes:
            raise PayloadTooLarge(
                f"the item has {request.num_bytes} bytes; this encoder takes up to "
                f"{self.limits.max_item_bytes}"
            )
        if plan.num_patches > self.capacity.max_item_patches:
            raise InvalidRequest(
                f"the picture would be {plan.num_patches} patches; this encoder takes up to "
                f"{self.capacity.max_item_patches}. Lower max_pixels",
                param="max_pixels",
            )

    def _fits(self, known: EmbeddingRef, plan: Plan) -> bool:
        """Whether what is stored is what this encoder would make of an item of that plan."""
        backend, levels = self.backend, self.layout.deepstack_levels
        made = {
            TensorSpec(name, backend.dtype, (plan.num_tokens, backend.hidden_size))
            for name in tensor_names(levels)
        }
        return set(known.tensors) == made

    def _verify(self, request: Request, data: bytes) -> Structure:
        """The bytes' structure, once it is clear that key and plan belong to them.

        Raises InvalidRequest, InvalidMedia, PlanMismatch.
        """
        key = content_key(
            data,
            self.layout.settings(),
            request.overrides,
            self.identity.fingerprint,
            request.cache_salt,
        )
        if key != request.key:
            raise InvalidRequest("the key does not belong to these bytes", param="key")
        limits = self.limits.max_image_pixels, self.limits.max_decode_passes
        structure = parse_structure(data, *limits)
        plan = self.layout.plan(structure, request.overrides)
        if plan != request.plan:
            raise PlanMismatch(
                "the item's plan is not what its bytes give here; gateway and encoder must serve "
                "one release and one checkpoint",
                logged=f"the plan that the call brings differs: {_difference(request.plan, plan)}",
            )
        return structure

    # ---- the flight of one item

    async def _fly(self, item: _Arrived) -> Answer:
        key = item.request.key
        if item.replaces:
            await self.shelf.drop(key)
        elif self._landed != item.landed:  # Perhaps this key, while this call's bytes came in.
            known = await self.shelf.look_up(key)
            if known is not None:
                if self._fits(known, item.request.plan):
                    return Answer(known, HIT)
                await self.shelf.drop(key)
        started = time.monotonic()
        async with self._alone_if(item.deaths > 0):
            pixels, finished = await self._encode(item)
        ref, put_s = await self.shelf.publish(key, finished.result)
        self._landed += 1
        self.backlog.record(item.request.plan.num_patches)
        if item.deaths:
            self.poison.absolve(key)
        waited = finished.submitted - started - pixels.seconds
        timings = Timings(
            queue_s=waited + finished.queue_s,
            preprocess_s=pixels.seconds,
            encode_s=finished.run_s,
            put_s=put_s,
            batch_items=finished.batch_items,
            batch_patches=finished.batch_cost,
        )
        _observe(timings)
        return Answer(ref, timings)

    async def _encode(self, item: _Arrived) -> tuple[Pixels, Finished[Embedding]]:
        """Through the preprocess pool and the device."""
        request, patches = item.request, item.request.plan.num_patches
        async with self.pool.prepared(self._job(item)) as pixels:
            prepared = _Prepared(request, pixels)
            future = self._batcher.submit(prepared, patches, alone=item.deaths > 0)
            try:
                return pixels, await asyncio.wrap_future(future)
            except OpticNerveError:
                raise
            except Exception as error:
                raise self._failure(request, error) from error

    def _job(self, item: _Arrived) -> Job:
        request = item.request
        return Job(
            owner=request.request_id or request.key,
            key=request.key,
            work=self._work(request, item.data),
            patches=request.plan.num_patches,
            structure=item.structure,
            suspect=item.deaths > 0,
        )

    def _work(self, request: Request, data: bytes) -> Work:
        limits = self.limits.max_image_pixels, self.limits.max_decode_passes
        return Work(data, request.plan, request.overrides.background, *limits)

    def _alone_if(self, suspect: bool) -> AbstractAsyncContextManager[None]:
        """One suspect at a time: if this one kills the worker, the others are no party to it."""
        return self._suspects if suspect else contextlib.nullcontext()

    def _forward(self, batch: Sequence[_Prepared]) -> list[Embedding]:
        """On the device's thread."""
        plans = [item.request.plan for item in batch]
        with self.poison.working_on([item.request.key for item in batch]):
            outputs = self.backend.encode([item.pixels.values for item in batch], plans)
        for plan, output in zip(plans, outputs, strict=True):
            rows = {tensor.shape[0] for tensor in output.values()}
            if rows != {plan.num_tokens}:
                raise EngineFailure(f"the tower made {rows} rows for {plan.num_tokens} tokens")
        return outputs

    def _failure(self, request: Request, error: Exception) -> OpticNerveError:
        """What the caller hears of an exception on the device's thread."""
        patches = request.plan.num_patches
        if self.backend.classify(error) is Failure.MEMORY:
            return EngineFailure(
                f"the encoder ran out of memory for a picture of {patches} patches; "
                "lower max_pixels"
            )
        return EngineFailure("the encoder failed on this picture; its log has the details")


def _difference(told: Plan, made: Plan) -> str:
    names = [field.name for field in fields(Plan)]
    pairs = [(name, getattr(told, name), getattr(made, name)) for name in names]
    return ", ".join(
        f"{name} {ours} for {theirs}" for name, ours, theirs in pairs if ours != theirs
    )


def _observe(timings: Timings) -> None:
    metrics.ITEMS_ENCODED.inc()
    for stage, seconds in (
        ("queue", timings.queue_s),
        ("preprocess", timings.preprocess_s),
        ("encode", timings.encode_s),
        ("put", timings.put_s),
    ):
        metrics.STAGE_SECONDS.labels(stage=stage).observe(seconds)
