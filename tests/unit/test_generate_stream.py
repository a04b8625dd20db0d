"""One Generate call: what is tried again, and for how long."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from opticnerve.errors import Unavailable
from opticnerve.generation import generate_stream
from opticnerve.generation.generate_stream import HIDDEN_STATUS, GenerateStream, StreamPolicy
from opticnerve.pb import llm_pb2 as pb

CALL_S = 40.0  # That each call of the fake worker takes.


class EndedCall:
    """A call that ended while its Start was written, so that gRPC hides its status."""

    async def write(self, message: pb.GenerateIn) -> None: ...

    def __aiter__(self) -> EndedCall:
        return self

    async def __anext__(self) -> pb.GenerateOut:
        empty = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, empty, empty, HIDDEN_STATUS)

    def cancel(self) -> None: ...


def test_both_attempts_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call has the time that the first has left, and so has its wait for embeddings."""
    now = 1000.0
    monkeypatch.setattr(generate_stream.time, "monotonic", lambda: now)
    timeouts: list[float] = []
    waits: list[int] = []
    start = pb.Start(request_id="r", embedding_wait_ms=100_000)

    class Stub:
        def Generate(self, timeout: float, metadata: object) -> EndedCall:
            nonlocal now
            timeouts.append(timeout)
            waits.append(start.embedding_wait_ms)
            now += CALL_S
            return EndedCall()

    async def main() -> None:
        stub: Any = Stub()
        source: Any = None
        stream = GenerateStream(stub, start, source, 100.0, StreamPolicy())
        with pytest.raises(Unavailable):
            _ = [event async for event in stream.events()]

    asyncio.run(main())
    assert timeouts == [100.0, 100.0 - CALL_S]
    assert waits == [100_000, 60_000]
