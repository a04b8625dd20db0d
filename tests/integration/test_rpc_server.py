"""A server's life: health, reflection, errors at the edge, drain."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from opticnerve.config import RpcConfig
from opticnerve.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from opticnerve.pb import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from opticnerve.process import handle_signals
from opticnerve.rpc import errors as rpc_errors
from opticnerve.rpc.channel import CHANNEL_OPTIONS, chunks, is_serving, open_channel
from opticnerve.rpc.server import Server
from opticnerve.secret import make_secret

pytestmark = pytest.mark.slow

SERVICE = "opticnerve.v1.Encoder"


class Slow(encoder_pb2_grpc.EncoderServicer):
    def __init__(self):
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.server = None
        self.calls = 0

    async def Describe(self, request, context):
        self.entered.set()
        self.calls += 1
        async with self.server.running.work():
            await self.release.wait()
        return encoder_pb2.DescribeEncoderResponse(family="slow")

    async def Fetch(self, request, context):
        yield encoder_pb2.FetchResponse(data=b"x")
        if request.key == "bug":
            raise ZeroDivisionError("secret internals")
        if request.key == "long":
            raise InvalidRequest("é" * 50_000)
        raise Overloaded("try later", retry_after_s=1.5)


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def health(address):
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status


async def scenario(test, **config):
    servicer = Slow()
    config = {"drain_timeout_s": 60, **config}
    async with Server(RpcConfig(**config), SERVICE) as server:
        servicer.server = server
        encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server.grpc)
        await server.start()
        await test(server, servicer)


def test_not_serving_until_ready_and_while_draining():
    async def run(server, servicer):
        assert await health(server.address) == health_pb2.HealthCheckResponse.NOT_SERVING
        async with open_channel(server.address) as channel:
            assert not await is_serving(channel)
            await server.ready()
            assert await is_serving(channel)
            serving = asyncio.create_task(server.serve())
            stub = encoder_pb2_grpc.EncoderStub(channel)
            call = stub.Describe(encoder_pb2.DescribeEncoderRequest())
            await servicer.entered.wait()
            server.running.stop()
            while await is_serving(channel):  # The drain has begun; the call still runs.
                await asyncio.sleep(0.01)
            servicer.release.set()
            assert (await call).family == "slow"
            await asyncio.wait_for(serving, 60)
        with pytest.raises(grpc.aio.AioRpcError):
            await health(server.address)

    asyncio.run(scenario(run))


def test_calls_that_outlast_the_drain_end_with_a_typed_error():
    async def run(server, servicer):
        await server.ready()
        serving = asyncio.create_task(server.serve())
        async with open_channel(server.address) as channel:
            stub = encoder_pb2_grpc.EncoderStub(channel)
            calls = [stub.Describe(encoder_pb2.DescribeEncoderRequest()) for _ in range(3)]
            while servicer.calls < len(calls):
                await asyncio.sleep(0.01)
            server.running.stop()
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asyncio.wait_for(call, 60)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "stopping" in caught.value.details()
                error = rpc_errors.from_rpc(caught.value)
                assert isinstance(error, Unavailable) and error.retry_after_s
            await asyncio.wait_for(serving, 60)

    asyncio.run(scenario(run, drain_timeout_s=0.2))


@pytest.fixture
def own_signals():
    """For tests that send signals to this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_a_second_signal_ends_calls_at_once_with_a_typed_error():
    """The drain has ten minutes left, and a caller that watches the health would outlast it."""

    async def run(server, servicer):
        await server.ready()
        serving = asyncio.create_task(server.serve())
        async with open_channel(server.address) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watching.read()
            call = encoder_pb2_grpc.EncoderStub(channel).Describe(
                encoder_pb2.DescribeEncoderRequest()
            )
            await servicer.entered.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            while not server.running.draining:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call, 60)
            error = rpc_errors.from_rpc(caught.value)
            assert isinstance(error, Unavailable) and "stopping" in error.message
            await asyncio.wait_for(serving, 60)

    asyncio.run(scenario(run, drain_timeout_s=600))


def test_a_service_says_what_it_stops_with(caplog):
    async def run(server, servicer):
        await server.ready()
        serving = asyncio.create_task(server.serve())
        async with open_channel(server.address) as channel:
            stub = encoder_pb2_grpc.EncoderStub(channel)
            call = stub.Describe(encoder_pb2.DescribeEncoderRequest())
            await servicer.entered.wait()
            server.running.stop()
            while not server.running.draining:
                await asyncio.sleep(0.01)
            servicer.release.set()
            await call
            await asyncio.wait_for(serving, 60)

    with caplog.at_level("INFO"):
        asyncio.run(scenario(run))
    told = [record.message for record in caplog.records if "stopping" in record.message]
    assert told == ["stopping: 1 request runs, for at most 60 s; a second signal ends it now"]


