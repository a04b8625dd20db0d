"""``opticnerve bench serve``: load on a running server with OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opticnerve.addresses import gateway_url
from opticnerve.benchmark.figures import Slo
from opticnerve.benchmark.pictures import MAX_SIDE, Size
from opticnerve.benchmark.plot import plot_path
from opticnerve.config.command_line import Parser, argument_type, number_type

BENCH = "Measures servers with OpenAI's API."
COMMAND = "serve: sends load and says how it was answered. `opticnerve bench serve --help`"
SERVE = (
    "Sends chat completions to a running server (OpenAI's API: OpticNerve, vLLM and others), "
    "streamed, and says how fast and how well they were answered. Several numbers for "
    "--concurrency, --rate or --turns are as many runs, one after the other."
)
EPILOG = (
    "Latencies are of answered requests: TTFT to the first text, TPOT a token after it, ITL from "
    "one piece of text to the next, E2E to the end. At a --rate they count from the time at which "
    "a request was due, sent late or not. Ctrl-C ends a run and prints what was measured. "
    "Exit status: 0 if every request was answered, 1 if not."
)
MAX_PICTURES = 64
WORKLOADS = ("chat", "conversation")


def main(argv: Sequence[str]) -> int:
    commands: Mapping[str, Callable[[Sequence[str]], int]] = {"serve": serve_command}
    parser = Parser("bench", BENCH, "serve URL [flags]")
    group = parser.add_argument_group("Commands")
    group.add_argument("command", metavar="COMMAND", choices=commands, help=COMMAND)
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


def serve_command(argv: Sequence[str]) -> int:
    from opticnerve.benchmark.serve import LoadSettings, measure

    given = vars(parser().parse_args(argv))
    given["headers"] = dict(given["headers"])
    given["api_key"] = given["api_key"] or os.environ.get("OPENAI_API_KEY") or ""
    return measure(LoadSettings(**given), argv)


def parser() -> Parser:
    made = Parser("bench serve", SERVE, "URL [flags]", EPILOG)
    _add_server(made)
    _add_pace(made)
    _add_length(made)
    _add_requests(made)
    _add_synthetic(made)
    _add_pictures(made)
    _add_results(made)
    return made


def _add_server(made: Parser) -> None:
    add = made.add_argument_group("Server").add_argument
    add(
        "url",
        metavar="URL",
        type=argument_type(gateway_url),
        help="such as http://127.0.0.1:8000, with or without /v1",
    )
    add("--model", metavar="NAME", help="to ask for (default: the first that /v1/models lists)")
    add(
        "--api-key",
        metavar="KEY",
        help="the server's key (default: OPENAI_API_KEY, which other users do not see in `ps`)",
    )
    add(
        "--header",
        dest="headers",
        metavar="NAME:VALUE",
        action="append",
        default=[],
        type=argument_type(_header),
        help="sent with each request; may be given several times",
    )
    add(
        "--timeout",
        dest="timeout_s",
        metavar="SECONDS",
        type=number_type(float),
        default=600.0,
        help="of a request, after which it counts as lost (default: 600)",
    )


def _add_pace(made: Parser) -> None:
    add = made.add_argument_group("Pace").add_argument
    add(
        "--concurrency",
        metavar="N,...",
        type=_several(number_type(int, minimum=1)),
        help="clients that each send their next request when their last has ended; with --rate: "
        "requests at once at most (default: 8; of conversations 1,32)",
    )
    add(
        "--rate",
        metavar="R,...",
        type=_several(argument_type(rate_of)),
        help="requests a second that are sent whether or not the server keeps up, as a Poisson "
        "process; of conversations: that begin",
    )
    add(
        "--burstiness",
        metavar="B",
        type=number_type(float),
        default=1.0,
        help="variance of the gaps of a --rate, in squares of their mean: 0 is an even rate, 1 "
        "Poisson's, 4 comes in bunches (default: 1)",
    )


def _add_length(made: Parser) -> None:
    add = made.add_argument_group("Length").add_argument
    add(
        "--requests",
        metavar="N",
        type=number_type(int, minimum=1),
        help="of each run (default: 4 x concurrency, and at least 32; 1000 with --duration; as "
        "many as --prompts has lines)",
    )
    add(
        "--duration",
        dest="duration_s",
        metavar="SECONDS",
        type=number_type(float),
        help="no request is sent after it; those under way are awaited",
    )
    add(
        "--ramp",
        dest="ramp_s",
        metavar="SECONDS",
        type=number_type(float),
        default=0.0,
        help="in which clients begin one by one, or the rate rises; not measured (default: 0)",
    )
    add(
        "--warm-up",
        metavar="N",
        type=number_type(int),
        default=2,
        help="requests before all runs, one by one, not measured; none of --prompts (default: 2)",
    )


def _add_requests(made: Parser) -> None:
    add = made.add_argument_group("Requests").add_argument
    add(
        "--workload",
        choices=WORKLOADS,
        default="chat",
        help="chat: single questions, of one picture each; conversation: 3 pictures, 120 tokens a "
        "turn, and all that was said before is sent again with each turn (default: chat)",
    )
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='questions instead, as JSON one a line: {"prompt": TEXT, "images": [FILE or URL]}, or '
        "bodies of chat completions; from the first again when they are used up",
    )
    add(
        "--output-tokens",
        metavar="N",
        type=number_type(int, minimum=1),
        help="of each answer, which ends there and not before (default: 64; of conversations 120)",
    )
    add(
        "--fields",
        metavar="JSON",
        type=argument_type(_fields),
        default={},
        help='further fields of each body, such as {"ignore_eos": null} for servers that refuse it '
        '(null: left out), or {"temperature": 1}',
    )


def _add_synthetic(made: Parser) -> None:
    add = made.add_argument_group("Synthetic questions").add_argument
    add(
        "--turns",
        metavar="N,...",
        type=_several(number_type(int)),
        help="earlier turns of a conversation, each a request of its own (default: 0,2)",
    )
    add(
        "--words",
        metavar="N",
        type=number_type(int, minimum=1),
        default=32,
        help="of a question: in most vocabularies a token each (default: 32)",
    )
    add(
        "--seed",
        metavar="N",
        type=number_type(int),
        help="of texts, pictures and times; asked twice, a server's caches know them (default: new "
        "each time)",
    )


def _add_pictures(made: Parser) -> None:
    add = made.add_argument_group("Synthetic pictures").add_argument
    add(
        "--pictures",
        metavar="N",
        type=argument_type(_pictures),
        help="in a question, or in the first of a conversation (default: 1; of conversations 3)",
    )
    add(
        "--picture-sizes",
        metavar="WxH,...",
        type=argument_type(sizes_of),
        default=((448, 448),),
        help="in pixels, taken in turn (default: 448x448)",
    )
    add(
        "--picture-format",
        choices=("jpeg", "png"),
        default="jpeg",
        help="of their files (default: jpeg)",
    )
    add(
        "--repeat",
        metavar="SHARE",
        type=argument_type(share_of),
        default=0.0,
        help="of pictures that the run has shown before, from 0 to 1 (default: 0)",
    )


def _add_results(made: Parser) -> None:
    add = made.add_argument_group("Results").add_argument
    add(
        "--slo",
        metavar="LIMITS",
        type=argument_type(Slo.parse),
        help="such as ttft=500ms,tpot=50ms,e2e=5s: goodput counts answers within all of them",
    )
    add("--json", metavar="FILE", type=Path, help="every request and figure, and the command")
    add(
        "--plot",
        metavar="FILE",
        type=argument_type(plot_path),
        help="distributions, as .html, .png or .svg",
    )


# ---- values of flags


def _several(one: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(one(part.strip()) for part in text.split(","))


def rate_of(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"expected a number above 0, got {text!r}")
    return value


def share_of(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _pictures(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MAX_PICTURES:
        raise ValueError(f"expected a whole number from 0 to {MAX_PICTURES}, got {text!r}")
    return value


def sizes_of(text: str) -> tuple[Size, ...]:
    sizes = []
    for part in text.lower().split(","):
        width, _, height = part.strip().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise ValueError(f"expected WIDTHxHEIGHT, or several with commas, got {text!r}")
        size = int(width), int(height)
        if not all(1 <= side <= MAX_SIDE for side in size):
            raise ValueError(f"expected sides from 1 to {MAX_SIDE}, got {part!r}")
        sizes.append(size)
    return tuple(sizes)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name.strip() and colon):
        raise ValueError(f"expected NAME:VALUE, got {text!r}")
    return name.strip().lower(), value.strip()


def _fields(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    return value
