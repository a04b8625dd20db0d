"""The asynchronous client of one encoder."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.client.contents import EncodedPicture
from opticnerve.content_keys import content_key
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import EmbeddingCorrupt, Mispaired
from opticnerve.extras import require_extra
from opticnerve.generation.values import UINT64, check_integer
from opticnerve.media.load import Picture, read_picture
from opticnerve.media.plan import NO_OVERRIDES, WHITE, Overrides
from opticnerve.media.probe import parse_structure
from opticnerve.models.family import Layout
from opticnerve.models.registry import make_layout
from opticnerve.pb import encoder_pb2, encoder_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.channel import EncodeItem, EncodeUpload, open_channel
from opticnerve.rpc.errors import typed_errors
from opticnerve.rpc.tls import ChannelTls
from opticnerve.rpc.token import load_token

if TYPE_CHECKING:
    import torch


class AsyncEncoderClient:
    """Encodes pictures on one encoder at ``address`` (host:port).

    ``model``: the encoder's checkpoint (a directory, a hub id, or None for the built-in demo) or
    its layout, with which the client plans pictures and computes their content keys.
    ``rpc_token_file``: the encoder's. ``tls``: for an encoder with ``--tls-certificate``. Raises
    the errors of ``opticnerve.errors``. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        address: str,
        model: str | Path | Layout | None = None,
        *,
        timeout_s: float = 120.0,
        rpc_token_file: str | Path | None = None,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._model = model
        self._layout: Layout | None = None
        self._fingerprint = ""
        self._trusted: set[str] = set()  # Fetch addresses that the encoder itself reported.
        self._token = load_token(rpc_token_file)
        self._tls = tls
        self._channel = open_channel(address, self._token, tls)
        self._stub = encoder_pb2_grpc.EncoderStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def describe(self) -> encoder_pb2.DescribeEncoderResponse:
        """The encoder's identity, limits and load."""
        request = encoder_pb2.DescribeEncoderRequest()
        with typed_errors():
            return await self._stub.Describe(request, timeout=self.timeout_s)

    async def layout(self) -> Layout:
        """The model's layout: how pictures become patches and placeholders. Raises
        CheckpointError."""
        if self._layout is None:
            model = self._model
            if model is None or isinstance(model, str | Path):
                source = None if model is None else str(model)
                self._layout = await asyncio.to_thread(lambda: make_layout(Checkpoint.open(source)))
            else:
                self._layout = model
        return self._layout

    async def encode(
        self, picture: Picture, overrides: Overrides = NO_OVERRIDES, *, lost: bool = False
    ) -> EncodedPicture:
        """A reference to the picture's embedding; the picture is encoded unless the store has it.

        ``lost``: an LLM worker could not use the rows of an earlier reference, so the encoder
        checks what is stored before it answers. Raises InvalidMedia, InvalidRequest, Overloaded,
        Unavailable, DeadlineExceeded...
        """
        data = await asyncio.to_thread(read_picture, picture)
        try:
            return await self._send(await self._plan(data, overrides, lost))
        except Mispaired:  # Now another encoder, with other content keys, has this address.
            self._fingerprint = ""
            return await self._send(await self._plan(data, overrides, lost))

    async def fetch(self, ref: EmbeddingRef) -> dict[str, torch.Tensor]:
        """The embedding's tensors by name, on the CPU; each supports DLPack.

        They come from the reference itself, or by Fetch from the encoder that it names. Raises
        NotFound if that encoder no longer has them, EmbeddingCorrupt if they are not what the
        reference says, StartupError without torch.
        """
        require_extra("worker", "fetch()")
        from opticnerve.embeddings import codec

        data = ref.location.inline or await self._fetch_bytes(ref)
        tensors, _ = await asyncio.to_thread(codec.from_bytes, data)
        if set(codec.specs_of(tensors)) != set(ref.tensors):
            raise EmbeddingCorrupt("the embedding is not what its reference says")
        return tensors

    async def _plan(self, data: bytes, overrides: Overrides, lost: bool) -> EncodeItem:
        layout = await self.layout()
        if not self._fingerprint:
            self._fingerprint = (await self.describe()).fingerprint
        item = await asyncio.to_thread(plan_picture, data, layout, self._fingerprint, overrides)
        return replace(item, lost=lost)

    async def _send(self, item: EncodeItem) -> EncodedPicture:
        messages = EncodeUpload(item).messages()
        with typed_errors():
            answer = await self._stub.Encode(messages, timeout=self.timeout_s)
        ref = convert.ref_from_pb(answer.ref)
        self._trusted.add(ref.location.fetch_address)
        return EncodedPicture(
            key=ref.key,
            fingerprint=ref.fingerprint,
            tensors=ref.tensors,
            num_rows=ref.num_rows,
            location=ref.location,
            plan=item.plan,
            hit=answer.timings.hit,
        )

    async def _fetch_bytes(self, ref: EmbeddingRef) -> bytes:
        """Sends the token only to the encoder and to addresses that it reported: a reference may
        come from an untrusted source."""
        address = ref.location.fetch_address
        if address in ("", self.address):
            return await self._fetch_from(self._stub, ref.key)
        token = self._token if address in self._trusted else None
        channel = open_channel(address, token, self._tls)
        try:
            return await self._fetch_from(encoder_pb2_grpc.EncoderStub(channel), ref.key)
        finally:
            await channel.close()

    async def _fetch_from(self, stub: encoder_pb2_grpc.EncoderAsyncStub, key: str) -> bytes:
        request = encoder_pb2.FetchRequest(key=key)
        parts: list[bytes] = []
        with typed_errors():
            async for message in stub.Fetch(request, timeout=self.timeout_s):
                parts.append(message.data)
        return b"".join(parts)


def plan_picture(
    data: bytes, layout: Layout, fingerprint: str, overrides: Overrides = NO_OVERRIDES
) -> EncodeItem:
    """Plans a picture from its structure, and computes its key. Raises InvalidMedia,
    InvalidRequest."""
    for name, most in (("min_pixels", UINT64), ("max_pixels", UINT64), ("background", WHITE)):
        if (value := getattr(overrides, name)) is not None:
            check_integer(name, value, most)
    plan = layout.plan(parse_structure(data), overrides)
    key = content_key(data, layout.settings(), overrides, fingerprint)
    return EncodeItem(key, fingerprint, plan, overrides, data)
