"""The bytes of Encode calls: a header, then chunks, read only if they are needed, within bounds.

An item whose bytes are still arriving takes no place in the encoder's backlog. It is bounded by the
time until its header and until its last byte, and by the bytes of all such items together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from opticnerve.errors import DeadlineExceeded, InvalidRequest, Overloaded, PayloadTooLarge
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.rpc.channel import CHUNK_BYTES

DISCARD_S = 2.0
PATIENCE_S = 10.0  # For a call's header, and for its bytes in addition to their time at LEAST_RATE.
LEAST_RATE = 2**20  # Bytes a second.
MAX_BYTES = 2**29  # Of all items that are arriving.
FULL_RETRY_S = 1.0


class Uploads:
    """The uploads to one encoder, whose bytes are bounded in sum.

    If there is no room for the next chunk, the uploads that have waited longest for theirs are
    given up, so that callers that send slowly, or stop, cannot keep others out.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._sizes: dict[Upload, int] = {}  # Bytes received; newest chunk last.

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, upload: Upload, size: int) -> None:
        """Counts a chunk of ``upload``, and gives others up if they exceed the bound."""
        self._sizes[upload] = self._sizes.pop(upload, 0) + size
        self.num_bytes += size
        while self.num_bytes > self.max_bytes and len(self._sizes) > 1:
            idle = next(iter(self._sizes))
            self.remove(idle)
            idle.give_up()

    def remove(self, upload: Upload) -> None:
        self.num_bytes -= self._sizes.pop(upload, 0)


class Upload:
    """One call's messages. ``header`` first, then ``read`` if at all, ``drain`` at the end."""

    def __init__(self, messages: AsyncIterator[pb.EncodeRequest], uploads: Uploads) -> None:
        self._messages = aiter(messages)
        self._uploads = uploads
        self._first = b""
        self._num_bytes = 0  # As announced.
        self._ended = False  # The caller has nothing more to send.
        self._limit = asyncio.timeout(None)
        self._given_up = False

    async def header(self) -> pb.EncodeHeader:
        """The header. Raises InvalidRequest if the first message has none, DeadlineExceeded if no
        message comes."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                message = await self._next()
        except TimeoutError as error:
            raise DeadlineExceeded(f"no header came within {PATIENCE_S:g} s") from error
        if message is None or not message.HasField("header"):
            raise InvalidRequest("the first message of Encode carries the header", param="header")
        self._first, self._num_bytes = message.data, message.header.num_bytes
        return message.header

    async def read(self) -> bytes:
        """The item's bytes, as soon as all that were announced have arrived; the stream may go on.

        Raises InvalidRequest or PayloadTooLarge at the first message that does not fit,
        DeadlineExceeded if the bytes come too slowly, Overloaded if other items need the room.
        """
        patience_s = PATIENCE_S + self._num_bytes / LEAST_RATE
        self._limit = asyncio.timeout(patience_s)
        try:
            async with self._limit:
                return await self._read()
        except TimeoutError as error:
            if self._given_up:
                raise Overloaded(
                    "too many items are on their way to the encoder", retry_after_s=FULL_RETRY_S
                ) from error
            raise DeadlineExceeded(
                f"the item's {self._num_bytes} bytes did not come within {patience_s:.1f} s"
            ) from error
        finally:
            self._uploads.remove(self)

    async def drain(self) -> None:
        """Discards the rest of the stream; see ``discard``."""
        if not self._ended:
            await discard(self._messages)

    def give_up(self) -> None:
        """Ends the ``read`` that is under way, for lack of room."""
        if not self._limit.expired():
            self._given_up = True
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def _read(self) -> bytes:
        parts, size = [self._first], len(self._first)
        self._count(self._first, size)
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
            self._count(message.data, size)
            parts.append(message.data)
        self._ended = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _next(self) -> pb.EncodeRequest | None:
        message = await anext(self._messages, None)
        self._ended = message is None
        return message

    def _count(self, chunk: bytes, size: int) -> None:
        """Counts a chunk, the last of ``size`` bytes so far. Raises what ``read`` raises."""
        if len(chunk) > CHUNK_BYTES:
            raise PayloadTooLarge(f"a chunk has at most {CHUNK_BYTES} bytes", param="data")
        if size > self._num_bytes:
            raise InvalidRequest(
                f"the item is longer than the {self._num_bytes} bytes that its header says",
                param="num_bytes",
            )
        self._uploads.add(self, len(chunk))


async def discard(messages: AsyncIterator[object]) -> None:
    """Reads and drops what a caller still sends, for ``DISCARD_S`` at most.

    A gRPC client that is answered while it still writes reports an internal error instead of the
    answer.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for _ in messages:
                pass
