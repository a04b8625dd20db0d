"""The gateway as a process: no torch, little memory, a clean start and a clean stop."""

import asyncio
import base64
import contextlib
import io
import os
import random
import re
import signal
import socket
import sys

import httpx2
import pytest
from PIL import Image

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.process import ECHO_S
from tests.fakes import FakeEncoder, FakeLLM, until
from tests.gateways import body, data_url, events, user

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.process,
    pytest.mark.usefixtures("one_loop"),
]
MIB = 2**20
NOBODY = ("--encoder-addresses", "127.0.0.1:9", "--llm-addresses", "127.0.0.1:9")


@pytest.fixture
def environment(tmp_path):
    """An environment in which importing torch fails."""
    for name in ("torch", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not for gateways')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}


@contextlib.asynccontextmanager
async def gateway(environment, *flags):
    """(process, its URL)"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "--port", "0", *flags,
        env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("listening http://"), (await process.stderr.read()).decode()
        yield process, line.split()[1]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def workers():
    pair_id = Checkpoint.open(None).pair_id
    async with FakeEncoder(pair_id=pair_id) as encoder, FakeLLM([60, 61, 629], pair_id) as llm:
        yield encoder, llm


def resident(pid):
    with open(f"/proc/{pid}/status") as file:
        (line,) = [line for line in file if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


async def test_serves_pictures_without_torch_in_little_memory(environment):
    async with workers() as (encoder, llm):
        flags = ("--encoder-addresses", encoder.address, "--llm-addresses", llm.address)
        async with (
            gateway(environment, *flags) as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            asked = body(user("What?", data_url(size=(1024, 768))))
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=asked) for _ in range(16))
            )
            assert {answer.status_code for answer in answers} == {200}
            assert resident(process.pid) < 200 * MIB


async def test_memory_of_large_requests_goes_back(environment):
    async with workers() as (encoder, llm):
        flags = ("--encoder-addresses", encoder.address, "--llm-addresses", llm.address)
        async with (
            gateway(environment, *flags) as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            before = resident(process.pid)
            asked = body(user("What?", *(large_picture(seed) for seed in range(4))))
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=asked) for _ in range(4))
            )
            assert {answer.status_code for answer in answers} == {200}
            await until(lambda: resident(process.pid) < before + 20 * MIB)


def large_picture(seed):
    """A data URL of 5 MB."""
    buffer = io.BytesIO()
    pixels = random.Random(seed).randbytes(1100 * 1100 * 3)
    Image.frombytes("RGB", (1100, 1100), pixels).save(buffer, "PNG", compress_level=0)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def test_sigterm_lets_running_requests_end(environment):
    async with workers() as (encoder, llm):
        go = asyncio.Event()
        llm.step = lambda fake, index: go.wait()
        flags = ("--encoder-addresses", encoder.address, "--llm-addresses", llm.address)
        async with (
            gateway(environment, *flags) as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body()))
            await llm.started.wait()
            process.send_signal(signal.SIGTERM)
            host, port = url.removeprefix("http://").split(":")
            await until(lambda: refuses(host, int(port)))
            go.set()
            assert (await asked).status_code == 200
            assert await process.wait() == 0


async def test_until_the_shutdown_delay_is_over_requests_are_taken(environment):
    """As long as a balancer needs to see that /ready fails. A second signal does not wait."""
    async with workers() as (encoder, llm):
        flags = ("--encoder-addresses", encoder.address, "--llm-addresses", llm.address)
        async with (
            gateway(environment, *flags, "--shutdown-delay-s", "3600") as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            assert (await client.post("/v1/chat/completions", json=body())).status_code == 200
            assert (await client.get("/ready")).status_code == 200
            process.send_signal(signal.SIGTERM)
            while (answer := await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.02)
            assert answer.status_code == 503
            for _ in range(5):
                async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as new:
                    answer = await new.post("/v1/chat/completions", json=body())
                assert answer.status_code == 200
            await asyncio.sleep(ECHO_S * 1.5)  # Sooner, it would be an echo of the one before.
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await process.wait() == 0


async def test_after_the_shutdown_delay_running_requests_end(environment):
    async with workers() as (encoder, llm):
        go = asyncio.Event()
        llm.step = lambda fake, index: go.wait()
        flags = ("--encoder-addresses", encoder.address, "--llm-addresses", llm.address)
        async with (
            gateway(environment, *flags, "--shutdown-delay-s", "0.5") as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body()))
            await llm.started.wait()
            process.send_signal(signal.SIGTERM)
            host, port = url.removeprefix("http://").split(":")
            await until(lambda: refuses(host, int(port)))
            go.set()
            assert (await asked).status_code == 200
            assert await process.wait() == 0


def refuses(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


async def test_requests_that_outlast_the_drain_are_told(environment):
    """Whole answers and streams without a token get a 503, streams under way an event and DONE."""
    async with workers() as (encoder, llm):
        forever = asyncio.Event()
        llm.step = lambda fake, index: (
            forever.wait() if index or len(fake.starts) > 1 else asyncio.sleep(0)
        )
        flags = ("--encoder-addresses", encoder.address, "--llm-addresses", llm.address)
        async with (
            gateway(environment, *flags, "--drain-timeout-s", "1") as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            path = "/v1/chat/completions"
            async with client.stream("POST", path, json=body(stream=True)) as begun:
                text = aiter(begun.aiter_text())
                parts = [await anext(text)]
                others = [
                    asyncio.create_task(client.post(path, json=body(stream=stream)))
                    for stream in (False, True)
                ]
                await until(lambda: llm.running == 3)
                process.send_signal(signal.SIGTERM)
                parts += [part async for part in text]
            *_, error, done = events("".join(parts))
            assert "stopping" in error["error"]["message"] and done == "[DONE]"
            assert set(error["error"]) == {"message", "type", "param", "code"}
            for answer in await asyncio.gather(*others):
                assert answer.status_code == 503 and answer.headers["retry-after"]
                assert "stopping" in answer.json()["error"]["message"]
            assert await process.wait() == 0
            await until(lambda: llm.running == 0)


async def test_a_taken_port_is_one_clear_line(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "--port", str(taken.getsockname()[1]), *NOBODY,
            env=environment, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"port" in errors and b"Traceback" not in errors and errors.count(b"\n") == 1


async def test_metrics_on_a_port_of_their_own_and_keys(environment, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("ada: sk-1\n")
    flags = (*NOBODY, "--metrics-port", "0", "--api-key-file", str(keys), "--host", "127.0.0.1")
    async with (
        gateway(environment, *flags) as (process, url),
        httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
    ):
        headers = {"authorization": "Bearer sk-1"}
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/metrics", headers=headers)).status_code == 404
        async for line in process.stderr:
            if said := re.search(r"metrics at (\S+)", line.decode()):
                break
        answer = await client.get(said[1])
        assert "opticnerve_requests_total" in answer.text


async def test_sighup_reads_the_keys_again_and_ends_nothing(environment, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("ada: sk-1\n")
    async with (
        gateway(environment, *NOBODY, "--api-key-file", str(keys)) as (process, url),
        httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
    ):

        async def status(key):
            headers = {"authorization": f"Bearer {key}"}
            return (await client.get("/v1/models", headers=headers)).status_code

        async def hang_up(text, answer):
            keys.write_text(text)
            process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(60):
                async for line in process.stderr:
                    if answer in line:
                        break

        assert (await status("sk-1"), await status("sk-2")) == (200, 401)
        await hang_up("ada: sk-2\n", b"1 keys; 1 added, 1 removed, 0 with changed name")
        assert (await status("sk-1"), await status("sk-2")) == (401, 200)
        await hang_up("ada: sk-2 tenant=acme weight=2\n", b"0 removed, 1 with changed name or attr")
        assert (await status("sk-1"), await status("sk-2")) == (401, 200)
        await hang_up("not a key\n", b"the keys stay as they were")
        assert (await status("sk-1"), await status("sk-2")) == (401, 200)
        process.send_signal(signal.SIGTERM)
        await process.stderr.read()
        assert await process.wait() == 0


async def test_sighup_ends_no_gateway_that_has_no_keys(environment):
    async with gateway(environment, *NOBODY) as (process, url):
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            async for line in process.stderr:
                if b"no key file" in line:
                    break
        async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            assert (await client.get("/live")).status_code == 200


async def test_without_llm_workers_it_does_not_start(environment):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "--port", "0", "--encoder-addresses", "127.0.0.1:9",
        env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, errors = await process.communicate()
    assert process.returncode == 2 and not said
    assert errors.count(b"\n") == 1
    for word in (b"--llm-addresses 127.0.0.1:", b"--encoder-addresses", b"opticnerve up"):
        assert word in errors


async def test_without_encoders_it_says_so_once(environment):
    async with workers() as (_, llm):
        environment["OPTICNERVE_LLM_ADDRESSES"] = llm.address  # The flag's twin counts as well.
        async with gateway(environment) as (process, url):
            async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                answer = await client.post("/v1/chat/completions", json=body())
                assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            errors = (await process.stderr.read()).decode()
    assert errors.count("--encoder-addresses") == 1
    assert " W gateway " in errors
