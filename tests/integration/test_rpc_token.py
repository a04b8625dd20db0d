"""The token of calls between processes: who is refused, where, and what it costs the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from encoder_service import servicer as encoder
from gateway.workers import encode as encoders
from gateway.workers.pool import WorkerPool
from gateway.workers.worker import WorkerLost, WorkerState, call_error
from llm_service.wire import servicer as llm
from opticnerve.client import AsyncEncoderClient
from opticnerve.config import EncoderConfig, LLMConfig, RpcConfig
from opticnerve.config.command_line import read_config
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.errors import ConfigError, OpticNerveError, Unauthenticated, Unavailable
from opticnerve.pb import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from opticnerve.rpc.channel import is_serving, open_channel
from opticnerve.rpc.errors import from_rpc
from opticnerve.rpc.server import Server
from opticnerve.secret import make_secret
from tests.encoders import demo_layout, picture, running
from tests.fakes import FakeEncoder, FakeLLM, until

WAIT_S = 60.0
TOKEN, OTHER = "t" * 64, "o" * 64
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVICES = (
    (encoder_pb2.DESCRIPTOR.services_by_name["Encoder"], encoder.SERVICE),
    (llm_pb2.DESCRIPTOR.services_by_name["LLM"], llm.SERVICE),
)


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return str(path)


@contextlib.asynccontextmanager
async def both(config: RpcConfig, service: str) -> AsyncIterator[Server]:
    """A server with both services, which are loading."""
    async with Server(config, service) as server:
        encoder_pb2_grpc.add_EncoderServicer_to_server(encoder.EncoderServicer(server), server.grpc)
        llm_pb2_grpc.add_LLMServicer_to_server(llm.LLMServicer(server), server.grpc)
        await server.start()
        yield server


async def refusal(call: grpc.aio.Call) -> OpticNerveError:
    """The typed error that a call ends in."""
    trailing = await call.trailing_metadata()
    return from_rpc(
        grpc.aio.AioRpcError(await call.code(), trailing, trailing, await call.details())
    )


def methods() -> list[str]:
    found = [f"/{name}/{method.name}" for service, name in SERVICES for method in service.methods]
    return [*found, REFLECTION, "/grpc.health.v1.Health/List", "/no.such.Service/Method"]


def test_strangers_are_refused_on_every_method_and_probes_are_not(token_file: str) -> None:
    async def scenario() -> None:
        config = RpcConfig(rpc_token_file=token_file, reflection=True)
        async with both(config, encoder.SERVICE) as server:
            for token, carries in ((None, "none"), (OTHER, "another"), (TOKEN[:-1], "another")):
                async with open_channel(server.address, token) as channel:
                    for method in methods():
                        silent = channel.stream_stream(method)(timeout=WAIT_S)
                        whole = channel.unary_stream(method)(b"", timeout=WAIT_S)
                        for call in (silent, whole):
                            error = await refusal(call)
                            assert type(error) is Unauthenticated, (method, error)
                            assert "--rpc-token-file" in error.message
                            assert carries in error.message and error.code == "invalid_rpc_token"
                            assert TOKEN not in error.message
                    stub = health_pb2_grpc.HealthStub(channel)
                    request = health_pb2.HealthCheckRequest(service=encoder.SERVICE)
                    expected = health_pb2.HealthCheckResponse.NOT_SERVING
                    assert (await stub.Check(request, timeout=WAIT_S)).status == expected
                    watching = stub.Watch(request, timeout=WAIT_S)
                    assert (await watching.read()).status == expected
                    watching.cancel()
            async with open_channel(server.address, TOKEN) as channel:
                stub = encoder_pb2_grpc.EncoderStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Describe(encoder_pb2.DescribeEncoderRequest(), timeout=WAIT_S)
                assert type(from_rpc(caught.value)) is Unavailable  # Loading: it was let in.

    asyncio.run(scenario())


def test_strangers_hold_nothing(tmp_path: Path, token_file: str) -> None:
    """64 streams that would stay open are over before any of them has sent a byte."""

    async def scenario() -> None:
        async with running(tmp_path, rpc=RpcConfig(rpc_token_file=token_file)) as service:
            channel = open_channel(service.server.address)
            stub = encoder_pb2_grpc.EncoderStub(channel)
            calls = [stub.Encode(timeout=WAIT_S) for _ in range(64)]
            codes = await asyncio.gather(*(call.code() for call in calls))
            assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
            assert len(service.uploads) == 0
            await channel.close()

    asyncio.run(scenario())


def test_without_a_token_reflection_is_off_unless_asked_for() -> None:
    async def asked(config: RpcConfig) -> grpc.StatusCode:
        async with both(config, llm.SERVICE) as server, open_channel(server.address) as channel:
            call = channel.stream_stream(REFLECTION)(timeout=WAIT_S)
            await call.done_writing()
            return await call.code()

    assert asyncio.run(asked(RpcConfig())) is grpc.StatusCode.UNIMPLEMENTED
    assert asyncio.run(asked(RpcConfig(reflection=True))) is grpc.StatusCode.OK


@pytest.mark.parametrize("config", [EncoderConfig, LLMConfig])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "encoder-1"])
def test_a_worker_is_not_open_to_a_network_by_accident(config: type, host: str) -> None:
    def read(*more: str) -> RpcConfig:
        return read_config("worker", "", config, ["--host", host, *more]).rpc

    with pytest.raises(ConfigError, match=rf"--host {host}.*--rpc-token-file.*--insecure"):
        read()
    assert read("--insecure").insecure
    assert read("--rpc-token-file", "file").rpc_token_file == "file"
    for loopback in ("127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"):
        assert read_config("worker", "", config, ["--host", loopback]).rpc.host == loopback


def test_a_token_that_cannot_be_read_starts_no_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rpc-token-file: cannot read"):
        asyncio.run(_started(RpcConfig(rpc_token_file=str(tmp_path / "absent"))))


async def _started(config: RpcConfig) -> None:
    async with Server(config, llm.SERVICE) as server:
        await server.start()


@contextlib.asynccontextmanager
async def pool_of(address: str, token: str | None) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool("encoder", [address], encoders.describe_encoder, token=token)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def test_a_gateway_says_that_a_worker_takes_no_calls_of_it(
    tmp_path: Path, token_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, rpc=RpcConfig(rpc_token_file=token_file)) as service:
            address = service.server.address
            async with pool_of(address, TOKEN) as pool:
                await until(pool.serving)
            for token in (None, OTHER):
                async with pool_of(address, token) as pool:
                    (worker,) = pool.workers
                    await until(lambda worker=worker: worker.state is WorkerState.UNUSABLE)
                    assert worker.fault is not None and "--rpc-token-file" in worker.fault.text
                    assert not pool.serving()
                    await _probed(worker, 3)  # And is told of once.

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2 and all("--rpc-token-file" in text for text in errors)
    assert TOKEN not in caplog.text and OTHER not in caplog.text


async def _probed(worker: Any, times: int) -> None:
    before = worker.failures
    await until(lambda: worker.failures >= before + times)


def test_a_worker_that_takes_our_calls_no_more_is_lost_and_no_clients_fault() -> None:
    """Else a client of the gateway would be told that its own API key is wrong."""
    none = grpc.aio.Metadata()
    refused = grpc.aio.AioRpcError(grpc.StatusCode.UNAUTHENTICATED, none, none, "no")
    lost = call_error(refused, delivered=True)
    assert isinstance(lost, WorkerLost) and lost.http_status == 503


class Listening(FakeEncoder):
    """Keeps what Fetch calls bring as their authorization."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str | None] = []

    async def Fetch(self, request: Any, context: Any) -> Any:
        self.seen.append(dict(context.invocation_metadata()).get("authorization"))
        await context.abort(grpc.StatusCode.NOT_FOUND, "none here")


