"""Whom an LLM worker calls because a reference says so, and what it tells them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from opticnerve.config import RpcConfig
from opticnerve.embeddings.ref import Location
from opticnerve.errors import EmbeddingNotFound, InvalidRequest
from opticnerve.pb import encoder_pb2
from opticnerve.secret import make_secret, read_secret
from tests import encoders
from tests.fakes import FakeEncoder
from tests.llms import Demo, Picture, Worker, next_message, read, ready, running

EVERYWHERE = RpcConfig(host="0.0.0.0", insecure=True, drain_timeout_s=0.5)


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


@contextlib.asynccontextmanager
async def listener() -> AsyncIterator[tuple[list[object], str]]:
    """What connects, and the address to connect to. It answers nothing."""
    connections: list[object] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield connections, f"{host}:{port}"


class Holder(FakeEncoder):
    """Serves Fetch of one picture, and keeps what the calls bring as their authorization."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.picture = picture
        self.seen: list[str | None] = []

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[encoder_pb2.FetchResponse]:
        self.seen.append(dict(context.invocation_metadata()).get("authorization"))
        data = self.picture.data()
        yield encoder_pb2.FetchResponse(num_bytes=len(data), data=data)


async def refused(worker: Worker, demo: Demo, address: str) -> EmbeddingNotFound:
    """What a request ends with that has its rows at ``address`` and nowhere else."""
    picture = demo.picture(1)
    ref = picture.ref(Location(fetch_address=address))
    call = await worker.open(demo.prompt(4, picture, 5).start([ref]))
    for _ in range(2):
        assert (await next_message(call)).needed == [(picture.key, "NOT_FOUND")]
        await call.write(ready(ref))
    with pytest.raises(EmbeddingNotFound) as caught:
        await read(call)
    return caught.value


def test_a_stranger_makes_a_worker_call_nobody(
    demo: Demo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that anybody may call, and that was told of no encoders."""

    async def scenario() -> None:
        async with running(tmp_path, rpc=EVERYWHERE) as worker, listener() as (seen, address):
            error = await refused(worker, demo, address)
            assert "--fetch-from" in error.message and "--rpc-token-file" in error.message
            assert seen == [] and worker.loaded.fetcher._channels == {}

    asyncio.run(scenario())
    assert any("--fetch-from" in record.getMessage() for record in caplog.records)


def test_encoders_that_a_worker_was_told_of_are_called_and_no_others(
    demo: Demo, tmp_path: Path
) -> None:
    picture = demo.picture(2)

    async def scenario() -> None:
        named = {"rpc": EVERYWHERE, "fetch_from": ("10.0.0.0/8", "127.0.0.1")}
        async with (
            running(tmp_path, **named) as worker,
            Holder(picture) as encoder,
            listener() as (seen, address),
        ):
            prompt = demo.prompt(4, picture, 5)
            ref = picture.ref(Location(fetch_address=encoder.address))
            assert (await worker.generate(prompt.start([ref]))).tokens[0]
            assert encoder.seen == [None]
            await refused(worker, demo, address.replace("127.0.0.1", "localhost"))
            assert seen == []

    asyncio.run(scenario())


def test_with_a_token_callers_name_the_encoder_which_is_shown_the_token(
    demo: Demo, tmp_path: Path
) -> None:
    picture = demo.picture(3)
    path = str(make_secret(tmp_path, "token"))
    token = read_secret(path, "rpc_token_file")

    async def scenario() -> None:
        config = RpcConfig(rpc_token_file=path, drain_timeout_s=0.5)
        async with running(tmp_path, rpc=config) as worker, Holder(picture) as encoder:
            prompt = demo.prompt(4, picture, 5)
            ref = picture.ref(Location(fetch_address=encoder.address))
            assert (await worker.generate(prompt.start([ref]))).tokens[0]
            assert encoder.seen == [f"Bearer {token}"]

    asyncio.run(scenario())


def test_a_worker_says_that_an_encoder_takes_no_calls_of_it(
    demo: Demo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rpc = RpcConfig(rpc_token_file=str(make_secret(tmp_path, "token")))

    async def scenario() -> None:
        async with running(tmp_path) as worker, encoders.running(tmp_path, rpc=rpc) as service:
            await refused(worker, demo, service.server.address)

    asyncio.run(scenario())
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("Fetch from" in text and "--rpc-token-file" in text for text in warned)


def test_what_is_no_address_is_refused_before_anything_is_asked(demo: Demo, tmp_path: Path) -> None:
    picture = demo.picture(4)

    async def scenario() -> None:
        async with running(tmp_path) as worker:
            for address in ("unix:/run/x.sock", "dns:///host:1", "host", "host:0", "http://h:1"):
                ref = picture.ref(Location(fetch_address=address))
                with pytest.raises(InvalidRequest, match="fetch_address") as caught:
                    await worker.generate(demo.prompt(4, picture, 5).start([ref]))
                assert caught.value.param == "ref"

    asyncio.run(scenario())
