"""``opticnerve plan`` against ``opticnerve bench serve``, on one running stack.

    python -m bench.plan_check [--scripted] [--rate R] [--rounds N] [--requests N]

A stack serves the demo checkpoint. Each round calibrates it while it is idle, measures an open loop
at the given rate with one new picture in each request, and forecasts the latencies of such traffic,
at the rate at which requests actually came and with prompts of their lengths. The medians of the
rounds are compared: throughput should agree within 20%, the median TTFT within 30%.

On a machine that does other work, a stage takes a different time in the calibration than in the
measurement. With ``--scripted``, forward passes take fixed times (``bench.scale``); queues,
batches, gRPC, the store and the scheduler are the product's own, so that this checks the planner's
model of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import opticnerve
from bench import report
from bench.scale.__main__ import PICTURE_SIDE, Arrangement, Bench, scripted_devices
from opticnerve.benchmark.pictures import Size
from opticnerve.benchmark.tables import table
from opticnerve.cli import commands
from opticnerve.planner.calibrate import calibrate
from opticnerve.planner.rates import Rates
from opticnerve.planner.simulation import Forecast, Pools, simulate
from opticnerve.planner.traffic import Traffic

SIDES = {"demo": 448, "scripted": PICTURE_SIDE["scripted"]}  # Pixels.
SLOWER = 2.0  # Of scripted passes, so that they outlast the real computation.
LIMITS = {"requests/s": 0.2, "TTFT p50, ms": 0.3}
SIMULATED = 5000  # Requests.
Figures = dict[str, float]


@contextlib.contextmanager
def running(scripted: bool) -> Iterator[str]:
    """The URL of an idle stack with one encoder and one LLM worker."""
    if not scripted:
        with opticnerve.serve(dtype="float32") as stack:
            yield stack.url
        return
    args = argparse.Namespace(cuda=False, real=False, model=None, slower=SLOWER)
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        made = Bench(args, Path(name))
        with scripted_devices(made.socket), made.running(Arrangement()) as urls:
            yield urls[0]


def bench(url: str, args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """One run of ``opticnerve bench serve``."""
    flags = {
        "--requests": args.requests,
        "--output-tokens": args.output_tokens,
        "--rate": args.rate,
        "--words": 24,
        "--picture-sizes": f"{size[0]}x{size[1]}",
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "out.json"
        given = [str(part) for flag in flags.items() for part in flag]
        if commands.main(["bench", "serve", url, *given, "--json", str(path)]):
            raise SystemExit("not every request was answered")
        run: dict[str, Any] = json.loads(path.read_text())["runs"][0]
        return run


def described(run: dict[str, Any], rates: Rates, output: int) -> Traffic:
    """The traffic of a run, whose pictures have the only size in ``rates``."""
    asked = run["requests"]
    ((name, cost),) = rates.sizes.items()
    lengths = [each["prompt_tokens"] - cost.tokens for each in asked]
    cached = sum(each["cached_tokens"] or 0 for each in asked)
    share = cached / sum(each["prompt_tokens"] for each in asked)
    rate = (len(asked) - 1) / (asked[-1]["due_s"] - asked[0]["due_s"])
    prompt = (min(lengths), max(lengths))
    return Traffic(rate, 1, (name,), prompt, (output, output), cached_prompt=share)


def forecast_figures(found: Forecast) -> Figures:
    def ms(name: str, rank: float) -> float:
        return 1000 * (found.quantile(name, rank) or 0.0)

    return {
        "requests/s": found.requests_per_s,
        **{f"TTFT p{rank}, ms": ms("ttft", rank) for rank in (50, 90)},
        **{f"TPOT p{rank}, ms": ms("tpot", rank) for rank in (50, 90)},
    }


def measured_figures(run: dict[str, Any]) -> Figures:
    found = run["figures"]
    return {
        "requests/s": found["requests_per_s"],
        **{f"TTFT p{rank}, ms": found["latencies"]["TTFT"][f"p{rank}"] for rank in (50, 90)},
        **{f"TPOT p{rank}, ms": found["latencies"]["TPOT"][f"p{rank}"] for rank in (50, 90)},
    }


def one_round(url: str, args: argparse.Namespace) -> dict[str, Any]:
    side = SIDES["scripted" if args.scripted else "demo"]
    size = side, side
    rates = asyncio.run(calibrate(url, "model", {}, (size,), lambda text: None))
    run = bench(url, args, size)
    traffic = described(run, rates, args.output_tokens)
    found = simulate(rates, traffic, Pools(1, 1), SIMULATED, None)
    return {
        "rates": rates.document(),
        "traffic": asdict(traffic),
        "encoder_use": found.encoder_use,
        "llm_use": found.llm_use,
        "forecast": forecast_figures(found),
        "measured": measured_figures(run),
    }


def compared(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians of the rounds, and the forecast's relative error (``off``)."""
    rows = {}
    for name in rounds[0]["forecast"]:
        forecast, measured = (
            statistics.median(each[side][name] for each in rounds)
            for side in ("forecast", "measured")
        )
        off = forecast / measured - 1
        rows[name] = {"forecast": forecast, "measured": measured, "off": off}
    return rows


def main() -> None:
    args = parse()
    with running(args.scripted) as url:
        rounds = [one_round(url, args) for _ in range(args.rounds)]
    rows = compared(rounds)
    shown = [
        [name, f"{row['forecast']:.2f}", f"{row['measured']:.2f}", f"{row['off']:+.0%}"]
        for name, row in rows.items()
    ]
    print("\n" + table(["", "forecast", "measured", "off"], shown))
    within = {name: abs(rows[name]["off"]) <= limit for name, limit in LIMITS.items()}
    print("within the limits:", within)
    passes = "scripted" if args.scripted else "real"
    document = {"passes": passes, "compared": rows, "within": within, "rounds": rounds}
    print("kept in", report.save("plan_check", document, file=args.out))


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=summary)
    parser.add_argument("--scripted", action="store_true", help="passes take fixed times")
    parser.add_argument("--rate", type=float, help="requests a second (default: 2; scripted: 0.8)")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--output-tokens", type=int, help="(default: 32; scripted: 16)")
    parser.add_argument("--rounds", type=int, help="(default: 3; scripted: 1)")
    parser.add_argument("--out", metavar="NAME", help="name of the JSON file")
    args = parser.parse_args()
    name = "plan_check_scripted" if args.scripted else "plan_check"
    args.out = args.out or name
    args.rate = args.rate or (0.8 if args.scripted else 2.0)
    args.output_tokens = args.output_tokens or (16 if args.scripted else 32)
    args.rounds = args.rounds or (1 if args.scripted else 3)
    return args


if __name__ == "__main__":
    main()