def test_clients_send_their_token_to_their_own_encoder_alone(
    tmp_path: Path, token_file: str
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, rpc=RpcConfig(rpc_token_file=token_file)) as service:
            address, layout = service.server.address, demo_layout()
            async with AsyncEncoderClient(address, layout) as stranger:
                with pytest.raises(Unauthenticated, match="--rpc-token-file"):
                    await stranger.encode(picture())
            async with AsyncEncoderClient(address, layout, rpc_token_file=token_file) as client:
                ref = await client.encode(picture())
                assert (await client.fetch(ref))["rows"].shape == (9, 8)
                async with Listening() as elsewhere:
                    foreign = EmbeddingRef(
                        ref.key, ref.fingerprint, ref.tensors, ref.num_rows,
                        Location(fetch_address=elsewhere.address),
                    )  # fmt: skip
                    with pytest.raises(OpticNerveError, match="none here"):
                        await client.fetch(foreign)
                    assert elsewhere.seen == [None]

    asyncio.run(scenario())


def test_streams_in_both_directions_carry_the_token() -> None:
    """Each of the four kinds of call, through the channel that adds it."""

    async def scenario() -> None:
        async with _Noting() as worker, open_channel(worker.address, TOKEN) as channel:
            assert await is_serving(channel)
            stub = llm_pb2_grpc.LLMStub(channel)
            call = stub.Generate(timeout=WAIT_S)
            await call.write(llm_pb2.GenerateIn(start=llm_pb2.Start(token_ids=[1])))
            await call.done_writing()
            answers = [message async for message in call]
            assert answers[-1].HasField("done")
            await stub.Describe(llm_pb2.DescribeLLMRequest(), timeout=WAIT_S)
        assert worker.seen == [f"Bearer {TOKEN}"] * 2

    asyncio.run(scenario())


class _Noting(FakeLLM):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Sequence[str | None] = []  # What calls bring as their authorization.

    async def Generate(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[llm_pb2.GenerateOut]:
        self.seen = [*self.seen, dict(context.invocation_metadata()).get("authorization")]
        async for message in super().Generate(request_iterator, context):
            yield message

    async def Describe(self, request: Any, context: Any) -> llm_pb2.DescribeLLMResponse:
        self.seen = [*self.seen, dict(context.invocation_metadata()).get("authorization")]
        return await super().Describe(request, context)


def test_a_secret_that_up_makes_is_a_token(tmp_path: Path) -> None:
    path = make_secret(tmp_path, "rpc_token_file")
    asyncio.run(_started(RpcConfig(host="127.0.0.1", rpc_token_file=str(path))))
