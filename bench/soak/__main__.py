"""Mixed load on a real stack while its parts are killed.

    python -m bench.soak [--minutes 30] [--seed N] [--pictures N]

Two encoders, two LLM workers, two gateways and Redis serve the demo checkpoint. Clients ask about
new and repeated pictures, in chats with several turns, with JSON schemas and several choices,
streamed or not; some are slow, disconnect while they send or while they are answered, or send
requests that must be refused. Meanwhile services are killed with SIGKILL or hang, Redis is killed
or hangs, and the tmpfs of the embeddings fills up, on a seeded schedule.

Every request must end once, and rightly: with the answer that a quiet stack gave beforehand, with
the error that the request deserves, or, during a fault that explains it, with an error after which
a client may retry. Requests to a gateway that is killed may be lost. Memory, files and sockets of
the services that are never killed must stay flat, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import report
from bench.soak import plot
from bench.soak.cases import Case, all_cases
from bench.soak.faults import Fault, Injector
from bench.soak.samples import Drift, Samples
from bench.soak.stack import SoakStack, marked, open_stack
from bench.soak.traffic import Asked, Traffic, answered_otherwise, quiet_answers
from bench.soak.verdict import count, describe, judge, refused_too_many
from opticnerve.benchmark.figures import percentile
from tests.system import wait_for

JUDGED_MINUTES = 5.0  # Shorter runs cannot show whether memory is flat.
SHOWN = 20  # Of the requests that ended wrongly.


class Run:
    """One soak: what happened, and what was wrong."""

    def __init__(self, stack: SoakStack, args: argparse.Namespace) -> None:
        self.stack = stack
        self.seconds = 60 * args.minutes
        self.seed = args.seed
        self.injector = Injector(stack, self.seconds, args.seed, args.gap)
        self.samples = Samples(stack)
        self.asked: list[Asked] = []
        self.wrong_afterwards: list[Case] = []
        self.began = self.took = 0.0

    async def soak(self, cases: Sequence[Case]) -> None:
        print(f"asking a quiet stack {len(cases)} questions", file=sys.stderr)
        rights = await quiet_answers(self.stack.gateways[0], cases)
        traffic, over = Traffic(self.stack.gateways, rights, self.seed), asyncio.Event()
        self.asked, self.began = traffic.asked, time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(over))
            group.create_task(self.samples.run(max(0.5, self.seconds / 600), over))
            group.create_task(self._progress(over))
            await self.injector.run()
            over.set()
        self.took = time.monotonic() - self.began
        await asyncio.to_thread(wait_for, "an idle stack", self.stack.is_idle)
        self.wrong_afterwards = await answered_otherwise(self.stack.gateways[1], rights)

    async def _progress(self, over: asyncio.Event) -> None:
        with tqdm(total=round(self.seconds), unit="s", disable=None) as bar:
            while not over.is_set():
                faults = self.faults
                wrong = sum(judge(each, faults).word == "wrong" for each in self.asked)
                kind = faults[-1].kind if faults and faults[-1].ended > time.monotonic() else ""
                bar.set_postfix_str(f"{len(self.asked)} requests, {wrong} wrong, {kind}")
                bar.update(min(round(time.monotonic() - self.began), bar.total) - bar.n)
                await asyncio.sleep(1.0)

    @property
    def faults(self) -> list[Fault]:
        return self.injector.faults

    @property
    def drifts(self) -> list[Drift]:
        return self.samples.drifts([*self.injector.survivors, "redis"], self.took)

    def wrongs(self) -> list[str]:
        """A line for each thing that must not have happened."""
        found = [
            describe(each, self.faults, self.began)
            for each in self.asked
            if judge(each, self.faults).word == "wrong"
        ]
        found += refused_too_many(self.asked, self.faults)
        found += [
            f"the stack was not whole again after: {fault.kind}"
            for fault in self.faults
            if fault.ended == math.inf
        ]
        if self.wrong_afterwards:
            found += [
                f"answered otherwise afterwards: {case.kind}" for case in self.wrong_afterwards
            ]
        if self.seconds >= 60 * JUDGED_MINUTES:
            found += [
                f"{drift.series} grew from {drift.early:.1f} to {drift.late:.1f}"
                for drift in self.drifts
                if not drift.flat
            ]
        return found

    def results(self) -> dict[str, Any]:
        excused = Counter(judge(each, self.faults).fault for each in self.asked)
        return {
            "minutes": self.took / 60,
            "seed": self.seed,
            "tmpfs": self.stack.mounted,
            "requests": {name: dict(c) for name, c in count(self.asked, self.faults).items()},
            "seconds_p50_p99": self._durations(),
            "faults": [
                {**asdict(fault), "began": fault.began - self.began,
                 "ended": fault.ended - self.began}
                for fault in self.faults
                if fault.ended < math.inf
            ],
            "excused_by_fault": {name: n for name, n in excused.items() if name},
            "survivors": self.injector.survivors,
            "drifts": [asdict(drift) for drift in self.drifts],
        }  # fmt: skip

    def draw(self, path: Path) -> None:
        ended = [
            (each.ending.ended - self.began, judge(each, self.faults).word) for each in self.asked
        ]
        plot.draw(path, ended, self.samples, self.faults, self.began)

    def _durations(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for each in self.asked:
            if each.manner.name == "plain":
                took = each.ending.ended - each.ending.sent
                found.setdefault(each.case.kind, []).append(took)
        return {
            name: [round(percentile(values, rank), 3) for rank in (50, 99)]
            for name, values in sorted(found.items())
        }


def show(results: dict[str, Any]) -> None:
    words = ("right", "left", "excused", "wrong")
    rows = [
        [name, *(counts.get(word, 0) for word in words),
         *results["seconds_p50_p99"].get(name, ("-", "-"))]
        for name, counts in results["requests"].items()
    ]  # fmt: skip
    print(report.table(["requests", *words, "p50, s", "p99, s"], rows), end="\n\n")
    by_kind: dict[str, list[float]] = {}
    for fault in results["faults"]:
        by_kind.setdefault(fault["kind"], []).append(fault["ended"] - fault["began"])
    excused = results["excused_by_fault"]
    rows = [
        [kind, len(times), f"{percentile(times, 50):.1f}", excused.get(kind, 0)]
        for kind, times in by_kind.items()
    ]
    print(report.table(["fault", "times", "s until whole", "excused"], rows), end="\n\n")
    rows = [
        [each["series"], f"{each['early']:.1f}", f"{each['late']:.1f}",
         "yes" if each["flat"] else "no"]
        for each in results["drifts"]
    ]  # fmt: skip
    print(report.table(["of what is never killed", "2nd sixth", "last sixth", "flat"], rows))


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # The stack is stopped.
    args.logs.mkdir(parents=True, exist_ok=True)
    with open_stack(args.logs) as stack:
        run = Run(stack, args)
        asyncio.run(run.soak(all_cases(args.pictures)))
        results, wrongs = run.results(), run.wrongs()
    wrongs += [f"left behind: {line}" for line in marked(stack.mark).values()]
    show(results)
    run.draw(report.RESULTS / f"{args.out}.png")
    if wrongs:
        print(f"\n{len(wrongs)} wrong (logs: {args.logs}):", *wrongs[:SHOWN], sep="\n")
    print("\nkept in", report.save("soak", {**results, "wrong": wrongs}, file=args.out))
    return int(bool(wrongs))


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=summary)
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes of load, about")
    parser.add_argument("--seed", type=int, default=0, help="seed of load and faults")
    parser.add_argument("--pictures", type=int, default=60, help="number of different pictures")
    parser.add_argument("--gap", type=float, default=10.0, help="most seconds between faults")
    parser.add_argument("--out", default="soak", metavar="NAME", help="name of the JSON file")
    parser.add_argument(
        "--logs", type=Path, default=Path("build/soak"), metavar="DIR", help="for services' logs"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
