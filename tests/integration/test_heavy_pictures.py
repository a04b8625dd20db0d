"""Pictures that are much work to decode, beside others: what they hold, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from encoder_service.pictures import decode_pool as preprocess
from opticnerve.errors import EngineFailure, InvalidMedia, PoisonousItem
from opticnerve.media.probe import parse_structure
from tests import hostile
from tests.decoders import ANY, HOPELESS, children_cpu_s, cpu_s, resident
from tests.encoders import Running, picture, refusal, running
from tests.fakes import until
from tests.fault_counters import Faults
from tests.system import alive

LIMITS: dict[str, Any] = {
    "max_item_bytes": 50 * 2**20,
    "max_image_pixels": 10**9,
    "max_decode_passes": ANY,
}


def hopeless(grey: int = 0) -> bytes:
    """Minutes of work."""
    return hostile.many_scans(HOPELESS, grey=grey)


def pids(service: Running) -> list[int]:
    found = [decoder.pid for decoder in service.encoder.pool._decoders]
    return [pid for pid in found if pid is not None and alive(pid)]


async def decoding(service: Running, count: int = 1) -> list[int]:
    """The processes, once so many of them decode."""
    await until(lambda: sum(cpu_s(pid) > 0.5 for pid in pids(service)) >= count)
    return pids(service)


@pytest.mark.process
def test_a_small_picture_waits_for_no_heavy_one(tmp_path: Path) -> None:
    """One worker, and eight requests that would take it half an hour."""

    async def scenario() -> None:
        async with running(tmp_path, preprocess_workers=1, **LIMITS) as service:
            calls = [service.encode(hopeless(n), request_id=f"bad {n}") for n in range(8)]
            await decoding(service)
            for seed in range(5):
                answer = await service.encode(picture(seed), request_id="good")
                assert answer.ref.num_rows == 9
            assert not any(call.done() for call in calls)
            assert len(pids(service)) == 1  # As many as there are places.
            for call in calls:
                call.cancel()
            await until(lambda: service.encoder.backlog.items == 0)

    asyncio.run(scenario())


@pytest.mark.process
def test_a_heavy_picture_passes_the_many_of_another_request(tmp_path: Path) -> None:
    heavy = picture(1, (3000, 2000), "PNG")
    assert parse_structure(heavy).is_heavy

    async def scenario() -> None:
        async with running(tmp_path, preprocess_workers=1, **LIMITS) as service:
            done: list[str] = []

            async def ask(name: str, data: bytes, owner: str) -> None:
                await service.encode(data, request_id=owner)
                done.append(name)

            turns = service.encoder.pool.heavy.places
            many = [picture(seed, (3000, 2000), "PNG") for seed in range(2, 8)]
            tasks = [asyncio.create_task(ask(f"many {i}", d, "many")) for i, d in enumerate(many)]
            await until(lambda: turns.waiting == len(many) - 1 or len(done) > 1)
            tasks.append(asyncio.create_task(ask("one", heavy, "one")))
            await asyncio.gather(*tasks)
            assert done.index("one") < 4

    asyncio.run(scenario())


@pytest.mark.process
def test_who_leaves_ends_the_decoding_and_it_costs_nothing_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, preprocess_workers=1, **LIMITS) as service:
            before = children_cpu_s()
            waiting = [service.encode(hopeless(n), request_id=f"{n}") for n in range(3)]
            (pid,) = await decoding(service)
            for call in waiting:
                call.cancel()
            await until(lambda: service.encoder.backlog.items == 0 and not alive(pid))
            await until(lambda: not pids(service))  # Those that waited never began.
            lane = service.encoder.pool.heavy
            assert lane.places.held == 0 and not lane.places.waiting and lane.memory.held == 0
            assert children_cpu_s() - before < 20  # Of many minutes.
            assert (await service.encode(picture(9, (3000, 2000)))).ref.num_rows

    asyncio.run(scenario())


@pytest.mark.process
def test_decoding_ends_with_the_call_s_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, **LIMITS) as service:
            call = service.encode(hopeless(), timeout=8)
            (pid,) = await decoding(service)
            await refusal(call)
            await until(lambda: service.encoder.backlog.items == 0 and not alive(pid))

    asyncio.run(scenario())


@pytest.mark.process
def test_decoding_has_a_time_limit(tmp_path: Path, faults: Faults) -> None:
    async def scenario() -> None:
        async with running(tmp_path, decode_timeout_s=1.5, **LIMITS) as service:
            error = await refusal(service.encode(hopeless()))
            assert isinstance(error, InvalidMedia) and error.code == "decode_timeout"
            assert "smaller" in error.message
            await until(lambda: not pids(service))
            assert (await service.encode(picture())).ref.num_rows == 9

    asyncio.run(scenario())
    assert faults() == {("errors", "decode_timeout", "Encode"): 1}


@pytest.mark.process
def test_a_process_that_dies_costs_its_item_and_no_other(tmp_path: Path, faults: Faults) -> None:
    """After two deaths the item is refused, though the encoder lives."""

    async def scenario() -> None:
        async with running(tmp_path, **LIMITS) as service:
            for _ in range(2):
                call = service.encode(hopeless())
                (pid,) = await decoding(service)
                os.kill(pid, signal.SIGKILL)
                error = await refusal(call)
                assert isinstance(error, EngineFailure) and "memory" in error.message
                assert (await service.encode(picture())).ref.num_rows == 9
            error = await refusal(service.encode(hopeless()))
            assert isinstance(error, PoisonousItem)
            assert (await service.encode(picture(3, (3000, 2000)))).ref.num_rows

    asyncio.run(scenario())
    assert faults() == {
        ("errors", "engine_failure", "Encode"): 2,
        ("errors", "unprocessable_media", "Encode"): 1,
    }


@pytest.mark.process
def test_memory_of_pictures_in_decoding_is_bounded(tmp_path: Path) -> None:
    """Eight pictures of 40 bytes, each of which takes a quarter of a gigabyte to decode."""
    budget = 400 * 2**20

    async def scenario() -> None:
        limits = {**LIMITS, "max_decode_bytes": budget}
        async with running(tmp_path, preprocess_workers=4, **limits) as service:
            bombs = [hostile.one_colour_webp(4000, 2600, red) for red in range(8)]
            assert sum(map(len, bombs)) < 400
            calls = [service.encode(data, request_id="bombs") for data in bombs]
            finished = asyncio.gather(*calls)
            most = 0
            while not finished.done():
                taken = [resident(pid) for pid in pids(service)]
                most = max(most, sum(taken))
                assert service.encoder.pool.heavy.memory.held <= budget
                await asyncio.sleep(0.005)
            await finished
            idle = 50 * 2**20 * 4
            assert most < budget + idle
            await until(lambda: sum(map(resident, pids(service))) < idle)

    asyncio.run(scenario())


@pytest.mark.process
def test_idle_processes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "IDLE_S", 0.05)

    async def scenario() -> None:
        async with running(tmp_path, **LIMITS) as service:
            for seed in range(2):
                await service.encode(picture(seed, (3000, 2000)))
                await until(lambda: not service.encoder.pool._decoders and not pids(service))

    asyncio.run(scenario())


def test_light_pictures_start_no_process(tmp_path: Path) -> None:
    """A photo of twelve megapixels is one of them."""

    async def scenario() -> None:
        async with running(tmp_path, **LIMITS) as service:
            started = time.process_time()
            await service.encode(picture(1, (4000, 3000), "JPEG"))
            assert time.process_time() > started
            assert not service.encoder.pool._decoders

    asyncio.run(scenario())
