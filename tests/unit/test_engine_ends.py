"""The ends of engines in threads and processes: lost, killed, broken, closed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_service.engine.client import EngineClient, ProcessEngineClient, ThreadEngineClient
from llm_service.policy.messages import AbortedEvent, FailedEvent
from opticnerve.errors import (
    ConfigError,
    DeviceLost,
    EngineFailure,
)
from tests.scripted_engines import (
    CONFIG,
    KILLED,
    LOST,
    PICTURE,
    Open,
    build,
    collect,
    opener,
    request,
    run,
)


@pytest.fixture(params=["thread", pytest.param("process", marks=pytest.mark.process)])
def open_client(request: pytest.FixtureRequest) -> Open:
    return opener(request.param)


def test_a_lost_device_ends_the_engine_and_every_request(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            waiting = client.submit(request("w", spans=(PICTURE,), items=("red",)))
            await waiting.read()
            events = await collect(client.submit(request("a", first=LOST)))
            assert isinstance(events[-1], FailedEvent)
            assert isinstance(events[-1].error, DeviceLost)
            assert isinstance((await collect(waiting))[-1], FailedEvent)
            assert isinstance(await client.wait_dead(), DeviceLost)
            await assert_dead(client)

    run(test)


async def assert_dead(client: EngineClient) -> None:
    assert not client.alive
    with pytest.raises(EngineFailure):
        client.submit(request("z"))
    with pytest.raises(EngineFailure):
        await client.check_integrity()


def test_a_bug_in_the_engine_ends_it(open_client: Open) -> None:
    async def test() -> None:
        async with open_client("buggy") as client:
            assert isinstance(await client.wait_dead(), EngineFailure)
            await assert_dead(client)

    run(test)


@pytest.mark.parametrize(
    ("factory", "error"), [("refuse", ConfigError), ("explode", EngineFailure)]
)
def test_an_engine_that_cannot_be_built(
    open_client: Open, factory: str, error: type[Exception]
) -> None:
    async def test() -> None:
        with pytest.raises(error) as caught:
            async with open_client(factory):
                raise AssertionError("it started")
        if error is ConfigError:
            assert caught.value.param == "device"  # type: ignore[attr-defined]

    run(test)


def test_closing_ends_what_is_open(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            stream = client.submit(request("a", spans=(PICTURE,), items=("red",)))
            await stream.read()
            dead = asyncio.create_task(client.wait_dead())
        assert await collect(stream) == [AbortedEvent("a")]
        await assert_dead(client)
        await client.close()
        assert not dead.done()
        dead.cancel()

    run(test)


@pytest.mark.process
def test_a_killed_process_fails_everything() -> None:
    async def test() -> None:
        client = ProcessEngineClient("tests.scripted_engines:build", CONFIG)
        await client.start()
        waiting = client.submit(request("w", spans=(PICTURE,), items=("red",)))
        await waiting.read()
        client.submit(request("a", first=KILLED))
        (failed,) = await collect(waiting)
        assert isinstance(failed, FailedEvent)
        assert isinstance(failed.error, EngineFailure)
        assert "-9" in str(await client.wait_dead())
        await assert_dead(client)
        await client.close()

    run(test)


ORPHAN = """
import asyncio, os, signal
from llm_service.engine.client import ProcessEngineClient
from tests.scripted_engines import CONFIG

async def main():
    client = ProcessEngineClient("tests.scripted_engines:build", CONFIG)
    await client.start()
    print(client._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.process
def test_the_engine_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
        timeout=200,
    )
    assert done.returncode == -signal.SIGKILL
    # The run is over when everybody who held its output is gone: the engine's process too.
    assert is_gone(int(done.stdout))


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have reaped an orphan."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.process
def test_a_process_that_talks_nonsense_is_ended() -> None:
    async def test() -> None:
        client = ProcessEngineClient("tests.scripted_engines:garble", CONFIG)
        with pytest.raises(EngineFailure, match="ended with status -9"):
            await client.start()

    run(test)


class Unreadable:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return int, ("no number",)


@pytest.mark.process
def test_a_command_that_cannot_be_read_ends_the_engine() -> None:
    async def test() -> None:
        client = ProcessEngineClient("tests.scripted_engines:build", CONFIG)
        await client.start()
        client._post(Unreadable())  # type: ignore[arg-type]
        error = await client.wait_dead()
        assert "ended with status 1" in error.message
        await client.close()

    run(test)


def test_a_client_that_was_never_started_closes() -> None:
    asyncio.run(ThreadEngineClient(build, CONFIG).close())
