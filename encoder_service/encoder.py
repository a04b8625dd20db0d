"""One item's path through the encoder: look up, check, decode, encode, publish. No gRPC here.

Everything that an item holds on the way (a place in the backlog, decoded pixels, its mark in the
crash record) is released when its run ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields

from PIL import Image

from encoder_service import metrics
from encoder_service.audit import Audit
from encoder_service.backends.base import Capacity, Embedding, Recovery, VisionModel
from encoder_service.backlog import Backlog
from encoder_service.batcher import Batcher, BatchResult
from encoder_service.crash_record import CrashRecord
from encoder_service.pictures.decode_pool import DecodeJob, PreprocessPool
from encoder_service.pictures.decode_process import DecodeTask, Pixels, decode_and_cut
from encoder_service.publisher import Results
from opticnerve.config import EncoderConfig
from opticnerve.config.shared import MIN_IMAGE_PIXELS
from opticnerve.content_keys import content_key
from opticnerve.embeddings.ref import EmbeddingRef, TensorSpec, tensor_names
from opticnerve.embeddings.store import check_key
from opticnerve.errors import (
    EngineFailure,
    InvalidRequest,
    Mispaired,
    OpticNerveError,
    PayloadTooLarge,
    PlanMismatch,
    UnsupportedFeature,
)
from opticnerve.media.plan import WHITE, Modality, Overrides, Plan, Structure
from opticnerve.media.probe import parse_structure
from opticnerve.single_flight import Flights
from opticnerve.telemetry import traces
from opticnerve.telemetry.metrics import STAGE_SECONDS

STAGED_BATCHES = 2  # Decoded batches: one on the device, one waiting for it.
QUEUE_BATCHES = 16
MAX_QUEUE_ITEMS = 4096
MAX_QUEUE_BYTES = 2**30  # Compressed bytes of all waiting items.
# Up to this size, hashing and parsing on the event loop is faster than using a thread.
INLINE_BYTES = 2**14


@dataclass(frozen=True, slots=True)
class ItemRequest:
    """The header of an Encode call; see ``EncodeHeader`` in ``encoder.proto``."""

    request_id: str
    key: str
    fingerprint: str
    plan: Plan
    overrides: Overrides
    num_bytes: int
    lost: bool = False  # A consumer found no usable rows at the stored location.
    cache_salt: str = ""  # Part of the key.


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Milliseconds in each stage; a hit has none. See ``EncodeTimings`` in ``encoder.proto``."""

    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    put_ms: float = 0.0
    batch_items: int = 0
    batch_patches: int = 0
    hit: bool = False

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds by the name of the stage."""
        return {
            "encoder_queue": self.queue_ms,
            "preprocess": self.preprocess_ms,
            "encode": self.encode_ms,
            "put": self.put_ms,
        }


@dataclass(frozen=True, slots=True)
class EncodedItem:
    ref: EmbeddingRef
    timings: StageTimings


@dataclass(frozen=True, slots=True)
class _Verified:
    """One item whose bytes have arrived and match its key and plan."""

    request: ItemRequest
    data: bytes
    structure: Structure
    crashes: int  # Workers that died while they processed this item.
    encoded_before: int  # ``encoded_items`` at the look-up; if that has grown, look up again.
    is_misfit: bool  # The stored embedding under the key does not match the plan.


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One item of a batch."""

    request: ItemRequest
    pixels: Pixels


