"""Work in threads: what is short does not wait behind what is long."""

from __future__ import annotations

import asyncio
import threading

from gateway.edge.threads import LONG_BYTES, off_loop
from opticnerve.telemetry import logs

SAFETY_S = 60
LONG = LONG_BYTES + 1


async def _short_work_passes_long() -> None:
    begun, end = threading.Event(), threading.Event()
    ran: list[int] = []

    def hold(number: int) -> None:
        ran.append(number)
        begun.set()
        end.wait(SAFETY_S)

    waiting = [asyncio.create_task(off_loop(LONG, hold, number)) for number in range(8)]
    try:
        async with asyncio.timeout(SAFETY_S):
            await asyncio.to_thread(begun.wait, SAFETY_S)
            assert await asyncio.gather(*(off_loop(1, pow, 2, i) for i in range(100))) == [
                2**i for i in range(100)
            ]
            assert ran == [0]  # In the order of coming, one at a time.
            for task in waiting[1:5]:  # Whose clients leave.
                task.cancel()
            await asyncio.wait(waiting[1:5])
    finally:
        end.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert ran == [0, 5, 6, 7]


def test_short_work_passes_long_and_who_leaves_takes_his_away() -> None:
    asyncio.run(_short_work_passes_long())


async def _identity() -> str:
    logs.request_id.set("req-7")
    return await off_loop(1, logs.request_id.get)


def test_a_thread_knows_whose_work_it_does() -> None:
    assert asyncio.run(_identity()) == "req-7"


async def _error() -> None:
    await off_loop(1, int, "x")


def test_errors_come_back() -> None:
    try:
        asyncio.run(_error())
    except ValueError as error:
        assert "invalid literal" in str(error)
    else:
        raise AssertionError("no error came")
