"""The encoder's gRPC service: converts messages, chunks data, applies deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

import opticnerve
from encoder_service.encoder import Encoder, ItemRequest
from encoder_service.upload import Upload, Uploads, discard
from opticnerve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    UnsupportedFeature,
)
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.pb import encoder_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.calls import WorkerServicer
from opticnerve.rpc.channel import CHUNK_BYTES, chunks
from opticnerve.rpc.server import Server
from opticnerve.telemetry import logs, traces

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "opticnerve.v1.Encoder"
LOGGED_KEY = 12  # Characters of a content key in the log.
DEFAULT_DEADLINE_S = 600.0  # For a caller that sets none.


class EncoderServicer(WorkerServicer[Encoder], encoder_pb2_grpc.EncoderServicer):
    """See ``encoder.proto``."""

    worker, kind = "the encoder", "encoder"

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.uploads = Uploads()

    async def Encode(
        self, request_iterator: AsyncIterator[pb.EncodeRequest], context: Context
    ) -> pb.EncodeResponse:
        upload = Upload(request_iterator, self.uploads)
        try:
            async with self.server.running.work():
                return await self._encode(upload, context.time_remaining())
        finally:  # Returns at once if the call is cancelled, since its stream has ended.
            await upload.drain()

    async def _encode(self, upload: Upload, remaining_s: float | None) -> pb.EncodeResponse:
        encoder = self.require_loaded()
        try:
            async with asyncio.timeout(DEFAULT_DEADLINE_S if remaining_s is None else remaining_s):
                header = await upload.header()
                logs.identify(header.request_id)
                request = _request(header)
                _note(request)
                item = await encoder.encode(request, upload.read)
        except TimeoutError as error:
            raise DeadlineExceeded("the item's deadline passed before it was encoded") from error
        timings = convert.field_values(item.timings, pb.EncodeTimings)
        logs.note(**{name: value for name, value in timings.items() if value})
        return pb.EncodeResponse(
            ref=convert.ref_to_pb(item.ref), timings=pb.EncodeTimings(**timings)
        )

    async def Probe(
        self, request_iterator: AsyncIterator[pb.ProbeRequest], context: Context
    ) -> pb.ProbeResponse:
        await discard(request_iterator)
        raise UnsupportedFeature(
            "video and animation planning is not available yet; send still pictures"
        )

    async def Fetch(
        self, request: pb.FetchRequest, context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        data, mac = await self.require_loaded().results.read(request.key)
        size = len(data)
        for chunk in chunks(data, CHUNK_BYTES):
            yield pb.FetchResponse(num_bytes=size, data=chunk, mac=mac)
            size, mac = 0, b""

    async def Describe(
        self, request: pb.DescribeEncoderRequest, context: Context
    ) -> pb.DescribeEncoderResponse:
        return self.describe()

    def describe(self) -> pb.DescribeEncoderResponse:
        encoder = self.require_loaded()
        model, backlog, results = encoder.model, encoder.backlog, encoder.results
        return pb.DescribeEncoderResponse(
            fingerprint=model.fingerprint,
            family=model.family,
            backend=model.backend.name,
            precision=model.backend.precision,
            device=model.backend.device,
            dtype=model.backend.dtype,
            hidden_size=model.backend.hidden_size,
            shm_tier_id=results.store.tier_id,
            version=opticnerve.__version__,
            limits=pb.EncoderLimits(
                max_batch_patches=encoder.capacity.max_batch_patches,
                max_item_patches=encoder.capacity.max_item_patches,
                max_queue_patches=backlog.max_patches,
                max_item_bytes=encoder.settings.max_item_bytes,
            ),
            load=pb.EncoderLoad(
                queued_items=backlog.items,
                queued_patches=backlog.patches,
                encoded_items=encoder.encoded_items,
                draining=self.server.running.draining,
                patches_per_s=backlog.patches_per_s,
            ),
            pair_id=model.pair_id,
            store=convert.store_state_to_pb(results.store.state, results.seal),
            instance_id=self.server.instance_id,
            fetch_address=results.fetch_address,
        )


def _request(header: pb.EncodeHeader) -> ItemRequest:
    """Raises InvalidRequest for a header whose plan has no patches or tokens."""
    if not header.HasField("plan") or not header.plan.num_patches or not header.plan.num_tokens:
        raise InvalidRequest(
            "the header must have the item's plan, with num_patches and num_tokens", param="plan"
        )
    values = convert.field_values(header, pb.EncodeHeader)
    values |= {
        "plan": convert.plan_from_pb(header.plan),
        "overrides": convert.overrides_from_pb(header.overrides),
    }
    return ItemRequest(**values)


def _note(request: ItemRequest) -> None:
    """Adds the item to the call's line in the log."""
    plan = request.plan
    logs.note(
        item=request.key[:LOGGED_KEY],
        size=f"{plan.width}x{plan.height}",
        bytes=request.num_bytes,
        patches=plan.num_patches,
        tokens=plan.num_tokens,
    )
    traces.current().set(patches=plan.num_patches, tokens=plan.num_tokens)
