"""The encoder on the wire: messages to values and back, chunks, deadlines. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

import opticnerve
from encoder_service.encoder import Encoder
from encoder_service.item import Answer, Request, Timings
from encoder_service.upload import Upload, Uploads, discard
from opticnerve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
    UnsupportedFeature,
)
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.pb import encoder_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.channel import CHUNK_BYTES, chunks
from opticnerve.rpc.errors import streaming, unary
from opticnerve.rpc.server import Server
from opticnerve.telemetry import events

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "opticnerve.v1.Encoder"
SHOWN_KEY = 12  # Characters of a content key in the log.
DEFAULT_DEADLINE_S = 600.0  # A caller that sets none must not hold its place for ever.


@dataclass(frozen=True, slots=True)
class Loaded:
    """What there is once the checkpoint is loaded."""

    encoder: Encoder
    family: str
    pair_id: str


class EncoderServicer(encoder_pb2_grpc.EncoderServicer):
    """Answers Unavailable until ``loaded`` is set."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.uploads = Uploads()
        self.loaded: Loaded | None = None

    def _ready(self) -> Loaded:
        if self.loaded is None:
            raise Unavailable("the encoder is loading its checkpoint", retry_after_s=1.0)
        return self.loaded

    @unary
    async def Encode(
        self, request_iterator: AsyncIterator[pb.EncodeRequest], context: Context
    ) -> pb.EncodeResponse:
        upload = Upload(request_iterator, self.uploads)
        try:
            async with self._server.running.work():
                return _response(await self._encode(upload, context.time_remaining()))
        finally:  # A cancelled or cut call's stream has ended: nothing is waited for then.
            await upload.drain()

    async def _encode(self, upload: Upload, remaining_s: float | None) -> Answer:
        encoder = self._ready().encoder
        try:
            async with asyncio.timeout(DEFAULT_DEADLINE_S if remaining_s is None else remaining_s):
                header = await upload.header()
                events.identify(header.request_id)
                request = _request(header)
                _note(request)
                answer = await encoder.encode(request, upload.read)
        except TimeoutError as error:
            raise DeadlineExceeded("the item's deadline passed before it was encoded") from error
        _note_timings(answer.timings)
        return answer

    @unary
    async def Probe(
        self, request_iterator: AsyncIterator[pb.ProbeRequest], context: Context
    ) -> pb.ProbeResponse:
        await discard(request_iterator)
        raise UnsupportedFeature(
            "video and animation planning is not available yet; send still pictures"
        )

    @streaming
    async def Fetch(
        self, request: pb.FetchRequest, context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        data, mac = await self._ready().encoder.shelf.read(request.key)
        size = len(data)
        for chunk in chunks(data, CHUNK_BYTES):
            yield pb.FetchResponse(num_bytes=size, data=chunk, mac=mac)
            size, mac = 0, b""

    @unary
    async def Describe(
        self, request: pb.DescribeEncoderRequest, context: Context
    ) -> pb.DescribeEncoderResponse:
        loaded = self._ready()
        encoder, backlog = loaded.encoder, loaded.encoder.backlog
        return pb.DescribeEncoderResponse(
            fingerprint=encoder.identity.fingerprint,
            family=loaded.family,
            backend=encoder.backend.name,
            device=encoder.backend.device,
            dtype=encoder.backend.dtype,
            hidden_size=encoder.backend.hidden_size,
            shm_tier_id=encoder.shelf.store.tier_id,
            version=opticnerve.__version__,
            limits=pb.EncoderLimits(
                max_batch_patches=encoder.capacity.max_batch_patches,
                max_item_patches=encoder.capacity.max_item_patches,
                max_queue_patches=backlog.max_patches,
                max_item_bytes=encoder.limits.max_item_bytes,
            ),
            load=pb.EncoderLoad(
                queued_items=backlog.items,
                queued_patches=backlog.patches,
                encoded_items=encoder.encoded_items,
                draining=self._server.draining,
                patches_per_s=backlog.patches_per_s,
            ),
            pair_id=loaded.pair_id,
            store=convert.store_state_to_pb(encoder.shelf.store.state, encoder.identity.seal),
            instance_id=self._server.instance_id,
            fetch_address=encoder.identity.fetch_address,
        )


def _request(header: pb.EncodeHeader) -> Request:
    """Raises InvalidRequest for a header without a plan of some patches."""
    if not header.HasField("plan") or not header.plan.num_patches or not header.plan.num_tokens:
        raise InvalidRequest("the header needs the item's plan", param="plan")
    return Request(
        request_id=header.request_id,
        key=header.key,
        fingerprint=header.fingerprint,
        plan=convert.plan_from_pb(header.plan),
        overrides=convert.overrides_from_pb(header.overrides),
        num_bytes=header.num_bytes,
        lost=header.lost,
        cache_salt=header.cache_salt,
    )


def _note(request: Request) -> None:
    """What the call's line in the log says of its item."""
    plan = request.plan
    events.note(
        item=request.key[:SHOWN_KEY],
        size=f"{plan.width}x{plan.height}",
        bytes=request.num_bytes,
        patches=plan.num_patches,
        tokens=plan.num_tokens,
    )


def _note_timings(timings: Timings) -> None:
    if timings.hit:
        events.note(hit=True)
        return
    events.note(
        queue_ms=timings.queue_s * 1e3,
        preprocess_ms=timings.preprocess_s * 1e3,
        encode_ms=timings.encode_s * 1e3,
        put_ms=timings.put_s * 1e3,
        batch_items=timings.batch_items,
    )


def _response(answer: Answer) -> pb.EncodeResponse:
    return pb.EncodeResponse(ref=convert.ref_to_pb(answer.ref), timings=_timings(answer.timings))


def _timings(timings: Timings) -> pb.EncodeTimings:
    return pb.EncodeTimings(
        queue_ms=timings.queue_s * 1e3,
        preprocess_ms=timings.preprocess_s * 1e3,
        encode_ms=timings.encode_s * 1e3,
        put_ms=timings.put_s * 1e3,
        batch_items=timings.batch_items,
        batch_patches=timings.batch_patches,
        hit=timings.hit,
    )
