"""Callers that begin a call and do not go on: what they hold, for how long, and whom they keep
out. Real gRPC in this process, a backend without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from encoder_service import upload
from llm_service.wire import servicer as llm
from opticnerve.config import RpcConfig
from opticnerve.errors import DeadlineExceeded, OpticNerveError, Overloaded
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.pb import llm_pb2_grpc
from opticnerve.rpc.channel import open_channel
from opticnerve.rpc.errors import from_rpc
from opticnerve.rpc.server import Server
from tests.encoders import WAIT_S, Running, picture, running
from tests.fakes import until

PATCHES = 36  # Of each picture here.
MANY = 64


async def ended(call: grpc.aio.Call) -> OpticNerveError:
    """The typed error that a call ends in."""
    async with asyncio.timeout(WAIT_S):
        code, details = await call.code(), await call.details()
        trailing = await call.trailing_metadata()
    return from_rpc(grpc.aio.AioRpcError(code, trailing, trailing, details))


def begin(service: Running, number: int, announced: int, sent: bytes = b"") -> grpc.aio.Call:
    """An Encode call of an item of its own that sends no more than ``sent``, and goes on."""
    (header, *_) = service.messages(picture(), key=f"{number:064x}", num_bytes=announced)
    header.data = sent

    async def messages() -> AsyncIterator[pb.EncodeRequest]:
        yield header
        await asyncio.Event().wait()

    return service.stub.Encode(messages(), timeout=WAIT_S)


def test_headers_without_bytes_keep_nobody_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, max_queue_patches=2 * PATCHES) as service:
            stalled = [begin(service, number, 100_000) for number in range(MANY)]
            await until(lambda: len(service.uploads) == MANY)
            assert service.encoder.backlog.items == 0 and service.uploads.num_bytes == 0
            for seed in range(3):
                assert (await service.encode(picture(seed))).ref.num_rows == 9
            assert len(service.uploads) == MANY
            for call in stalled:
                call.cancel()
            await until(lambda: len(service.uploads) == 0)

    asyncio.run(scenario())


def test_items_that_do_not_come_are_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "HEADER_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        async with running(tmp_path) as service:
            silent = service.stub.Encode(timeout=WAIT_S)
            for call in (silent, begin(service, 1, 1000), begin(service, 2, 1000, b"x" * 999)):
                error = await ended(call)
                assert type(error) is DeadlineExceeded and "within" in error.message
            assert service.uploads.num_bytes == 0

    asyncio.run(scenario())


def test_items_on_their_way_hold_bounded_bytes_and_the_stalled_ones_go_first(
    tmp_path: Path,
) -> None:
    most, part = 2**20, 300_000

    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.uploads.max_bytes = most
            stalled: list[grpc.aio.Call] = []
            for number in range(8):
                stalled.append(begin(service, number, 900_000, b"x" * part))
                room = min(number + 1, most // part)
                await until(lambda room=room: service.uploads.num_bytes == room * part)
            data = picture(1, (336, 336), "BMP")
            assert most - 3 * part < len(data) < most
            assert (await service.encode(data)).ref.num_rows == 9
            assert service.uploads.num_bytes <= most
            for call in stalled[:5]:
                error = await ended(call)
                assert type(error) is Overloaded and error.retry_after_s
            for call in stalled:
                call.cancel()
            await until(lambda: len(service.uploads) == 0)

    asyncio.run(scenario())


def test_a_generation_that_is_not_begun_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llm, "START_S", 0.05)

    async def scenario() -> None:
        async with Server(RpcConfig(), llm.SERVICE) as server:
            servicer = llm.LLMServicer(server)
            servicer.loaded = cast(Any, SimpleNamespace())  # Asked for nothing before Start.
            llm_pb2_grpc.add_LLMServicer_to_server(servicer, server.grpc)
            await server.start()
            async with open_channel(server.address) as channel:
                error = await ended(llm_pb2_grpc.LLMStub(channel).Generate(timeout=WAIT_S))
                assert type(error) is DeadlineExceeded and "Start" in error.message

    asyncio.run(scenario())