class Encoder:
    """Owns the device's thread, the preprocess pool and ``results``; borrows model and record."""

    def __init__(
        self,
        model: VisionModel,
        results: Results,
        record: CrashRecord,
        settings: EncoderConfig,
        capacity: Capacity,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.model = model
        self.results = results
        self.record = record
        self.settings = settings
        self.capacity = capacity
        self.encoded_items = 0  # Since start.
        batch = capacity.max_batch_patches
        self.backlog = Backlog(
            settings.max_queue_patches or QUEUE_BATCHES * max(batch, capacity.max_item_patches),
            MAX_QUEUE_ITEMS,
            MAX_QUEUE_BYTES,
        )
        self.pool = PreprocessPool(
            model.backend.preprocess,
            record,
            settings.preprocess_workers or settings.model.num_threads,
            STAGED_BATCHES * batch,
            settings.max_decode_bytes,
            settings.decode_timeout_s,
        )
        self._audit = Audit(model.backend, settings.audit_share)
        self._suspects = asyncio.Lock()
        self._flights: Flights[EncodedItem] = Flights()
        self._batcher: Batcher[_Decoded, Embedding] = Batcher(
            self._forward,
            batch,
            classify=model.backend.classify,
            on_split=_count_split,
            on_lost=on_lost,
        )

    def warm_up(self) -> None:
        """Encodes a blank picture on every thread except the store's, so that the first request
        does not pay for starting them. Blocks. Raises what encoding a picture raises."""
        buffer = io.BytesIO()
        side = math.isqrt(MIN_IMAGE_PIXELS)
        Image.new("RGB", (side, side), (127, 127, 127)).save(buffer, "JPEG")
        data = buffer.getvalue()
        plan = self.model.layout.plan(parse_structure(data), Overrides())
        request = ItemRequest("warm-up", "", "", plan, Overrides(), len(data))
        pixels = decode_and_cut(self.model.backend.preprocess, self._decode_task(request, data))
        self._batcher.submit(_Decoded(request, pixels), plan.num_patches).result()

    async def encode(
        self, request: ItemRequest, read: Callable[[], Awaitable[bytes]]
    ) -> EncodedItem:
        """The embedding of one item, from the store or by encoding it.

        ``read`` returns the item's bytes and is called only if they are needed. Cancelling
        drops the item unless another call waits for it or it is on the device already.
        Raises the errors that ``encoder.proto`` lists for Encode.
        """
        self._check(request)
        if request.key in self._flights:
            return await self._flights.join(request.key)
        encoded_before = self.encoded_items
        hit, is_misfit = await self._stored(request)
        if hit is not None:
            return hit
        crashes = self.record.check(request.key)
        cost = request.plan.num_patches, request.num_bytes
        self.backlog.check_room(*cost)
        data = await read()
        place = self.backlog.admit(*cost)  # From here on it counts against the backlog.
        try:
            if len(data) <= INLINE_BYTES:
                structure = self._verify(request, data)
            else:
                structure = await self.pool.run(self._verify, request, data)
        except BaseException:
            place.release()
            raise
        item = _Verified(request, data, structure, crashes, encoded_before, is_misfit)
        return await self._flights.run(request.key, lambda: self._run(item), place.release)

    def close(self) -> None:
        """Ends the threads. Blocks until their running work has ended."""
        self._batcher.close()
        self.pool.close()
        self.results.close()

    # ---- checks, cheapest first

    def _check(self, request: ItemRequest) -> None:
        check_key(request.key)
        mine, plan = self.model.fingerprint, request.plan
        if request.fingerprint != mine:
            raise Mispaired(
                f"this encoder's fingerprint is {mine[:12]}…, the key was computed for "
                f"{request.fingerprint[:12] or 'none'}…; call Describe and recompute the key"
            )
        if plan.modality is not Modality.IMAGE or plan.frames != 1:
            raise UnsupportedFeature(
                "video and animation cannot be encoded yet; send still pictures"
            )
        if (request.overrides.background or 0) > WHITE:
            raise InvalidRequest("the background must be from 0 to 0xFFFFFF", param="background")
        if request.num_bytes > self.settings.max_item_bytes:
            raise PayloadTooLarge(
                f"the item has {request.num_bytes} bytes; this encoder takes up to "
                f"{self.settings.max_item_bytes}"
            )
        if plan.num_patches > self.capacity.max_item_patches:
            raise InvalidRequest(
                f"the picture would be {plan.num_patches} patches; this encoder takes up to "
                f"{self.capacity.max_item_patches}. Lower max_pixels",
                param="max_pixels",
            )

    async def _stored(self, request: ItemRequest) -> tuple[EncodedItem | None, bool]:
        """(the stored item or None, whether a stored embedding does not match the plan)"""
        look_up = self.results.renew if request.lost else self.results.look_up
        ref = await look_up(request.key)
        if ref is None:
            return None, False
        backend, levels = self.model.backend, self.model.layout.deepstack_levels
        shape = (request.plan.num_tokens, backend.hidden_size)
        expected = {TensorSpec(name, backend.dtype, shape) for name in tensor_names(levels)}
        if set(ref.tensors) != expected:
            return None, True
        return EncodedItem(ref, StageTimings(hit=True)), False

    def _verify(self, request: ItemRequest, data: bytes) -> Structure:
        """The bytes' structure, after checking that key and plan match them.

        Raises InvalidRequest, InvalidMedia, PlanMismatch.
        """
        layout, settings = self.model.layout, self.settings
        key = content_key(
            data,
            layout.settings(),
            request.overrides,
            self.model.fingerprint,
            request.cache_salt,
        )
        if key != request.key:
            raise InvalidRequest(
                "the content key does not match the bytes; compute it from the bytes that are sent",
                param="key",
            )
        structure = parse_structure(data, settings.max_image_pixels, settings.max_decode_passes)
        plan = layout.plan(structure, request.overrides)
        if plan != request.plan:
            raise PlanMismatch(
                "the item's plan differs from the one computed from its bytes; gateway and encoder "
                "must run the same release and checkpoint",
                logged=f"the item's plan differs: {_difference(request.plan, plan)}",
            )
        return structure

    # ---- the run of one item

    async def _run(self, item: _Verified) -> EncodedItem:
        request, is_misfit = item.request, item.is_misfit
        if not is_misfit and self.encoded_items != item.encoded_before:
            hit, is_misfit = await self._stored(request)  # Another call may have encoded it.
            if hit is not None:
                return hit
        if is_misfit:
            await self.results.delete(request.key)
        started = time.monotonic()
        # One suspect at a time, so that a crash of the worker counts against this item alone.
        async with self._suspects if item.crashes else contextlib.nullcontext():
            pixels, done = await self._encode(item)
        ref, put_s = await self.results.publish(request.key, done.result)
        self.encoded_items += 1
        self.backlog.record(request.plan.num_patches)
        if item.crashes:
            self.record.clear(request.key)
        timings = StageTimings(
            queue_ms=(done.submitted - started - pixels.seconds + done.queue_s) * 1e3,
            preprocess_ms=pixels.seconds * 1e3,
            encode_ms=done.run_s * 1e3,
            put_ms=put_s * 1e3,
            batch_items=done.batch_items,
            batch_patches=done.batch_cost,
        )
        _observe(timings)
        _trace(started, pixels, done, put_s)
        return EncodedItem(ref, timings)

    async def _encode(self, item: _Verified) -> tuple[Pixels, BatchResult[Embedding]]:
        """Decodes the item in the preprocess pool and encodes it on the device."""
        request, is_suspect = item.request, item.crashes > 0
        job = DecodeJob(
            sharer=request.request_id or request.key,
            key=request.key,
            task=self._decode_task(request, item.data),
            structure=item.structure,
            is_suspect=is_suspect,
        )
        async with self.pool.prepared(job) as pixels:
            decoded = _Decoded(request, pixels)
            future = self._batcher.submit(decoded, request.plan.num_patches, alone=is_suspect)
            try:
                return pixels, await asyncio.wrap_future(future)
            except OpticNerveError:
                raise
            except Exception as error:
                raise self._failure(request, error) from error

    def _decode_task(self, request: ItemRequest, data: bytes) -> DecodeTask:
        return DecodeTask(
            data,
            request.plan,
            request.overrides.background,
            self.settings.max_image_pixels,
            self.settings.max_decode_passes,
        )

    def _forward(self, batch: Sequence[_Decoded]) -> list[Embedding]:
        """Encodes one batch; called on the device's thread."""
        plans = [item.request.plan for item in batch]
        with self.record.working_on([item.request.key for item in batch]):
            outputs = self.model.backend.encode([item.pixels.values for item in batch], plans)
        if batch[0].request.key:  # False for the warm-up.
            metrics.BATCH_ITEMS.observe(len(batch))
            metrics.BATCH_PATCHES.observe(sum(plan.num_patches for plan in plans))
        for plan, output in zip(plans, outputs, strict=True):
            rows = {tensor.shape[0] for tensor in output.values()}
            if rows != {plan.num_tokens}:
                raise EngineFailure(f"the tower made {rows} rows for {plan.num_tokens} tokens")
        for item, output in zip(batch, outputs, strict=True):
            if self._audit.chooses(item.request.key):
                self._audit.check(item.request.key, item.pixels.values, item.request.plan, output)
        return outputs

    def _failure(self, request: ItemRequest, error: Exception) -> OpticNerveError:
        """The caller's error for an exception on the device's thread."""
        if self.model.backend.classify(error) is Recovery.SPLIT:
            return EngineFailure(
                f"the encoder ran out of memory for a picture of {request.plan.num_patches} "
                "patches; lower max_pixels"
            )
        return EngineFailure("the encoder failed on this picture; its log has the details")


def _difference(given: Plan, made: Plan) -> str:
    """The fields in which two plans differ, for the log."""
    names = [field.name for field in fields(Plan)]
    pairs = [(name, getattr(given, name), getattr(made, name)) for name in names]
    return ", ".join(
        f"{name} {theirs} for {ours}" for name, theirs, ours in pairs if theirs != ours
    )


def _count_split(recovery: Recovery) -> None:
    metrics.BATCHES_SPLIT.labels("memory" if recovery is Recovery.SPLIT else "error").inc()


def _trace(started: float, pixels: Pixels, done: BatchResult[Embedding], put_s: float) -> None:
    """Records an item's stages as spans. Its run began at ``started`` and ends now. It waited
    twice: to be decoded, and to be encoded."""
    launched = done.submitted + done.queue_s
    decoded = pixels.began + pixels.seconds
    batch = {"batch_items": done.batch_items, "batch_patches": done.batch_cost}
    now = time.monotonic()
    traces.record("encoder_queue", started, pixels.began)
    traces.record("preprocess", pixels.began, decoded)
    traces.record("encoder_queue", decoded, launched)
    traces.record("encode", launched, launched + done.run_s, **batch)
    traces.record("put", now - put_s, now)


def _observe(timings: StageTimings) -> None:
    metrics.ITEMS_ENCODED.inc()
    for stage, milliseconds in timings.stages.items():
        STAGE_SECONDS.labels(stage=stage).observe(milliseconds / 1e3)
