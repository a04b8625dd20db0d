"""The gain from one more encoder or LLM worker, and from whole copies on as many devices.

    python -m bench.scale [--devices 4] [--real] [--requests N] [--slower FACTOR]

Every arrangement of up to ``--devices`` devices serves the same loads: E encoders and L LLM workers
behind one gateway, with a device each; or whole copies, each a gateway, an encoder and an LLM
worker that share one device, which are asked in turn. The loads: ``pictures`` (three new pictures,
2 tokens out), ``text`` (no picture, 16 tokens), ``mixed`` (a new picture, 12 tokens).

Forward passes take fixed times on scripted devices (``bench.scale.devices``), since a machine may
have fewer cores than devices; everything else is the product as it is. With ``--real`` a device is
a core, to which processes are pinned, and passes are real, with the model of ``bench.load``; with
``--cuda`` it is a GPU. ``--model`` names another checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from bench import load, report
from bench.http_client import Figures, drive, encode, figures
from bench.scale.devices import Device
from bench.scale.worker import DEVICE, SERVICE, TIMES, PassTimes
from bench.service import Kind, Service
from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.connection import LoadTarget
from opticnerve.secret import make_secret
from tests.system import wait_for

WORKER = "bench.scale.worker"
MAX_SEQS = 4  # Sequences that a worker decodes at once, as if its KV cache held no more.
CLIENTS = 12
START_S = 600.0  # On a busy machine.
PICTURE_SIDE = {"scripted": 112, "real": 448}  # Pixels.
SHOWN = ("requests/s", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms", "ITL p99, ms")


@dataclass(frozen=True)
class Load:
    pictures: int
    max_tokens: int

    def bodies(self, count: int, seed: int, side: int) -> list[bytes]:
        material = load.Material(seed, side)
        return [encode(self._messages(material), self.max_tokens) for _ in range(count)]

    def _messages(self, material: load.Material) -> load.Messages:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": material.picture()}}
            for _ in range(self.pictures)
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": material.text()}]}]


LOADS = {"pictures": Load(3, 2), "text": Load(0, 16), "mixed": Load(1, 12)}


@dataclass(frozen=True)
class Arrangement:
    """``copies``: the number of whole copies; 0: a split, with a device for each worker."""

    encoders: int = 1
    llms: int = 1
    copies: int = 0

    @property
    def name(self) -> str:
        if self.copies:
            return f"{self.copies} whole copies"
        return f"{self.encoders} E + {self.llms} L"

    @property
    def devices(self) -> int:
        return self.copies or self.encoders + self.llms

    def stacks(self) -> list[list[tuple[Kind, int]]]:
        """(service, device) of each worker of each gateway."""
        if self.copies:
            return [[("encoder", number), ("llm", number)] for number in range(self.copies)]
        encoders: list[tuple[Kind, int]] = [("encoder", n) for n in range(self.encoders)]
        return [[*encoders, *(("llm", self.encoders + n) for n in range(self.llms))]]


def arrangements(devices: int) -> list[Arrangement]:
    """All splits of two to ``devices`` devices, and as many whole copies."""
    splits = [
        Arrangement(encoders, total - encoders)
        for total in range(2, devices + 1)
        for encoders in range(1, total)
    ]
    return splits + [Arrangement(copies=number) for number in range(2, devices + 1)]


class Bench:
    """Starts arrangements and loads them."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        self.directory = directory
        self.kind = "cuda" if args.cuda else "real" if args.real else "scripted"
        self.side = PICTURE_SIDE["scripted" if self.kind == "scripted" else "real"]
        self.times = PassTimes(*(args.slower * value for value in asdict(PassTimes()).values()))
        self.socket = str(directory / "devices")
        self.token = str(make_secret(directory, "token"))
        self.model = args.model
        if self.kind == "real" and not self.model:
            self.model = load.make_model(str(directory / "model"))

    @contextlib.contextmanager
    def running(self, arrangement: Arrangement) -> Iterator[list[str]]:
        """Starts an arrangement. The URLs of its gateways, once it is ready."""
        with contextlib.ExitStack() as stack:
            workers: list[list[Service]] = []
            for number, members in enumerate(arrangement.stacks()):
                workers.append(
                    [self._worker(number, index, *each) for index, each in enumerate(members)]
                )
                for worker in workers[-1]:
                    stack.callback(worker.stop)
                    worker.start()
            gateways = [self._gateway(number, each) for number, each in enumerate(workers)]
            for gateway in gateways:
                stack.callback(gateway.stop)
                gateway.start()
            urls = [gateway.listening() for gateway in gateways]
            for url, each in zip(urls, workers, strict=True):
                wait_for("workers", functools.partial(serves, url, len(each)), START_S)
            yield urls

    def _worker(self, stack: int, index: int, kind: Kind, device: int) -> Service:
        flags: dict[str, Any] = {"model": self.model, "dtype": "float32", "threads": 1}
        flags |= {"rpc_token_file": self.token}
        flags |= {"store": f"shm://{self.directory}/tier-{stack}?capacity=256MiB"}
        if kind == "llm":
            flags |= {"kv_cache_tokens": 16_384, "max_num_seqs": MAX_SEQS}
        place = {"scripted": f"scripted:{self.socket}:{device}", "real": f"core:{device}"}
        variables = {SERVICE: kind, DEVICE: place.get(self.kind, "none")}
        if self.kind == "cuda":
            flags |= {"dtype": "auto", "device": f"cuda:{device}"}
        variables[TIMES] = self.times.text()
        name = f"{kind}-{stack}-{index}"
        return Service(kind, name, self.directory, module=WORKER, variables=variables, **flags)

    def _gateway(self, stack: int, workers: Sequence[Service]) -> Service:
        found: dict[str, list[str]] = {"encoder": [], "llm": []}
        for worker in workers:
            found[worker.kind].append(worker.listening())
        return Service(
            "gateway",
            f"gateway-{stack}",
            self.directory,
            model=self.model,
            encoder_addresses=found["encoder"],
            llm_addresses=found["llm"],
            rpc_token_file=self.token,
        )

    async def load(self, urls: Sequence[str], name: str, devices: int, seed: int) -> Figures:
        """Figures of one load, asked of the gateways in turn."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(LoadTarget(url)) for url in urls]
            count = self.args.requests
            each = max(1, CLIENTS // len(urls))

            async def ask(number: int, bodies: list[bytes]) -> list[Answer]:
                return await drive(clients[number], bodies, each)

            warm = LOADS[name].bodies(2 * len(urls), seed + 1000, self.side)
            bodies = LOADS[name].bodies(count, seed, self.side)
            for number in range(len(urls)):
                await ask(number, warm[number :: len(urls)])
            before = self._busy_s(devices)
            turns = [ask(number, bodies[number :: len(urls)]) for number in range(len(urls))]
            answers = [answer for part in await asyncio.gather(*turns) for answer in part]
            busy = self._busy_s(devices) - before
        found = figures(answers)
        if found["answered"] != count:
            raise SystemExit(f"{name}: not every request was answered: {found}")
        return {**found, "devices busy, %": 100 * busy / devices / found["time, s"]}

    def _busy_s(self, devices: int) -> float:
        """Seconds that all scripted devices together were busy."""
        if self.kind != "scripted":
            return 0.0
        total = 0.0
        for number in range(devices):
            with contextlib.closing(Device(self.socket, number)) as device:
                total += device.busy_s()
        return total


def serves(url: str, workers: int) -> bool:
    """Whether the gateway at ``url`` can use ``workers`` workers."""
    try:
        health = httpx2.get(f"{url}/health", trust_env=False, timeout=5.0).json()
    except httpx2.HTTPError:
        return False
    return bool(health["encoders"]["serving"] + health["llms"]["serving"] == workers)


@contextlib.contextmanager
def scripted_devices(path: str) -> Iterator[None]:
    command = [sys.executable, "-m", "bench.scale.devices", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


def measure(bench: Bench, chosen: Sequence[Arrangement]) -> dict[str, dict[str, Figures]]:
    """Figures by load and arrangement."""
    found: dict[str, dict[str, Figures]] = {name: {} for name in LOADS}
    for number, arrangement in enumerate(chosen):
        print(f"{number + 1} of {len(chosen)}: {arrangement.name}", file=sys.stderr)
        with bench.running(arrangement) as urls:
            for name in LOADS:
                found[name][arrangement.name] = asyncio.run(
                    bench.load(urls, name, arrangement.devices, seed=number)
                )
    return found


def show(found: dict[str, dict[str, Figures]], chosen: Sequence[Arrangement]) -> None:
    for name, by_arrangement in found.items():
        base = next(iter(by_arrangement.values()))["requests/s"]
        rows = []
        for arrangement in chosen:
            each = by_arrangement[arrangement.name]
            shown = [f"{each[figure]:.2f}" if figure in each else "-" for figure in SHOWN]
            busy = f"{each['devices busy, %']:.0f}"
            gain = f"{each['requests/s'] / base:.2f}x"
            rows.append([arrangement.name, arrangement.devices, gain, *shown, busy])
        header = [name, "devices", "of the first", *SHOWN, "busy, %"]
        print(report.table(header, rows), end="\n\n")


def main() -> None:
    args = parse()
    chosen = arrangements(args.devices)
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        bench = Bench(args, Path(name))
        with scripted_devices(bench.socket):
            found = measure(bench, chosen)
    show(found, chosen)
    results = {
        "passes": bench.kind,
        "times_ms": asdict(bench.times) if bench.kind == "scripted" else None,
        "clients": CLIENTS,
        "max_num_seqs": MAX_SEQS,
        "requests": args.requests,
        "loads": {name: asdict(each) for name, each in LOADS.items()},
        "figures": found,
    }
    print("kept in", report.save("scale", results, file=args.out))


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=summary)
    parser.add_argument("--devices", type=int, default=4, help="most devices of an arrangement")
    parser.add_argument("--real", action="store_true", help="devices are cores, passes are real")
    parser.add_argument("--cuda", action="store_true", help="devices are GPUs, passes are real")
    parser.add_argument("--model", help="a checkpoint; none: the demo, or a random one if real")
    parser.add_argument("--requests", type=int, default=48, help="for each load and arrangement")
    parser.add_argument("--slower", type=float, default=1.0, help="factor of scripted times")
    parser.add_argument("--out", default="scale", metavar="NAME", help="name of the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
