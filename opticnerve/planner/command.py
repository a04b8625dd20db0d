"""``opticnerve plan``: how many workers of each pool some traffic needs."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opticnerve.addresses import gateway_url
from opticnerve.benchmark import plot
from opticnerve.benchmark.command import add_shared, rate_of, share_of
from opticnerve.config.command_line import Parser, argument_type, number_type
from opticnerve.errors import StartupError
from opticnerve.extras import require_extra

if TYPE_CHECKING:
    from opticnerve.planner.rates import Rates

DESCRIPTION = (
    "Says how many encoders and LLM workers given traffic needs to keep an SLO, whether splitting "
    "pays compared with whole copies of the model, and which TTFT and TPOT to expect. It simulates "
    "the traffic with measured costs of each stage."
)
EPILOG = (
    "A calibration sends some 70 requests to an idle stack. --encoders and --llms together ask for "
    "a forecast for pools of these sizes. Exit status: 0, or 2 if no number of workers keeps the "
    "SLO."
)


def parser() -> Parser:
    made = Parser("plan", DESCRIPTION, "--calibrate URL | --rates FILE [flags]", EPILOG)
    _add_rates(made)
    _add_traffic(made)
    _add_pictures(made)
    _add_answer(made)
    return made


def _add_rates(made: Parser) -> None:
    add = made.add_argument_group("What stages cost").add_argument
    add(
        "--calibrate",
        metavar="URL",
        type=argument_type(gateway_url),
        help="measure a running OpticNerve, such as http://127.0.0.1:8000; "
        "OPENAI_API_KEY is its key",
    )
    add("--rates", metavar="FILE", type=Path, help="read rates that --save-rates has written")
    add("--save-rates", metavar="FILE", type=Path, help="write the measured rates")


def _add_traffic(made: Parser) -> None:
    add = made.add_argument_group("Traffic").add_argument
    add(
        "--rate",
        metavar="R",
        type=argument_type(rate_of),
        required=True,
        help="requests a second, on average",
    )
    add_shared(add, "--burstiness")
    add(
        "--prompt-tokens",
        metavar="N[-M]",
        type=argument_type(range_of),
        default=(64, 64),
        help="tokens of a request without pictures; N-M: equally distributed (default: 64)",
    )
    add(
        "--output-tokens",
        metavar="N[-M]",
        type=argument_type(range_of),
        default=(64, 64),
        help="tokens of an answer, likewise (default: 64)",
    )
    add(
        "--cached-prompt",
        metavar="SHARE",
        type=argument_type(share_of),
        default=0.0,
        help="share of prompt tokens in the prefix cache; `bench serve` measures it (default: 0)",
    )


def _add_pictures(made: Parser) -> None:
    add = made.add_argument_group("Pictures").add_argument
    add_shared(add, "--pictures", default=1, default_text="1")
    add_shared(add, "--picture-sizes")
    add_shared(add, "--repeat")


def _add_answer(made: Parser) -> None:
    add = made.add_argument_group("Answer").add_argument
    add_shared(add, "--slo")
    add(
        "--attain",
        metavar="SHARE",
        type=argument_type(share_of),
        default=0.99,
        help="share of requests that must keep the SLO (default: 0.99)",
    )
    for flag in ("--encoders", "--llms"):
        add(flag, metavar="N", type=number_type(int), help="forecast for pools of this size")
    add("--seed", metavar="N", type=number_type(int), default=0, help="traffic's seed (default: 0)")
    add("--json", metavar="FILE", type=Path, help="write rates, traffic and forecasts as JSON")
    add_shared(add, "--plot")


def range_of(text: str) -> tuple[int, int]:
    """``64`` or ``20-200``. Raises ValueError."""
    low, dash, high = text.partition("-")
    found = int(low), int(high if dash else low)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(f"expected N or N-M, from 1 up, got {text!r}")
    return found


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    require_extra("plan", "opticnerve plan")
    _check(args)
    from opticnerve.planner import report
    from opticnerve.planner.traffic import Traffic

    names = tuple(f"{width}x{height}" for width, height in args.picture_sizes)
    traffic = Traffic(
        args.rate, args.pictures, names, args.prompt_tokens, args.output_tokens, args.repeat,
        args.cached_prompt, args.burstiness,
    )  # fmt: skip
    rates = read_rates(args)
    if args.llms is None:
        from opticnerve.planner.search import Question, propose

        proposal = propose(Question(rates, traffic, args.slo, args.attain, seed=args.seed), _say)
        told, forecasts = report.text(proposal), proposal.forecasts
    else:
        from opticnerve.planner.search import REQUESTS
        from opticnerve.planner.simulation import Pools, simulate

        pools = Pools(args.encoders, args.llms)
        forecasts = [simulate(rates, traffic, pools, REQUESTS, args.slo, args.seed)]
        told = f"{report.forecast_table(forecasts)}\n\n{report.notes(1)}"
    _say("")
    print(told)
    if args.json:
        kept = report.document(argv, rates, traffic, args.slo, forecasts)
        _write(args.json, kept, "--json")
    if args.plot:
        plot.save(report.plan_plot(forecasts), args.plot, "opticnerve plan", told)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises StartupError for flags that do not go together."""
    if (args.calibrate is None) == (args.rates is None):
        raise StartupError("give --calibrate URL or --rates FILE")
    if (args.encoders is None) != (args.llms is None):
        raise StartupError("--encoders and --llms are given together")
    if args.llms is None and args.slo is None:
        raise StartupError("give --slo, or the pools: --encoders and --llms")
    if args.llms == 0 or (args.encoders == 0 and args.pictures and args.repeat < 1):
        raise StartupError("pictures need an encoder, and answers an LLM worker")


def read_rates(args: argparse.Namespace) -> Rates:
    from opticnerve.planner.rates import Rates

    if args.rates:
        return Rates.read(args.rates)
    from opticnerve.benchmark.serve import LoadSettings, greet
    from opticnerve.planner.calibrate import calibrate

    settings = LoadSettings(args.calibrate, api_key=os.environ.get("OPENAI_API_KEY", ""))
    sizes = args.picture_sizes if args.pictures else ()
    rates = asyncio.run(
        calibrate(args.calibrate, greet(settings), settings.request_headers, sizes, _say)
    )
    if args.save_rates:
        _write(args.save_rates, rates.document(), "--save-rates")
    return rates


def _write(path: Path, value: Any, flag: str) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise StartupError(f"{flag}: cannot write {path}: {error}") from error


def _say(text: str) -> None:
    """Shows on a terminal what is being measured or simulated."""
    if sys.stderr.isatty():
        print(f"\r{text:60}", end="\n" if not text else "", file=sys.stderr, flush=True)
