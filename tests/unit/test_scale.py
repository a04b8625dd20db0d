"""Parts of bench/scale: which arrangements are compared, and devices that are scripted."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from bench.scale.__main__ import arrangements
from bench.scale.devices import Device, Devices
from bench.scale.worker import PassTimes


def test_every_split_of_the_devices_and_as_many_whole_copies():
    found = {each.name: each for each in arrangements(3)}
    assert list(found) == [
        "1 E + 1 L", "1 E + 2 L", "2 E + 1 L", "2 whole copies", "3 whole copies",
    ]  # fmt: skip
    assert found["2 E + 1 L"].stacks() == [[("encoder", 0), ("encoder", 1), ("llm", 2)]]
    assert found["2 whole copies"].stacks() == [
        [("encoder", 0), ("llm", 0)],
        [("encoder", 1), ("llm", 1)],
    ]


def test_passes_take_their_time_of_their_own_device(tmp_path):
    path = str(tmp_path / "devices")

    def passes():
        with (
            contextlib.closing(Device(path, 1)) as tower,
            contextlib.closing(Device(path, 1)) as decoder,
            contextlib.closing(Device(path, 2)) as other,
        ):
            tower.begin(0.02)
            decoder.begin(0.01)
            assert tower.end() >= 0.02
            decoder.end()
            return decoder.busy_s(), other.busy_s()

    async def serve_and_pass():
        server = await asyncio.start_unix_server(Devices().answer, path)
        async with server:
            return await asyncio.to_thread(passes)

    assert asyncio.run(serve_and_pass()) == (pytest.approx(0.03), 0.0)


def test_a_step_that_computes_nothing_takes_no_time():
    times = PassTimes.read(PassTimes(tower=1, patch=2, step=3, sequence=4, prompt_token=5).text())
    step = SimpleNamespace(works=(1,), num_decodes=2, num_tokens=12)
    assert times.of_step(step) == pytest.approx(0.001 * (3 + 4 * 2 + 5 * 10))
    assert times.of_step(SimpleNamespace(works=())) == 0
    assert times.of_batch([SimpleNamespace(num_patches=4)] * 3) == pytest.approx(0.025)
