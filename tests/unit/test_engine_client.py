"""One suite for the engine in a thread and the engine in a process."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_service.client import EngineClient, ProcessEngineClient, ThreadEngineClient
from llm_service.engine import Emit, Engine
from llm_service.limits import EngineConfig
from llm_service.plan import StepPlan, StepResult
from llm_service.sequence import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerateRequest,
    NeedRowsEvent,
    PromptLogprobsEvent,
    SamplingParams,
    TokensEvent,
)
from llm_service.stream import EventStream, coalesce
from opticnerve.errors import (
    ConfigError,
    ContextLengthExceeded,
    DeviceLost,
    EmbeddingNotFound,
    EngineFailure,
    InvalidRequest,
)
from opticnerve.media.plan import Grid, Modality, Span
from tests.fake_runner import FakeRows, FakeRunner, oracle

CONFIG = EngineConfig(
    num_blocks=32,
    block_size=16,
    max_model_len=512,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    check_integrity=True,
)
LOST, BROKEN, KILLED, PAUSED = 41, 42, 43, 44  # First tokens of prompts that do as they say.
PICTURE = Span(2, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))


class ScriptedRunner(FakeRunner):
    """Loses its device, breaks, kills its process or waits when a prompt says so."""

    def execute(self, plan: StepPlan) -> StepResult:
        orders = {work.seq.token_ids[0] for work in plan.works if not work.start}
        if LOST in orders:
            raise DeviceLost("the device is gone")
        if BROKEN in orders:
            raise RuntimeError("broken")
        if KILLED in orders:
            os.kill(os.getpid(), signal.SIGKILL)
        if PAUSED in orders:
            threading.Event().wait(0.3)
        return super().execute(plan)


class LateRows(FakeRows):
    """Rows are there once they were asked about twice."""

    def ready(self, key: str) -> bool:
        known = key in self.present
        self.present.add(key)
        return known


def build(config: EngineConfig, emit: Emit) -> Engine:
    rows = LateRows()
    return Engine(config, ScriptedRunner(config, rows), rows, emit)


def refuse(config: EngineConfig, emit: Emit) -> Engine:
    raise ConfigError("no such device", param="device")


def explode(config: EngineConfig, emit: Emit) -> Engine:
    raise ZeroDivisionError


class BuggyEngine(Engine):
    def check_integrity(self) -> None:
        raise RuntimeError("a page is lost")


def buggy(config: EngineConfig, emit: Emit) -> Engine:
    return BuggyEngine(config, ScriptedRunner(config, FakeRows()), FakeRows(), emit)


class Unreadable:
    """Pickles, and does not come back."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("not a number",)


def garble(config: EngineConfig, emit: Emit) -> Engine:
    emit([Unreadable()])  # type: ignore[list-item]
    return build(config, emit)


Open = Callable[..., Any]


@pytest.fixture(params=["thread", "process"])
def open_client(request: pytest.FixtureRequest) -> Open:
    kind = ThreadEngineClient if request.param == "thread" else ProcessEngineClient

    @asynccontextmanager
    async def opened(factory: str = "build", config: Any = CONFIG) -> AsyncIterator[EngineClient]:
        client: EngineClient = kind(f"tests.unit.test_engine_client:{factory}", config)
        try:
            await client.start()
            yield client
        finally:
            await client.close()

    return opened


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


def request(name: str, length: int = 20, **fields: Any) -> GenerateRequest:
    first = fields.pop("first", 1)
    sampling = SamplingParams(**{"max_tokens": 10, **fields.pop("sampling", {})})
    return GenerateRequest(name, (first, *[3] * (length - 1)), sampling=sampling, **fields)


