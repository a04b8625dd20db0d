"""The LLM service's calls that end before their end, and what it tells of an engine elsewhere."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from opticnerve.errors import InvalidRequest, Unavailable
from tests.llms import WAIT_S, Demo, next_message, read, ready, running


@pytest.fixture(scope="module")
def demo() -> Demo:
    torch.set_num_threads(1)
    return Demo()


def test_a_call_that_outlasts_the_drain_ends_with_a_typed_error(demo: Demo, tmp_path: Path) -> None:
    late = demo.prompt(5, demo.picture(29), 6)

    async def scenario() -> None:
        async with running(tmp_path) as worker:
            call = await worker.open(late.start())  # Its rows never come.
            while not worker.loaded.engine.stats.running:
                await asyncio.sleep(0.01)
            worker.server.running.stop()
            serving = asyncio.create_task(worker.server.serve())
            with pytest.raises(Unavailable, match="stopping") as caught:
                await read(call)
            assert caught.value.retry_after_s
            await asyncio.wait_for(serving, WAIT_S)

    asyncio.run(scenario())


def test_constraints_that_cannot_be_met_are_no_error_of_ours(
    demo: Demo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Known only in a step: the one token that is allowed may not come yet."""
    end = 629
    sampling = {"max_tokens": 8, "min_tokens": 2, "allowed_token_ids": [end], "ignore_eos": False}
    start = demo.prompt(20).start(sampling={**sampling, "stop_token_ids": [end]})

    async def scenario() -> None:
        async with running(tmp_path) as worker:
            with pytest.raises(InvalidRequest, match="exclude every token"):
                await read(await worker.open(start))

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    (told,) = [record for record in caplog.records if record.name == "opticnerve.rpc.calls"]
    assert "exclude every token" in told.fields["reason"] and told.exc_info is None
    assert told.fields["code"] == "invalid_request_error"


def test_a_caller_that_leaves_early_knows_what_was_cached(demo: Demo, tmp_path: Path) -> None:
    start = demo.prompt(100).start(sampling={"max_tokens": 200, "ignore_eos": True})

    async def scenario() -> None:
        async with running(tmp_path) as worker:
            for cached in (0, 96):  # Whole pages.
                call = await worker.open(start)
                message = await call.read()
                assert message.HasField("prefilled") and message.deltas
                assert message.prefilled.cached_tokens == cached
                call.cancel()

    asyncio.run(scenario())


@pytest.mark.process
def test_an_engine_in_a_process_tells_of_the_rows_it_loads(demo: Demo, tmp_path: Path) -> None:
    """How long it took, and that they were damaged: only that process reads them here."""
    prompt = demo.prompt(4, demo.picture(31), 3)
    picture = prompt.pictures[0]

    async def scenario() -> None:
        async with running(tmp_path, engine="process") as worker:
            ref = worker.put(picture)
            call = await worker.open(prompt.start())  # Ready before anybody is asked for it.
            answer = await read(call)
            assert answer.needed == [] and answer.done is not None
            assert answer.done.timings.get_ms > 0
            damage(tmp_path / "tier", picture.key)
            call = await worker.open(prompt.start(skip_prefix_cache=True))
            await call.write(ready(ref))
            needed = (await next_message(call)).needed
            assert needed == [(picture.key, "CORRUPT")]
            call.cancel()

    asyncio.run(scenario())


def damage(tier: Path, key: str) -> None:
    (path,) = (path for path in tier.rglob("*") if key in path.name)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.unlink()
    path.write_bytes(data)