@pytest.mark.usefixtures("own_signals")
def test_the_echo_of_a_signal_does_not_count(monkeypatch):
    """As of a wrapper that passes on what the terminal has sent already."""

    async def run(numbers):
        seen = []
        with handle_signals(lambda: seen.append("stop"), lambda: seen.append("cut")):
            for number in numbers:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.01)
        return seen

    monkeypatch.setattr("opticnerve.process.ECHO_S", 1000.0)
    assert asyncio.run(run([signal.SIGINT] * 3)) == ["stop"]
    assert asyncio.run(run([signal.SIGTERM] * 3)) == ["stop"]
    assert asyncio.run(run([signal.SIGTERM, signal.SIGINT])) == ["stop", "cut"]
    monkeypatch.setattr("opticnerve.process.ECHO_S", 0.0)
    assert asyncio.run(run([signal.SIGINT] * 2)) == ["stop", "cut"]


def test_typed_errors_cross_the_wire_and_bugs_stay_private():
    async def run(server, servicer):
        async with open_channel(server.address) as channel:
            stub = encoder_pb2_grpc.EncoderStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Fetch(encoder_pb2.FetchRequest(key="k")):
                    pass
            error = rpc_errors.from_rpc(caught.value)
            assert isinstance(error, Overloaded) and error.retry_after_s == 1.5
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Fetch(encoder_pb2.FetchRequest(key="bug")):
                    pass
            assert "secret" not in caught.value.details()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Fetch(encoder_pb2.FetchRequest(key="long")):
                    pass
            assert isinstance(rpc_errors.from_rpc(caught.value), InvalidRequest)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Encode(iter([encoder_pb2.EncodeRequest()]))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scenario(run))


def test_a_taken_port_is_a_clear_error():
    async def run(server, servicer):
        with pytest.raises(ConfigError, match=str(server.port)):
            async with Server(RpcConfig(port=server.port), SERVICE) as second:
                await second.start()

    asyncio.run(scenario(run))


def test_chunks_keep_the_bytes_and_the_limit():
    data = bytes(range(256)) * 9000
    pieces = list(chunks(data))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 2**20
    assert list(chunks(b"")) == [b""]


HUNG = """
import asyncio, sys
from opticnerve.config import RpcConfig
from opticnerve.rpc.server import Server
async def main():
    async with Server(RpcConfig(), "opticnerve.v1.LLM") as server:
        await server.start()
        await server.ready()
        await server.serve()
asyncio.run(main())
"""


async def watch_a_process_that_hangs(process, options):
    address = process.stdout.readline().split()[1]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(30):  # Without the options it takes a minute.
                await watching.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.process
def test_a_call_to_a_process_that_hangs_breaks():
    pings = {"grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"}
    quicker = [(name, v // 3 if name in pings else v) for name, v in CHANNEL_OPTIONS]
    process = subprocess.Popen([sys.executable, "-c", HUNG], stdout=subprocess.PIPE, text=True)
    try:
        asyncio.run(watch_a_process_that_hangs(process, quicker))
    finally:
        process.kill()
        process.communicate()


def test_a_start_that_fails_while_health_is_asked_leaves_no_traceback(caplog):
    """A call that is cancelled before its handler's first step is an error in gRPC's log."""

    async def asker(channel):
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))

    async def failed_start():
        async with Server(RpcConfig(), SERVICE) as server:
            await server.start()
            channel = open_channel(server.address)
            askers = [asyncio.create_task(asker(channel)) for _ in range(8)]
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        for task in askers:
            task.cancel()
        await channel.close()

    async def failed_starts():
        for _ in range(40):
            await failed_start()

    asyncio.run(failed_starts())
    told = [record for record in caplog.records if record.name.startswith("grpc")]
    assert [record for record in told if record.levelname == "ERROR"] == []


class Reader(llm_pb2_grpc.LLMServicer):
    async def Generate(self, request_iterator, context):
        async for _ in request_iterator:
            pass


class Writer(llm_pb2_grpc.LLMServicer):
    """Writes more than a caller takes that does not read."""

    def __init__(self):
        self.begun = 0

    async def Generate(self, request_iterator, context):
        piece = llm_pb2.GenerateOut(deltas=[llm_pb2.TokenDelta(token_ids=range(2**20))])
        while True:
            self.begun += 1
            await context.write(piece)

    async def until_stuck(self):
        seen = 0
        while self.begun == 0 or self.begun != seen:
            seen = self.begun
            await asyncio.sleep(0.2)