async def collect(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    return [
        token
        for event in events
        if isinstance(event, TokensEvent) and event.choice == choice
        for token in event.token_ids
    ]


def test_requests_get_their_tokens(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            assert client.alive
            assert client.config == CONFIG
            assert client.stats.free_blocks == CONFIG.num_blocks
            asks = [request(f"r{i}", 5 + 7 * i, sampling={"n": 1 + i % 2}) for i in range(8)]
            streams = [client.submit(ask) for ask in asks]
            results = await asyncio.gather(*map(collect, streams))
            for ask, events in zip(asks, results, strict=True):
                assert isinstance(events[-1], FinishedEvent)
                for choice in range(ask.sampling.n):
                    assert tokens(events, choice) == oracle(ask, choice)
            await client.check_integrity()
            assert client.stats.running == client.stats.waiting == 0
            assert client.stats.free_blocks == CONFIG.num_blocks
            assert client.stats.completion_tokens == sum(10 * ask.sampling.n for ask in asks)

    run(test)


def test_rows_are_asked_for_and_answered(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            ask = request("a", spans=(PICTURE,), items=("red",))
            lost = request("b", spans=(PICTURE,), items=("blue",))
            first, second = client.submit(ask), client.submit(lost)
            assert await first.read() == [NeedRowsEvent("a", ("red",))]
            assert await second.read() == [NeedRowsEvent("b", ("blue",))]
            client.rows_ready("red")
            error = EmbeddingNotFound("gone", param="blue")
            client.rows_failed("b", "blue", error)
            assert tokens(await collect(first)) == oracle(ask)
            (failed,) = await collect(second)
            assert isinstance(failed, FailedEvent)
            assert type(failed.error) is EmbeddingNotFound
            assert failed.error.param == "blue"

    run(test)


def test_abort_and_leaving_early(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            stuck = request("a", spans=(PICTURE,), items=("red",))
            stream = client.submit(stuck)
            await stream.read()
            client.abort("a")
            assert await collect(stream) == [AbortedEvent("a")]
            client.abort("a")
            with client.submit(stuck) as left:
                await left.read()
            assert await left.read() == []
            client.abort("never seen")
            again = client.submit(request("c"))
            assert isinstance((await collect(again))[-1], FinishedEvent)
            await client.check_integrity()
            assert client.stats.free_blocks == CONFIG.num_blocks

    run(test)


def test_a_reader_that_is_cancelled_can_come_back(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            ask = request("a", spans=(PICTURE,), items=("red",))
            stream = client.submit(ask)
            await stream.read()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.read(), 0.01)
            client.rows_ready("red")
            assert tokens(await collect(stream)) == oracle(ask)

    run(test)


def test_refusals_arrive_as_events_and_doubled_ids_at_once(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            (failed,) = await collect(client.submit(request("a", 600)))
            assert isinstance(failed, FailedEvent)
            assert isinstance(failed.error, ContextLengthExceeded)
            assert failed.error.param == "token_ids"
            stream = client.submit(request("a"))
            with pytest.raises(InvalidRequest):
                client.submit(request("a"))
            assert isinstance((await collect(stream))[-1], FinishedEvent)

    run(test)


def test_a_broken_step_fails_its_requests_and_the_engine_goes_on(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            events = await collect(client.submit(request("a", first=BROKEN)))
            assert isinstance(events[-1], FailedEvent)
            assert isinstance(events[-1].error, EngineFailure)
            ask = request("b")
            assert tokens(await collect(client.submit(ask))) == oracle(ask)
            await client.check_integrity()
            assert client.alive

    run(test)


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


def test_the_event_loop_never_waits_for_a_step(open_client: Open) -> None:
    async def test() -> None:
        async with open_client() as client:
            stream = client.submit(request("a", first=PAUSED))
            reader = asyncio.create_task(collect(stream))
            turns = 0
            while not reader.done():
                await asyncio.sleep(0.001)
                turns += 1
            assert turns > 20  # In the 0.3 s that the step takes.

    run(test)


def test_a_killed_process_fails_everything() -> None:
    async def test() -> None:
        client = ProcessEngineClient("tests.unit.test_engine_client:build", CONFIG)
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
from llm_service.client import ProcessEngineClient
from tests.unit.test_engine_client import CONFIG

async def main():
    client = ProcessEngineClient("tests.unit.test_engine_client:build", CONFIG)
    await client.start()
    print(client._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
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


def test_a_process_that_talks_nonsense_is_ended() -> None:
    async def test() -> None:
        client = ProcessEngineClient("tests.unit.test_engine_client:garble", CONFIG)
        with pytest.raises(EngineFailure, match="ended with status -9"):
            await client.start()

    run(test)


def test_a_client_that_was_never_started_closes() -> None:
    asyncio.run(ThreadEngineClient(build, CONFIG).close())


def test_slow_readers_get_tokens_merged() -> None:
    events: list[Event] = [
        TokensEvent("a", 0, 0, (1,)),
        TokensEvent("a", 1, 0, (7,)),
        TokensEvent("a", 0, 1, (2, 3)),
        TokensEvent("a", 1, 1, (8,), (), FinishReason.STOP, 8),
        NeedRowsEvent("a", ("k",)),
        TokensEvent("a", 0, 3, (4,)),
    ]
    assert coalesce(events) == [
        TokensEvent("a", 0, 0, (1, 2, 3)),
        TokensEvent("a", 1, 0, (7, 8), (), FinishReason.STOP, 8),
        NeedRowsEvent("a", ("k",)),
        TokensEvent("a", 0, 3, (4,)),
    ]


def test_messages_cross_processes() -> None:
    failed = FailedEvent("a", ContextLengthExceeded("too long", param="p", retry_after_s=2.0))
    copy = pickle.loads(pickle.dumps(failed))
    assert vars(copy.error) == vars(failed.error)
    for message in (
        request("a", spans=(PICTURE,), items=("k",)),
        TokensEvent("a", 0, 0, (1,)),
        PromptLogprobsEvent("a", ()),
    ):
        assert pickle.loads(pickle.dumps(message)) == message
