"""``opticnerve ask``: one question about pictures, the answer streamed to the terminal."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ssl import SSLContext
from typing import Any

from opticnerve.addresses import gateway_url
from opticnerve.cli.chat_client import (
    picture_url,
    print_answer,
    refuse_tls,
    trust_for,
    user_message,
)
from opticnerve.config.command_line import Parser, add_options, argument_type, number_type
from opticnerve.config.shared import client_tls_options
from opticnerve.errors import InvalidRequest, OpticNerveError, StartupError
from opticnerve.local.serve import serve
from opticnerve.media.load import is_url, read_picture
from opticnerve.media.probe import parse_structure

DESCRIPTION = (
    "Asks a question about pictures and streams the answer. With --url a running gateway answers; "
    "without, a stack is started for this one question."
)
EPILOG = 'Example: opticnerve ask photo.jpg "What is in this image?"'


def parser() -> Parser:
    made = Parser("ask", DESCRIPTION, "[PICTURE ...] QUESTION [flags]", EPILOG)
    what = made.add_argument_group("Question")
    what.add_argument("pictures", nargs="*", metavar="PICTURE", help="files or URLs")
    what.add_argument("question", metavar="QUESTION", help="what to ask, in quotes")
    who = made.add_argument_group("Who answers")
    who.add_argument(
        "--url",
        metavar="URL",
        type=argument_type(gateway_url),
        help="a running gateway, such as http://127.0.0.1:8000, with or without /v1; "
        "OPENAI_API_KEY is its key",
    )
    who.add_argument(
        "--model",
        metavar="MODEL",
        help="with --url: the name to ask for (default: model); without: checkpoint directory or "
        "hub id to start (default: the built-in demo checkpoint)",
    )
    answer = made.add_argument_group("Answer")
    answer.add_argument(
        "--max-tokens",
        type=number_type(int, minimum=1),
        metavar="N",
        help="longest answer (default: the model's)",
    )
    answer.add_argument(
        "--temperature",
        type=number_type(float),
        default=0.0,
        metavar="T",
        help="0: the likeliest words; higher: more varied ones (default: 0)",
    )
    answer.add_argument(
        "--timings", action="store_true", help="print the stages' milliseconds after the answer"
    )
    add_options(made, client_tls_options())
    return made


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    body: dict[str, Any] = {
        "model": args.model if args.url and args.model else "model",
        "messages": [_message(args.question, args.pictures)],
        "temperature": args.temperature,
    }
    if args.max_tokens is not None:
        body["max_tokens"] = args.max_tokens
    with _gateway(args) as (url, trust):
        try:
            _, timings = print_answer(url, body, trust)
        except OpticNerveError as error:
            print(f"opticnerve: {error.message}", file=sys.stderr)
            return 1
    if args.timings:
        print(json.dumps(timings, indent=2), file=sys.stderr)
    return 0


@contextmanager
def _gateway(args: argparse.Namespace) -> Iterator[tuple[str, SSLContext | None]]:
    """The URL of the gateway to ask, and the context that verifies its certificate: the one at
    ``--url``, or that of a stack started for this question. Raises ConfigError."""
    if args.url:
        yield args.url, trust_for(args.url, vars(args))
        return
    refuse_tls(vars(args), "a gateway at --url")
    print("starting a stack for this question", file=sys.stderr)
    with serve(args.model) as stack:
        yield stack.url, stack.trust


def _message(question: str, pictures: Sequence[str]) -> dict[str, Any]:
    """The question as a message. Raises StartupError for bad arguments, before a stack is
    started."""
    _check_order(question, pictures)
    return user_message(question, [_read(picture) for picture in pictures])


def _check_order(question: str, pictures: Sequence[str]) -> None:
    """Raises StartupError if the last argument, which should be the question, is a picture."""
    first = pictures[0] if pictures else ""
    swapped = bool(first) and not _is_picture(first) and not os.path.isdir(first)
    if os.path.isdir(question) and (swapped or not first):
        raise StartupError(_no_file(question))
    if not _is_picture(question):
        return
    if swapped:
        ordered = shlex.join([*pictures[1:], question, first])
        raise StartupError(
            f"{first!r} is no file, and {question} is no question, which comes last: "
            f"opticnerve ask {ordered}"
        )
    ordered = shlex.join([*pictures, question, "What is in this image?"])
    raise StartupError(f"there is no question: opticnerve ask {ordered}")


def _no_file(name: str) -> str:
    """Why ``name`` cannot be read as a picture."""
    if os.path.isdir(name):
        return f"{name} is a directory; give the pictures in it"
    hint = "; a URL begins with http:// or https://" if "://" in name else ""
    return f"{name}: no such file{hint}"


def _is_picture(word: str) -> bool:
    return os.path.isfile(word) or (is_url(word) and len(word.split()) == 1)


def _read(picture: str) -> str:
    """The picture's URL; a data: URL for a file. Raises StartupError for a file that is not a
    picture of a supported format. Its size is limited only by the gateway."""
    if is_url(picture):
        return picture
    if os.path.isdir(picture) or not os.path.exists(picture):
        raise StartupError(_no_file(picture))
    try:
        data = read_picture(picture)
        parse_structure(data, sys.maxsize, sys.maxsize)
    except InvalidRequest as error:
        named = error.message if picture in error.message else f"{picture}: {error.message}"
        raise StartupError(named) from error
    return picture_url(data)
