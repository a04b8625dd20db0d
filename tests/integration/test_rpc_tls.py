"""TLS and mutual TLS on gRPC, with real certificates, which change while services run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from encoder_service import servicer as encoder
from gateway.workers import encode as encoders
from gateway.workers.encoder_check import ReachabilityCheck
from gateway.workers.pool import WorkerPool
from opticnerve.cli import health
from opticnerve.client import AsyncEncoderClient, ChannelTls
from opticnerve.config import EncoderConfig, GatewayConfig, LLMConfig, RpcConfig
from opticnerve.config.command_line import read_config
from opticnerve.config.shared import CertificateConfig
from opticnerve.errors import ConfigError
from opticnerve.pb import encoder_pb2, encoder_pb2_grpc
from opticnerve.rpc.channel import is_serving, open_channel
from opticnerve.rpc.server import Server
from tests.certificates import Authority, Pair
from tests.encoders import demo_layout, picture, running
from tests.fakes import until

WAIT_S = 20.0
pytestmark = pytest.mark.process  # openssl, which makes the certificates.
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def rpc(own: Pair, client_ca: str | None = None, **more: object) -> RpcConfig:
    certificate = CertificateConfig(own.certificate, own.key)
    return RpcConfig(certificate=certificate, tls_client_ca=client_ca, **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(config: RpcConfig) -> AsyncIterator[Server]:
    """A server whose health is SERVING, with a servicer that loads for ever."""
    async with Server(config, encoder.SERVICE) as server:
        encoder_pb2_grpc.add_EncoderServicer_to_server(encoder.EncoderServicer(server), server.grpc)
        await server.start()
        await server.ready()
        yield server


async def reaches(address: str, tls: ChannelTls | None) -> bool:
    async with open_channel(address, tls=tls) as channel:
        return await is_serving(channel, timeout_s=5.0)


def test_callers_and_workers_prove_who_they_are(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    ca, theirs = authority.certificate, authority.issue("gateway", "gateway")
    stranger = other.issue("stranger", "gateway")

    async def scenario() -> None:
        config = rpc(authority.issue("worker"), ca, reflection=True)
        async with serving(config) as server:
            known = ChannelTls(ca, theirs.certificate, theirs.key)
            assert await reaches(server.address, known)
            assert not await reaches(server.address, None)
            assert not await reaches(server.address, ChannelTls(ca))
            for wrong in (
                ChannelTls(ca, stranger.certificate, stranger.key),
                ChannelTls(other.certificate, theirs.certificate, theirs.key),
                ChannelTls(ca, theirs.certificate, theirs.key, server_name="another"),
            ):
                assert not await reaches(server.address, wrong)
            async with open_channel(server.address, tls=known) as channel:
                call = channel.stream_stream(REFLECTION)(timeout=WAIT_S)
                await call.done_writing()
                assert await call.code() is grpc.StatusCode.OK

    asyncio.run(scenario())


def test_a_worker_may_have_one_name_at_every_address(authority: Authority) -> None:
    async def scenario() -> None:
        async with serving(rpc(authority.issue("worker", "workers.internal"))) as server:
            assert not await reaches(server.address, ChannelTls(authority.certificate))
            named = ChannelTls(authority.certificate, server_name="workers.internal")
            assert await reaches(server.address, named)

    asyncio.run(scenario())


def test_certificates_are_renewed_under_running_calls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another authority takes over: calls that run go on, and those that begin then use its
    certificates, on both sides."""
    first = Authority(tmp_path, "first")
    worker, caller = first.issue("worker"), first.issue("caller", "caller")
    ca = str(shutil.copy(first.certificate, tmp_path / "trusted.pem"))
    old = [str(shutil.copy(path, f"{path}.old")) for path in (ca, caller.certificate, caller.key)]
    request = health_pb2.HealthCheckRequest()

    async def scenario() -> None:
        async with serving(rpc(worker, ca)) as server:
            tls = ChannelTls(ca, caller.certificate, caller.key)
            async with open_channel(server.address, tls=tls) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                watching = stub.Watch(request, timeout=WAIT_S)
                assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
                second = Authority(tmp_path, "second")
                second.issue("worker"), second.issue("caller", "caller")
                shutil.copy(second.certificate, ca)
                assert await is_serving(channel, timeout_s=5.0)
                assert not await reaches(server.address, ChannelTls(*old))
                await server.give_up()
                seen = (await watching.read()).status
                assert seen == health_pb2.HealthCheckResponse.NOT_SERVING
                watching.cancel()

    asyncio.run(scenario())


