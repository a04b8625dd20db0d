"""``opticnerve plan`` against ``opticnerve bench serve``, on one running stack.

    python -m bench.plan_check [--rate R] [--rounds N] [--requests N]

A stack of the demo checkpoint serves. Each round calibrates it while it is idle, forecasts what an
open loop of the given rate will see, and then measures it: one new picture a request. Of the rounds
the medians are compared: throughput should agree within 20%, the median TTFT within 30%.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import opticnerve
from bench import report
from opticnerve.benchmark.tables import table
from opticnerve.cli import commands
from opticnerve.planner.calibrate import calibrate
from opticnerve.planner.simulation import Forecast, Pools, simulate
from opticnerve.planner.traffic import Traffic

SIZE = (448, 448)
LIMITS = {"requests/s": 0.2, "TTFT p50, ms": 0.3}
SIMULATED = 5000  # Requests.
Figures = dict[str, float]


def bench(url: str, requests: int, output: int, *flags: str) -> dict[str, Any]:
    """The one run of ``opticnerve bench serve`` with one new picture a request."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "out.json"
        given = ["--requests", str(requests), "--output-tokens", str(output), "--words", "24"]
        commands.main(["bench", "serve", url, *given, "--json", str(path), *flags])
        run: dict[str, Any] = json.loads(path.read_text())["runs"][0]
        return run


def described(url: str, rate: float, output: int, picture_tokens: int) -> Traffic:
    """The traffic, whose prompts' lengths a few requests tell."""
    asked = bench(url, 8, output, "--concurrency", "1")["requests"]
    lengths = [each["prompt_tokens"] - picture_tokens for each in asked]
    cached = sum(each["cached_tokens"] or 0 for each in asked)
    share = cached / sum(each["prompt_tokens"] for each in asked)
    prompt, name = (min(lengths), max(lengths)), f"{SIZE[0]}x{SIZE[1]}"
    return Traffic(rate, 1, (name,), prompt, (output, output), cached_prompt=share)


def forecast_figures(found: Forecast) -> Figures:
    def ms(name: str, rank: float) -> float:
        return 1000 * (found.quantile(name, rank) or 0.0)

    return {
        "requests/s": found.requests_per_s,
        **{f"TTFT p{rank}, ms": ms("ttft", rank) for rank in (50, 99)},
        **{f"TPOT p{rank}, ms": ms("tpot", rank) for rank in (50, 99)},
    }


def measured_figures(run: dict[str, Any]) -> Figures:
    found = run["figures"]
    return {
        "requests/s": found["requests_per_s"],
        **{f"TTFT p{rank}, ms": found["latencies"]["TTFT"][f"p{rank}"] for rank in (50, 99)},
        **{f"TPOT p{rank}, ms": found["latencies"]["TPOT"][f"p{rank}"] for rank in (50, 99)},
    }


def one_round(url: str, args: argparse.Namespace) -> dict[str, Any]:
    rates = asyncio.run(calibrate(url, "model", {}, (SIZE,), lambda text: None))
    cost = rates.picture(f"{SIZE[0]}x{SIZE[1]}")
    traffic = described(url, args.rate, args.output_tokens, cost.tokens)
    found = simulate(rates, traffic, Pools(1, 1), SIMULATED, None)
    run = bench(url, args.requests, args.output_tokens, "--rate", str(args.rate))
    sides = {"forecast": forecast_figures(found), "measured": measured_figures(run)}
    return {"rates": rates.document(), "use": found.llm_use, **sides}


def compared(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians of the rounds, and by how much the forecast is off."""
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
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=summary)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="plan_check", metavar="NAME", help="of the JSON file")
    args = parser.parse_args()
    with opticnerve.serve(dtype="float32") as stack:
        rounds = [one_round(stack.url, args) for _ in range(args.rounds)]
    rows = compared(rounds)
    shown = [
        [name, f"{row['forecast']:.2f}", f"{row['measured']:.2f}", f"{row['off']:+.0%}"]
        for name, row in rows.items()
    ]
    print("\n" + table(["", "forecast", "measured", "off"], shown))
    within = {name: abs(rows[name]["off"]) <= limit for name, limit in LIMITS.items()}
    print("within the limits:", within)
    document = {"rate": args.rate, "compared": rows, "within": within, "rounds": rounds}
    report.save("plan_check", document, file=args.out)


if __name__ == "__main__":
    main()
