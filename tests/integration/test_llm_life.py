"""The LLM service's calls that end before their end: cut by a drain, or left by their caller."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from opticnerve.errors import Unavailable
from tests.llms import WAIT_S, Demo, read, running


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
            worker.server.stop()
            serving = asyncio.create_task(worker.server.serve())
            with pytest.raises(Unavailable, match="stopping") as caught:
                await read(call)
            assert caught.value.retry_after_s
            await asyncio.wait_for(serving, WAIT_S)

    asyncio.run(scenario())


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
