"""Client channels to internal services, and uploads in chunks, which keep messages small."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opticnerve.media.plan import Overrides, Plan
from opticnerve.pb import encoder_pb2
from opticnerve.rpc import convert
from opticnerve.rpc.tls import ChannelTls, TlsChannel
from opticnerve.rpc.token import TokenChannel

CHUNK_BYTES = 2**20

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 8 * 2**20),
    ("grpc.max_send_message_length", 8 * 2**20),
    ("grpc.keepalive_time_ms", 10_000),  # Detects a peer that vanished without a FIN.
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # Keepalive waits for this too; a minute by default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(
    address: str, token: str | None = None, tls: ChannelTls | None = None
) -> grpc.aio.Channel:
    """A lazily connected channel to host:port, encrypted with ``tls``; its calls carry ``token``.
    The caller closes it."""
    channel: grpc.aio.Channel
    if tls is None:
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        channel = TlsChannel(address, tls, CHANNEL_OPTIONS)
    return channel if token is None else TokenChannel(channel, token)


def chunks(data: bytes, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """``data`` in pieces of at most ``size`` bytes; one empty piece for no data."""
    view = memoryview(data)
    for start in range(0, max(len(data), 1), size):
        yield bytes(view[start : start + size])


async def is_serving(channel: grpc.aio.Channel, timeout_s: float = 2.0) -> bool:
    """Whether the service behind ``channel`` answers SERVING within ``timeout_s``."""
    try:
        answer = await _check(channel, "", timeout_s)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def is_instance(channel: grpc.aio.Channel, instance_id: str, timeout_s: float = 2.0) -> bool:
    """Whether the process behind ``channel`` has this ``Server.instance_id``. Raises grpc.RpcError
    if nothing answers within ``timeout_s``."""
    try:
        await _check(channel, instance_id, timeout_s)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        return False
    return True


async def _check(
    channel: grpc.aio.Channel, service: str, timeout_s: float
) -> health_pb2.HealthCheckResponse:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # Typed for blocking calls only.
    request = health_pb2.HealthCheckRequest(service=service)
    return cast(health_pb2.HealthCheckResponse, await stub.Check(request, timeout=timeout_s))


@dataclass(frozen=True, slots=True)
class EncodeItem:
    """One item, ready for an encoder that has ``fingerprint``. ``data``: the compressed picture."""

    key: str
    fingerprint: str
    plan: Plan
    overrides: Overrides
    data: bytes = field(repr=False)
    lost: bool = False  # Whether an LLM worker found no usable rows at the reference.
    cache_salt: str = ""  # Part of the key.


class EncodeUpload:
    """An item's Encode messages: chunks, the first with the header. ``delivered``: all are sent."""

    def __init__(self, item: EncodeItem, request_id: str = "") -> None:
        self.delivered = False
        self._data = item.data
        self._header = encoder_pb2.EncodeHeader(
            request_id=request_id,
            key=item.key,
            fingerprint=item.fingerprint,
            plan=convert.plan_to_pb(item.plan),
            overrides=convert.overrides_to_pb(item.overrides),
            num_bytes=len(item.data),
            lost=item.lost,
            cache_salt=item.cache_salt,
        )

    async def messages(self) -> AsyncIterator[encoder_pb2.EncodeRequest]:
        header: encoder_pb2.EncodeHeader | None = self._header
        for chunk in chunks(self._data):
            yield encoder_pb2.EncodeRequest(header=header, data=chunk)
            header = None
        self.delivered = True
