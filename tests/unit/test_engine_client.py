"""One suite for the engine in a thread and the engine in a process: requests and their events."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest

from llm_service.engine.stream import EventStream, Unread, coalesce
from llm_service.policy.messages import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    NeedRowsEvent,
    PromptLogprobsEvent,
    TokensEvent,
)
from opticnerve.errors import (
    ContextLengthExceeded,
    EmbeddingNotFound,
    EngineFailure,
    InvalidRequest,
    Overloaded,
)
from opticnerve.generation.values import Delta, FinishReason, Logprob, PositionLogprobs
from tests.fake_runner import oracle
from tests.scripted_engines import (
    BROKEN,
    CONFIG,
    PAUSE_DIRECTORY,
    PAUSED,
    PICTURE,
    Open,
    collect,
    opener,
    request,
    run,
    tokens,
)


@pytest.fixture(params=["thread", pytest.param("process", marks=pytest.mark.process)])
def open_client(request: pytest.FixtureRequest) -> Open:
    return opener(request.param)


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


def test_the_event_loop_never_waits_for_a_step(
    open_client: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PAUSE_DIRECTORY, str(tmp_path))

    async def test() -> None:
        async with open_client() as client:
            stream = client.submit(request("a", first=PAUSED))
            reader = asyncio.create_task(collect(stream))
            while not (tmp_path / "paused").exists():
                await asyncio.sleep(0.001)
            (tmp_path / "go").touch()  # The loop turned while the step ran: else nobody would.
            assert isinstance((await reader)[-1], FinishedEvent)

    run(test)


def test_slow_readers_get_tokens_merged() -> None:
    events: list[Event] = [
        TokensEvent("a", Delta(0, 0, (1,))),
        TokensEvent("a", Delta(1, 0, (7,))),
        TokensEvent("a", Delta(0, 1, (2, 3))),
        TokensEvent("a", Delta(1, 1, (8,), (), FinishReason.STOP, 8)),
        NeedRowsEvent("a", ("k",)),
        TokensEvent("a", Delta(0, 3, (4,))),
    ]
    assert coalesce(events) == [
        TokensEvent("a", Delta(0, 0, (1, 2, 3))),
        TokensEvent("a", Delta(1, 0, (7, 8), (), FinishReason.STOP, 8)),
        NeedRowsEvent("a", ("k",)),
        TokensEvent("a", Delta(0, 3, (4,))),
    ]


@pytest.mark.anyio
async def test_log_probabilities_that_nobody_reads_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_service.engine.stream.MOST_UNREAD", 10)
    aborted: list[str] = []
    unread = Unread()
    slow, quick = (EventStream(name, aborted.append, unread) for name in ("a", "b"))
    position = PositionLogprobs(Logprob(1, -1.0, 1), (Logprob(1, -1.0, 1),))
    for _ in range(20):
        quick.push(PromptLogprobsEvent("b", (position,)))
        assert len(await quick.read()) == 1
    for _ in range(6):
        slow.push(PromptLogprobsEvent("a", (position,)))
    slow.push(AbortedEvent("a"))
    failed, end = await slow.read()
    assert isinstance(failed, FailedEvent) and isinstance(failed.error, Overloaded)
    assert aborted == ["a"] and isinstance(end, AbortedEvent) and slow.ended
    quick.push(PromptLogprobsEvent("b", (position,) * 5))
    quick.close()
    assert unread.entries == 0


def test_messages_cross_processes() -> None:
    failed = FailedEvent("a", ContextLengthExceeded("too long", param="p", retry_after_s=2.0))
    copy = pickle.loads(pickle.dumps(failed))
    assert vars(copy.error) == vars(failed.error)
    for message in (
        request("a", spans=(PICTURE,), items=("k",)),
        TokensEvent("a", Delta(0, 0, (1,))),
        PromptLogprobsEvent("a", ()),
    ):
        assert pickle.loads(pickle.dumps(message)) == message
