"""The memory, files and sockets of every service during the soak, and the files of the tier and
keys of Redis; and whether they have grown since the warm-up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis

from bench.soak.stack import SoakStack

# How far the last sixth's median may exceed the second's: (share, amount in addition).
BOUNDS = {
    "memory, MB": (0.10, 8.0),
    "files": (0.10, 16.0),
    "sockets": (0.10, 16.0),
    "processes": (0.0, 1.0),
    "tier files": (0.25, 256.0),  # The tier may still fill up: half of its capacity.
    "Redis keys": (0.50, 64.0),
}


@dataclass(frozen=True)
class Drift:
    """Medians of the second and of the last sixth of one series."""

    series: str
    early: float
    late: float
    flat: bool


@dataclass
class Samples:
    """Series by name, such as ``llm-1 files``: (seconds since the beginning, value)."""

    stack: SoakStack
    series: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    async def run(self, every_s: float, until: asyncio.Event) -> None:
        began = time.monotonic()
        while not until.is_set():
            found = await asyncio.to_thread(self._look)
            now = time.monotonic() - began
            for name, value in found.items():
                self.series[name].append((now, value))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), every_s)

    def _look(self) -> dict[str, float]:
        found: dict[str, float] = {}
        services = self.stack.pids()
        members = _members(set(services.values()))
        for name, leader in services.items():
            held: dict[str, float] = defaultdict(float)
            for pid in members[leader]:
                with contextlib.suppress(OSError):  # It has ended meanwhile.
                    for what, value in _of_process(pid).items():
                        held[what] += value
            found |= {f"{name} {what}": value for what, value in held.items()}
        found["tier files"] = sum(len(files) for _, _, files in os.walk(self.stack.tier))
        client = redis.Redis(port=self.stack.redis.port, socket_timeout=1.0)
        with contextlib.suppress(redis.RedisError), client:
            found["Redis keys"] = float(str(client.dbsize()))
        return found

    def drifts(self, names: Sequence[str], seconds: float) -> list[Drift]:
        """The drifts of the series of the services ``names``, and of tier and Redis."""
        found = []
        for series, points in self.series.items():
            service, _, what = series.partition(" ")
            if series in BOUNDS:
                what = series
            elif service not in names:
                continue
            early = _median(points, seconds / 6, seconds / 3)
            late = _median(points, seconds * 5 / 6, seconds)
            if what not in BOUNDS:
                continue
            share, amount = BOUNDS[what]
            if early is not None and late is not None:
                found.append(Drift(series, early, late, late <= early * (1 + share) + amount))
        return sorted(found, key=lambda drift: drift.series)


def _median(points: Sequence[tuple[float, float]], start: float, end: float) -> float | None:
    values = [value for at, value in points if start <= at <= end]
    return statistics.median(values) if values else None


def _members(leaders: set[int]) -> dict[int, list[int]]:
    """The processes of each service, which leads a session, or is a single process."""
    found = {leader: [leader] for leader in leaders}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            session, pid = int(fields[3]), int(directory.name)
            if session in found and pid != session:
                found[session].append(pid)
    return found


def _of_process(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    links = [_link(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return {
        "PSS, MB": kilobytes["Pss"] * 1024 / 1e6,
        # Without mapped files, such as weights and libraries, whose share depends on other
        # processes.
        "memory, MB": (kilobytes["Pss"] - kilobytes["Pss_File"]) * 1024 / 1e6,
        "files": len(links),
        "sockets": sum(link.startswith("socket:") for link in links),
        "processes": 1,
    }


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