def test_what_is_half_renewed_is_not_used(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = authority.issue("worker")

    async def scenario() -> None:
        async with serving(rpc(worker)) as server:
            tls = ChannelTls(authority.certificate)
            shutil.copy(worker.key, tmp_path / "kept")
            authority.issue("worker")
            shutil.copy(tmp_path / "kept", worker.key)
            assert await reaches(server.address, tls)
            assert await reaches(server.address, tls)
            os.unlink(worker.key)
            assert await reaches(server.address, tls)

    asyncio.run(scenario())
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(warnings) == 2 and all("stay in use" in each for each in warnings)


def test_pictures_are_encoded_and_fetched_over_tls(authority: Authority, tmp_path: Path) -> None:
    caller = authority.issue("caller", "caller")
    tls = ChannelTls(authority.certificate, caller.certificate, caller.key)

    async def scenario() -> None:
        config = rpc(authority.issue("worker"), authority.certificate)
        async with running(tmp_path, rpc=config) as service:
            address = service.server.address
            async with AsyncEncoderClient(address, demo_layout(), tls=tls) as client:
                ref = await client.encode(picture())
                assert (await client.fetch(ref))["rows"].shape == (9, 8)
            llms = WorkerPool("LLM", [], encoders.describe_encoder)
            pool = WorkerPool(
                "encoder", [address], encoders.describe_encoder,
                check=ReachabilityCheck(llms, tls), tls=tls,
            )  # fmt: skip
            await pool.start()
            try:
                await until(pool.serving)
                (found,) = pool.workers
                assert found.fault is None
                stub = encoder_pb2_grpc.EncoderStub(found.channel)
                await stub.Describe(encoder_pb2.DescribeEncoderRequest(), timeout=WAIT_S)
            finally:
                await pool.close()

    asyncio.run(scenario())


def test_a_health_check_of_a_container_has_a_certificate_too(
    authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    caller = authority.issue("caller", "caller")
    ca = ["--tls-ca", authority.certificate]
    own = ["--tls-certificate", caller.certificate, "--tls-key", caller.key]

    async def scenario() -> None:
        async with serving(rpc(authority.issue("worker"), authority.certificate)) as server:
            for flags, status in (([*ca, *own], 0), (ca, 1), ([], 1)):
                asked = [server.address, "--timeout", "10", *flags]
                assert await asyncio.to_thread(health.main, asked) == status

    asyncio.run(scenario())
    assert "is serving" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (EncoderConfig, ("--tls-certificate", "a"), "--tls-certificate and --tls-key"),
        (EncoderConfig, ("--tls-client-ca", "a"), "--tls-client-ca needs --tls-certificate"),
        (LLMConfig, ("--tls-certificate", "a", "--tls-key", "b"), "needs --tls-ca"),
        (GatewayConfig, ("--tls-certificate", "a", "--tls-key", "b"), "needs --tls-ca"),
        (GatewayConfig, ("--tls-server-name", "a"), "needs --tls-ca"),
    ],
)
def test_half_of_a_configuration_is_refused(
    config: type, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config("worker", "", config, flags)


def test_files_that_are_no_certificates_start_no_server(
    authority: Authority, tmp_path: Path
) -> None:
    own, text = authority.issue("worker"), tmp_path / "text"
    text.write_text("no certificate")
    for config, message in (
        (rpc(Pair(own.certificate, str(text))), "without a passphrase"),
        (rpc(Pair(own.certificate, str(tmp_path / "absent"))), "cannot read .*absent"),
        (rpc(own, str(text)), "holds no certificates"),
    ):
        with pytest.raises(ConfigError, match=message):
            Server(config, encoder.SERVICE)


def test_a_worker_beyond_loopback_says_what_is_missing(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    token = authority.directory / "token"
    token.write_text("t" * 40)
    token.chmod(0o600)
    beyond = {"host": "0.0.0.0", "advertise": "127.0.0.1:7001"}
    own, ca = authority.issue("worker"), authority.certificate
    for config, missing in (
        (RpcConfig(insecure=True, **beyond), ["--rpc-token-file", "--tls-certificate"]),
        (RpcConfig(rpc_token_file=str(token), **beyond), ["--tls-certificate"]),
        (rpc(own, insecure=True, **beyond), ["--rpc-token-file"]),
        (rpc(own, ca, **beyond), []),
    ):
        caplog.clear()
        asyncio.run(_started(config))
        warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert len(warnings) == len(missing), warnings
        for flag, warning in zip(missing, warnings, strict=True):
            assert f"without {flag}" in warning


async def _started(config: RpcConfig) -> None:
    async with Server(config, encoder.SERVICE) as server:
        await server.start()
