"""The bytes of one Encode call: a header, then chunks, read when they are wanted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from opticnerve.errors import InvalidRequest, PayloadTooLarge
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.rpc.channel import CHUNK_BYTES

DISCARD_S = 2.0


class Upload:
    """One call's messages. ``header`` first, then ``read`` if at all, ``drain`` at the end."""

    def __init__(self, messages: AsyncIterator[pb.EncodeRequest]) -> None:
        self._messages = aiter(messages)
        self._first = b""
        self._num_bytes = 0  # As announced.
        self._ended = False  # The caller sends nothing any more.

    async def header(self) -> pb.EncodeHeader:
        """Raises InvalidRequest for a first message without one."""
        message = await self._next()
        if message is None or not message.HasField("header"):
            raise InvalidRequest("the first message of Encode carries the header", param="header")
        self._first, self._num_bytes = message.data, message.header.num_bytes
        return message.header

    async def read(self) -> bytes:
        """The item, without waiting for the stream's end once all that was announced is here.

        Raises InvalidRequest, PayloadTooLarge as soon as something does not fit.
        """
        parts, size = [self._first], len(self._first)
        self._check(self._first, size)
        while size < self._num_bytes:
            message = await self._next()
            if message is None:
                raise InvalidRequest(
                    f"the item ended after {size} of {self._num_bytes} bytes; send all of it",
                    param="data",
                )
            if message.HasField("header"):
                raise InvalidRequest("only the first message carries a header", param="header")
            size += len(message.data)
            self._check(message.data, size)
            parts.append(message.data)
        self._ended = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def drain(self) -> None:
        """Discards what the caller still sends; see ``discard``."""
        if not self._ended:
            await discard(self._messages)

    async def _next(self) -> pb.EncodeRequest | None:
        message = await anext(self._messages, None)
        self._ended = message is None
        return message

    def _check(self, chunk: bytes, size: int) -> None:
        if len(chunk) > CHUNK_BYTES:
            raise PayloadTooLarge(f"a chunk has at most {CHUNK_BYTES} bytes", param="data")
        if size > self._num_bytes:
            raise InvalidRequest(
                f"the item is longer than the {self._num_bytes} bytes that its header says",
                param="num_bytes",
            )


async def discard(messages: AsyncIterator[object]) -> None:
    """Reads what a caller still sends, for a while, and forgets it.

    A gRPC client that is answered while it writes hears of an internal error instead.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for _ in messages:
                pass
