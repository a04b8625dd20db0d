"""One process and the registry, with a real Redis: what a worker says, and what a client does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opticnerve.redis_server import split_options
from opticnerve.registry.entry import WorkerEntry
from opticnerve.registry.redis_registry import FORGET_S, Registry
from tests import encoders
from tests.fakes import until
from tests.redis import PATIENT, RedisServer

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("one_loop"),
    pytest.mark.redis,
    pytest.mark.process,
]


@pytest.fixture
def url() -> Iterator[str]:
    with RedisServer() as running:
        yield f"{running.url}?{PATIENT}"


async def test_what_a_worker_says_from_its_start_to_its_end(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    seen: set[str] = set()

    async def entry() -> Any:
        (found,) = await registry.entries("encoder") or [None]
        if found is not None:
            seen.add(found.state)
        return found

    async def until_state(state: str) -> Any:
        async with asyncio.timeout(60):
            while (found := await entry()) is None or found.state != state:
                await asyncio.sleep(0.01)
        return found

    try:
        async with encoders.running(tmp_path, registry=url, pair_id="pair") as running:
            found = await until_state("serving")
            assert found.address == running.server.address
            assert found.instance_id == running.server.instance_id
            assert (found.pair_id, found.fingerprint) == ("pair", encoders.FINGERPRINT)
            assert found.capacity["max_batch_patches"] == 1024 and "queued_patches" in found.load
            running.backend.hold()
            call = asyncio.create_task(encode(running))
            await until(lambda: running.encoder.backlog.items)
            ending = asyncio.create_task(running.server.serve())
            running.server.running.stop()
            assert (await until_state("draining")).load["queued_patches"]
            running.backend.go()
            await asyncio.gather(call, ending)
        assert await entry() is None and seen == {"serving", "draining"}
    finally:
        await registry.close()


async def test_a_worker_whose_clock_is_ahead_leaves_the_others_known(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, now = Registry(url), time.time()
    entries = [
        WorkerEntry(
            instance_id=digit * 32, kind="llm", address=f"10.0.0.{digit}:1", state="serving"
        )
        for digit in "12"
    ]
    try:
        await registry.put(entries[0])
        monkeypatch.setattr(time, "time", lambda: now + 2 * FORGET_S)
        await registry.put(entries[1])
        found = await registry.entries("llm") or []
        assert {each.instance_id for each in found} == {each.instance_id for each in entries}
    finally:
        await registry.close()


async def encode(running: encoders.Running) -> None:
    await running.encode(encoders.picture())


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_redis_py_swallows_is_not_lost(
    fails: bool, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(url)
    asked = asyncio.Event()

    async def swallow(*_: Any) -> list[bytes]:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if fails:
            raise ConnectionError
        return []

    monkeypatch.setattr(registry._client, "zrevrange", swallow)
    try:
        task = asyncio.create_task(registry.entries("llm"))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        await registry.close()


@pytest.mark.parametrize(
    "answer", [b"*x\r\n", b":5\r\n", b"+OK\r\n", b"*1\r\n:1\r\n", b"HTTP/1.1\r\n"]
)
async def test_what_answers_and_is_no_redis_is_a_registry_that_fails(answer: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                writer.write(4 * answer)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        registry = Registry(f"redis://127.0.0.1:{port}/0?{PATIENT}")
        try:
            assert await registry.entries("llm") is None and not registry.reachable
            await registry.put(
                WorkerEntry(instance_id="ab" * 16, kind="llm", address="h:1", state="serving")
            )
        finally:
            await registry.close()


def test_a_password_is_in_no_log_and_no_name(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        registry = Registry("redis://ada:hush@127.0.0.1:1/0?namespace=x")
        assert "hush" not in registry.name
        assert await registry.entries("llm") is None and not registry.reachable
        await registry.close()

    asyncio.run(scenario())
    assert "fails" in caplog.text and "hush" not in caplog.text
    assert split_options("redis://h/0?namespace=x&local=y&a=b", {"namespace"}) == (
        "redis://h/0?local=y&a=b",
        {"namespace": "x"},
    )
