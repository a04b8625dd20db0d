"""The decoder's process: what it makes, how it ends, what it leaves."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoder_service.pictures.decode_process import (
    DecoderDied,
    DecoderProcess,
    DecodeTask,
    Pixels,
    decode_and_cut,
)
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import InvalidMedia
from opticnerve.media.probe import parse_structure
from opticnerve.models import registry
from tests import hostile
from tests.checkpoints import FAMILIES
from tests.decoders import (
    ANY,
    HOPELESS,
    WAIT_S,
    at_work,
    children_cpu_s,
    resident,
    work,
)
from tests.hostile import save
from tests.preprocessors import mean_colour
from tests.system import alive, wait_for
from tests.unit.test_media_cost import PICTURES


@pytest.fixture
def decoder() -> Iterator[DecoderProcess]:
    found = DecoderProcess(mean_colour, 600)
    yield found
    found.close()


@pytest.mark.process
def test_pixels_are_those_of_a_thread(decoder: DecoderProcess) -> None:
    """One process makes them all, and answers what is wrong with some."""
    for name, make in PICTURES.items():
        data = make()
        here = decode_and_cut(mean_colour, work(data))
        there = decoder.run(work(data))
        assert np.array_equal(here.values, there.values), name
        assert there.seconds > 0
    pid = decoder.pid
    with pytest.raises(InvalidMedia):
        decoder.run(replace(work(data), max_pixels=10))
    decoder.run(work(data))
    assert decoder.pid == pid


@pytest.mark.process
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_tower_is_fed_is_the_same_from_a_process(
    family: str, random_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(random_checkpoint(family)), side="encoder")
    layout = registry.make_layout(checkpoint)
    preprocess = registry.make_preprocessor(checkpoint, layout)
    data = save(Image.effect_noise((300, 200), 60).convert("RGB"), "JPEG")
    plan = layout.plan(parse_structure(data))
    found = DecoderProcess(preprocess, 600)
    try:
        there = found.run(DecodeTask(data, plan, None, ANY, ANY))
        here = decode_and_cut(preprocess, DecodeTask(data, plan, None, ANY, ANY))
        assert np.array_equal(here.values, there.values)
        maps = Path(f"/proc/{found.pid}/maps").read_text()
        assert "libtorch" not in maps and "cygrpc" not in maps and "_imaging" in maps
    finally:
        found.close()


@pytest.mark.process
def test_killed_it_ends_at_once_and_costs_nothing_more(decoder: DecoderProcess) -> None:
    before = children_cpu_s()
    thread, outcome = at_work(decoder, hostile.many_scans(HOPELESS))
    pid = decoder.pid
    assert pid is not None
    decoder.kill()
    thread.join(WAIT_S)
    assert isinstance(outcome[0], DecoderDied) and not outcome[0].by_task
    assert not alive(pid)
    assert children_cpu_s() - before < 20


def test_killed_before_it_starts_it_never_starts() -> None:
    decoder = DecoderProcess(mean_colour, 600)
    decoder.kill()
    with pytest.raises(DecoderDied):
        decoder.run(work(save(Image.new("RGB", (8, 8)), "PNG")))
    assert decoder.pid is None


@pytest.mark.process
def test_a_process_that_something_else_ends_is_told(decoder: DecoderProcess) -> None:
    thread, outcome = at_work(decoder, hostile.many_scans(HOPELESS))
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    thread.join(WAIT_S)
    assert isinstance(outcome[0], DecoderDied) and outcome[0].by_task


@pytest.mark.process
def test_its_time_is_a_core_s() -> None:
    """What it has used before does not count."""
    quick, slow = DecoderProcess(mean_colour, 1), work(hostile.many_scans(HOPELESS))
    before = children_cpu_s()
    for _ in range(3):
        quick.run(work(hostile.many_scans(20)))
    with pytest.raises(DecoderDied) as caught:
        quick.run(slow)
    assert caught.value.out_of_time and caught.value.by_task
    assert children_cpu_s() - before < 10


SIZE = (2400, 1800)
MEMORY: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: save(Image.new("RGB", SIZE, (1, 2, 3)), "JPEG"),
    "jpeg turned": lambda: save(Image.new("RGB", SIZE), "JPEG", exif=turned()),
    "jpeg progressive": lambda: hostile.many_scans(0, SIZE),
    "jpeg cmyk": lambda: save(Image.new("CMYK", SIZE), "JPEG", progressive=True),
    "png": lambda: save(Image.new("RGBA", SIZE, (0, 0, 0, 9)), "PNG", exif=turned()),
    "png palette": lambda: save(Image.new("P", SIZE), "PNG", transparency=bytes(2)),
    "png 16": lambda: png_16(*SIZE),
    "webp": lambda: hostile.one_colour_webp(*SIZE),
    "webp lossy": lambda: save(Image.new("RGBA", SIZE, (0, 0, 0, 9)), "WEBP", method=0),
    "gif": lambda: save(Image.new("P", SIZE), "GIF", transparency=0),
    "bmp": lambda: save(Image.new("RGB", SIZE), "BMP"),
    "bmp in runs": lambda: hostile.run_length_bmp(1200, 900),
}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def png_16(width: int, height: int) -> bytes:
    """Colours of 16 bits, one of them transparent."""
    rows = zlib.compress(bytes(height * (1 + 6 * width)), 1)
    plain = hostile.png(width, height, b"tRNS" + bytes(6), data=rows, depth=16)
    header = bytearray(plain[12:29])
    header[13] = 2
    return plain[:12] + bytes(header) + zlib.crc32(header).to_bytes(4) + plain[33:]


@pytest.mark.process
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_foreseen_and_given_back(name: str, decoder: DecoderProcess) -> None:
    data = MEMORY[name]()
    decoder.run(work(save(Image.new("RGB", (8, 8)), "PNG")))
    idle = resident(decoder.pid)
    decoder.run(work(data))
    taken = resident(decoder.pid, "VmHWM") - idle
    foreseen = parse_structure(data, ANY, ANY).memory + len(data) * 3
    assert taken < 1.1 * foreseen + 2**23
    wait_for("its memory", lambda: resident(decoder.pid) < idle + 2**24)


PARENT = """
import sys
from encoder_service.pictures.decode_process import DecoderProcess
from tests import hostile
from tests.preprocessors import mean_colour
from tests.decoders import HOPELESS, at_work
decoder = DecoderProcess(mean_colour, 600)
at_work(decoder, hostile.many_scans(HOPELESS))
print(decoder.pid, flush=True)
"""


@pytest.mark.process
def test_it_ends_with_the_process_that_started_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for("its end", lambda: not alive(pid))


def test_a_picture_travels_as_a_few_bytes_more_than_it_has() -> None:
    data = save(Image.effect_noise((500, 500), 60), "JPEG")
    assert len(pickle.dumps(work(data))) < len(data) + 2000
    assert isinstance(decode_and_cut(mean_colour, work(data)), Pixels)
