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
from opticnerve.config.command_line import Parser, add_options, argument_type, number_type
from opticnerve.config.shared import client_tls_options

BENCH = "Measures servers with OpenAI's API."
COMMAND = "serve: sends load and says how it was answered. `opticnerve bench serve --help`"
SERVE = (
    "Sends chat completions to a running server (OpenAI's API: OpticNerve, vLLM and others), "
    "streamed, and reports how fast and how well they were answered. Several numbers for "
    "--concurrency, --rate or --turns make one run each, one after the other."
)
EPILOG = (
    "Latencies are of answered requests: TTFT to the first text, TPOT per token after it, ITL from "
    "one piece of text to the next, E2E to the end. With --rate they count from the time when "
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
    given["tls"] = {item.name: given.pop(item.name) for item in client_tls_options()}
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
    add_options(made, client_tls_options())
    return made


def _add_server(made: Parser) -> None:
    add = made.add_argument_group("Server").add_argument
    add(
        "url",
        metavar="URL",
        type=argument_type(gateway_url),
        help="such as http://127.0.0.1:8000, with or without /v1",
    )
    add("--model", metavar="NAME", help="model to ask for (default: the first in /v1/models)")
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
        help="a header sent with each request; may be given several times",
    )
    add(
        "--timeout",
        dest="timeout_s",
        metavar="SECONDS",
        type=number_type(float),
        default=600.0,
        help="time after which a request counts as lost (default: 600)",
    )


def _add_pace(made: Parser) -> None:
    add = made.add_argument_group("Pace").add_argument
    add(
        "--concurrency",
        metavar="N,...",
        type=_several(number_type(int, minimum=1)),
        help="number of clients, each of which sends its next request when its last has ended; "
        "with --rate: most requests at once (default: 8; for conversations 1,32)",
    )
    add(
        "--rate",
        metavar="R,...",
        type=_several(argument_type(rate_of)),
        help="requests a second, or conversations that begin, as a Poisson process; sent whether "
        "or not the server keeps up",
    )
    add_shared(add, "--burstiness")


def _add_length(made: Parser) -> None:
    add = made.add_argument_group("Length").add_argument
    add(
        "--requests",
        metavar="N",
        type=number_type(int, minimum=1),
        help="requests of each run (default: 4 x concurrency, at least 32; 1000 with --duration; "
        "one for each line of --prompts)",
    )
    add(
        "--duration",
        dest="duration_s",
        metavar="SECONDS",
        type=number_type(float),
        help="send requests for so long, then wait for those under way",
    )
    add(
        "--ramp",
        dest="ramp_s",
        metavar="SECONDS",
        type=number_type(float),
        default=0.0,
        help="time in which clients start one by one, or the rate rises; not measured (default: 0)",
    )
    add(
        "--warm-up",
        metavar="N",
        type=number_type(int),
        default=2,
        help="requests sent one by one before all runs, not measured; never lines of --prompts "
        "(default: 2)",
    )


def _add_requests(made: Parser) -> None:
    add = made.add_argument_group("Requests").add_argument
    add(
        "--workload",
        choices=WORKLOADS,
        default="chat",
        help="chat: single questions with one picture each; conversation: 3 pictures, 120 tokens a "
        "turn, and each turn sends the whole conversation again (default: chat)",
    )
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='read questions from a file, one JSON object a line: {"prompt": TEXT, "images": [FILE '
        "or URL]}, or the body of a chat completion; starts over at its end",
    )
    add(
        "--output-tokens",
        metavar="N",
        type=number_type(int, minimum=1),
        help="exact length of each answer (default: 64; for conversations 120)",
    )
    add(
        "--fields",
        metavar="JSON",
        type=argument_type(_fields),
        default={},
        help='further fields of each body, such as {"temperature": 1}; null leaves a field out: '
        '{"ignore_eos": null} for servers that refuse it',
    )


def _add_synthetic(made: Parser) -> None:
    add = made.add_argument_group("Synthetic questions").add_argument
    add(
        "--turns",
        metavar="N,...",
        type=_several(number_type(int)),
        help="number of earlier turns of a conversation, each a request too (default: 0,2)",
    )
    add(
        "--words",
        metavar="N",
        type=number_type(int, minimum=1),
        default=32,
        help="words of a question, a token each in most vocabularies (default: 32)",
    )
    add(
        "--seed",
        metavar="N",
        type=number_type(int),
        help="seed of texts, pictures and times; run twice with one seed, they are in the server's "
        "caches (default: random)",
    )


def _add_pictures(made: Parser) -> None:
    add = made.add_argument_group("Synthetic pictures").add_argument
    add_shared(add, "--pictures", default_text="1; in a conversation's first 3")
    add_shared(add, "--picture-sizes")
    add(
        "--picture-format",
        choices=("jpeg", "png"),
        default="jpeg",
        help="format of their files (default: jpeg)",
    )
    add_shared(add, "--repeat")


def _add_results(made: Parser) -> None:
    add = made.add_argument_group("Results").add_argument
    add_shared(add, "--slo")
    add("--json", metavar="FILE", type=Path, help="write every request and figure as JSON")
    add_shared(add, "--plot")


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


# ---- flags that `plan` has too

SHARED: dict[str, dict[str, Any]] = {
    "--burstiness": {
        "metavar": "B",
        "type": number_type(float),
        "default": 1.0,
        "help": "squared coefficient of variation of the time between requests at --rate: 0 is an "
        "even rate, 1 a Poisson process, 4 comes in bunches (default: 1)",
    },
    "--pictures": {
        "metavar": "N",
        "type": argument_type(_pictures),
        "help": "pictures in a request",
    },
    "--picture-sizes": {
        "metavar": "WxH,...",
        "type": argument_type(sizes_of),
        "default": ((448, 448),),
        "help": "sizes in pixels, used in turn (default: 448x448)",
    },
    "--repeat": {
        "metavar": "SHARE",
        "type": argument_type(share_of),
        "default": 0.0,
        "help": "share of pictures that were shown before, from 0 to 1 (default: 0)",
    },
    "--slo": {
        "metavar": "LIMITS",
        "type": argument_type(Slo.parse),
        "help": "limits of a good answer, such as ttft=500ms,tpot=50ms,e2e=5s",
    },
    "--plot": {
        "metavar": "FILE",
        "type": argument_type(plot_path),
        "help": "plot the distributions, as .html, .png or .svg",
    },
}


def add_shared(add: Callable[..., Any], flag: str, *, default_text: str = "", **own: Any) -> None:
    """``default_text``, ``own``: what differs between commands, such as ``default``."""
    given = {**SHARED[flag], **own}
    if default_text:
        given["help"] += f" (default: {default_text})"
    add(flag, **given)
