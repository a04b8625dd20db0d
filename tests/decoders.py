"""What tests ask of a decoder's process, and what they give it to do."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

from PIL import Image

from encoder_service.pictures.decode_process import DecoderProcess, DecodeTask
from opticnerve.media.plan import Grid, Modality, Plan
from opticnerve.media.probe import parse_structure
from tests.hostile import save
from tests.system import wait_for

ANY = 10**15
WAIT_S = 60.0
HOPELESS = 8_000  # Scans, of twelve megapixels: minutes.


def plan_of(data: bytes) -> Plan:
    """A plan under which a picture is decoded, however much work that is; its size then is any."""
    found = parse_structure(data, ANY, ANY)
    return Plan(
        modality=Modality.IMAGE,
        format=found.format,
        width=found.width,
        height=found.height,
        orientation=found.orientation,
        resized_width=28,
        resized_height=28,
        grid=Grid(1, 2, 2),
        num_tokens=1,
        num_patches=4,
    )


def work(data: bytes) -> DecodeTask:
    return DecodeTask(data, plan_of(data), 0xFFFFFF, ANY, ANY)


def resident(pid: int | None, what: str = "VmRSS") -> int:
    """Bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def children_cpu_s() -> float:
    """Of children that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_s(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at_work(decoder: DecoderProcess, data: bytes) -> tuple[threading.Thread, list[object]]:
    """A thread that waits for the decoder, once that is decoding, and what it gets."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(decoder.run(work(data)))
        except Exception as error:
            outcome.append(error)

    decoder.run(work(save(Image.new("RGB", (8, 8)), "PNG")))  # It has started, and is idle.
    idle_s = cpu_s(decoder.pid)
    thread = threading.Thread(target=run)
    thread.start()
    wait_for("decoding", lambda: cpu_s(decoder.pid) > idle_s + 0.1)
    return thread, outcome