def the_only_line(caplog):
    """The fields of a call's line, where nobody else has said anything."""
    # asyncio may tell of the loop of an earlier test, which gRPC's poller still knows.
    (record,) = [record for record in caplog.records if record.name != "asyncio"]
    assert record.name == "opticnerve.rpc.calls" and record.exc_info is None
    return record.fields


def test_a_call_that_its_caller_cuts_while_it_is_written_to_is_one_line(caplog):
    """What is being written fails before the handler is told that it is cancelled."""
    caplog.set_level(logging.INFO)

    async def scenario():
        async with Server(RpcConfig(), SERVICE) as server:
            servicer = Writer()
            llm_pb2_grpc.add_LLMServicer_to_server(servicer, server.grpc)
            await server.start()
            async with open_channel(server.address) as channel:
                call = llm_pb2_grpc.LLMStub(channel).Generate()
                await call.write(llm_pb2.GenerateIn())
                await servicer.until_stuck()
                call.cancel()

    asyncio.run(scenario())
    told = the_only_line(caplog)
    assert told["status"] == "CANCELLED" and told["ended"] == "cut by its caller"


@pytest.mark.parametrize(
    "method",
    ["opticnerve.v1.Encoder/Describe", "opticnerve.v1.LLM/Generate", "grpc.health.v1.Health/Check"],
)
def test_a_message_that_does_not_parse_is_one_line_and_an_invalid_request(method, caplog):
    caplog.set_level(logging.INFO)

    async def scenario():
        async with Server(RpcConfig(), SERVICE) as server:
            encoder_pb2_grpc.add_EncoderServicer_to_server(Slow(), server.grpc)
            llm_pb2_grpc.add_LLMServicer_to_server(Reader(), server.grpc)
            await server.start()
            async with open_channel(server.address) as channel:
                call = channel.stream_stream(f"/{method}")(iter([b"\xff\xff\xff"]))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call.read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert isinstance(rpc_errors.from_rpc(refused.value), InvalidRequest)

    asyncio.run(scenario())
    told = the_only_line(caplog)
    assert told["status"] == "INVALID_ARGUMENT" and told["method"] == method.partition("/")[2]
    assert "does not parse as this method's request" in told["reason"]


async def started(**config):
    """(address, port) of a server that starts and ends."""
    async with Server(RpcConfig(**config), SERVICE) as server:
        await server.start()
        return server.address, server.port


def test_every_interface_without_an_address_for_others_is_warned_of(caplog):
    address, port = asyncio.run(started(host="0.0.0.0", insecure=True))
    assert address == f"127.0.0.1:{port}"  # One machine goes on working.
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    token, tls, advertise = warnings
    assert "--advertise HOST:PORT" in advertise and address in advertise
    assert "--rpc-token-file" in token and "--tls-certificate" in tls


@pytest.mark.parametrize("config", [{}, {"host": "0.0.0.0", "advertise": "encoder-1:7001"}])
def test_addresses_that_others_can_use_are_not_warned_of(config, caplog, tmp_path):
    config = {**config, "rpc_token_file": str(make_secret(tmp_path, "token"))}
    address, port = asyncio.run(started(**config))
    assert address == config.get("advertise", f"127.0.0.1:{port}")
    assert "--advertise" not in caplog.text and "--rpc-token-file" not in caplog.text


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 loopback here")
@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_ipv6(host):
    address, port = asyncio.run(started(host=host, insecure=True))
    assert address == (f"127.0.0.1:{port}" if host == "::" else f"[::1]:{port}")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_here_is_named(host, capfd):
    with pytest.raises(ConfigError, match=rf"cannot listen on {host}:0: .*see --host"):
        asyncio.run(started(host=host, insecure=True))
    assert capfd.readouterr().err == ""  # Nor does gRPC's library add anything.


class Loading(encoder_pb2_grpc.EncoderServicer):
    async def Describe(self, request, context):
        raise Unavailable("the encoder is loading its checkpoint")


def test_gateways_that_ask_a_worker_while_it_loads_fill_no_log(caplog):
    async def run():
        async with Server(RpcConfig(), SERVICE) as server:
            encoder_pb2_grpc.add_EncoderServicer_to_server(Loading(), server.grpc)
            await server.start()
            async with open_channel(server.address) as channel:
                stub = encoder_pb2_grpc.EncoderStub(channel)
                for _ in range(3):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await stub.Describe(encoder_pb2.DescribeEncoderRequest())

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert not [record for record in caplog.records if record.name == "opticnerve.rpc.calls"]
