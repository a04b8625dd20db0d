"""Reads Encode calls: a header, then the item's bytes in chunks, which are read only if needed.

An item whose bytes are still arriving does not count in the encoder's backlog. Instead, the time
until its header and its last byte is bounded, and so are the bytes of all such items together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from opticnerve.errors import DeadlineExceeded, InvalidRequest, Overloaded, PayloadTooLarge
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.rpc.channel import CHUNK_BYTES

DISCARD_S = 2.0
HEADER_TIMEOUT_S = 10.0  # Also added to the timeout of the bytes.
MIN_BYTES_PER_S = 2**20  # An upload slower than this is ended.
MAX_BYTES = 2**29  # Of all items that are arriving together.
FULL_RETRY_S = 1.0


class Uploads:
    """The uploads in progress and a bound on the bytes of all of them.

    If the next chunk exceeds the bound, the uploads whose last chunk is oldest are aborted, so that
    callers that send slowly, or stop, cannot keep others out.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._sizes: dict[Upload, int] = {}  # Bytes received; newest chunk last.

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, upload: Upload, size: int) -> None:
        """Counts a chunk of ``upload``; aborts the idlest others while the bound is exceeded."""
        self._sizes[upload] = self._sizes.pop(upload, 0) + size
        self.num_bytes += size
        while self.num_bytes > self.max_bytes and len(self._sizes) > 1:
            idle = next(iter(self._sizes))
            self.remove(idle)
            idle.abort()

    def remove(self, upload: Upload) -> None:
        self.num_bytes -= self._sizes.pop(upload, 0)


class Upload:
    """One call's messages: ``header`` first, then ``read`` if needed, ``drain`` at the end."""

    def __init__(self, messages: AsyncIterator[pb.EncodeRequest], uploads: Uploads) -> None:
        self._messages = aiter(messages)
        self._uploads = uploads
        self._first = b""
        self._num_bytes = 0  # As announced in the header.
        self._ended = False  # The caller has sent its last message.
        self._limit = asyncio.timeout(None)
        self._aborted = False

    async def header(self) -> pb.EncodeHeader:
        """The header. Raises InvalidRequest if the first message has none, DeadlineExceeded if none
        arrives."""
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                message = await self._next()
        except TimeoutError as error:
            raise DeadlineExceeded(f"no header arrived within {HEADER_TIMEOUT_S:g} s") from error
        if message is None or not message.HasField("header"):
            raise InvalidRequest("the first message of Encode carries the header", param="header")
        self._first, self._num_bytes = message.data, message.header.num_bytes
        return message.header

    async def read(self) -> bytes:
        """The item's bytes, once as many as announced have arrived; the stream may still be open.

        Raises InvalidRequest or PayloadTooLarge at the first message that does not fit,
        DeadlineExceeded if the bytes are too slow, Overloaded if other uploads need the memory.
        """
        timeout_s = HEADER_TIMEOUT_S + self._num_bytes / MIN_BYTES_PER_S
        self._limit = asyncio.timeout(timeout_s)
        try:
            async with self._limit:
                return await self._read()
        except TimeoutError as error:
            if self._aborted:
                raise Overloaded(
                    "too many uploads in progress; retry later", retry_after_s=FULL_RETRY_S
                ) from error
            raise DeadlineExceeded(
                f"the item's {self._num_bytes} bytes did not arrive within {timeout_s:.1f} s"
            ) from error
        finally:
            self._uploads.remove(self)

    async def drain(self) -> None:
        """Discards the rest of the stream; see ``discard``."""
        if not self._ended:
            await discard(self._messages)

    def abort(self) -> None:
        """Ends a running ``read`` with Overloaded, for lack of memory."""
        if not self._limit.expired():
            self._aborted = True
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
        """Counts a chunk; ``size`` is the item's bytes so far. Raises what ``read`` raises."""
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

    A gRPC client that still writes when the response arrives reports an internal error instead of
    that response.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for _ in messages:
                pass
