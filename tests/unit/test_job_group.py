"""Several jobs as one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.job_group import JobGroup
from gateway.output.events import AnswerEvent, Text
from opticnerve.errors import Overloaded

pytestmark = pytest.mark.anyio


def jobs(count: int, places: int) -> list[Any]:
    """Jobs of a request that gets ``places``."""
    left = places - 1

    def count_request() -> None:
        nonlocal left
        if not left:
            raise Overloaded("no more")
        left -= 1

    options = SimpleNamespace(sampling=SimpleNamespace(n=1))
    ticket = SimpleNamespace(count_request=count_request)
    return [SimpleNamespace(ticket=ticket, options=options) for _ in range(count)]


@pytest.mark.parametrize("places", [1, 2])
async def test_a_job_whose_work_is_cancelled_ends_the_answer(places: int) -> None:
    async def run(job: Any) -> AsyncGenerator[AnswerEvent, None]:
        yield Text(0, "a")
        work = asyncio.get_running_loop().create_future()
        work.cancel()
        await work

    async def read() -> None:
        async for _ in JobGroup(run, jobs(3, places)).events():
            pass

    reading = asyncio.create_task(read())
    done, _ = await asyncio.wait([reading], timeout=5)
    assert done and reading.cancelled()


async def test_an_answer_that_nobody_reads_ends_its_jobs() -> None:
    ended = 0

    async def run(job: Any) -> AsyncGenerator[AnswerEvent, None]:
        nonlocal ended
        try:
            while True:
                yield Text(0, "a")
        finally:
            ended += 1

    events = JobGroup(run, jobs(3, 2)).events()
    await anext(events)
    await events.aclose()
    assert ended == 2
