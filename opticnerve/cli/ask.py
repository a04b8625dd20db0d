"""``opticnerve ask``: one question about pictures, the answer streamed to the terminal."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2

from opticnerve.cli.stack import error_of, is_url, picture_url, serve, user_message
from opticnerve.errors import (
    InvalidRequest,
    OpticNerveError,
    StartupError,
    Unavailable,
    from_openai,
)
from opticnerve.flags import Parser, number, typed
from opticnerve.media.pictures import read_picture
from opticnerve.media.structure import parse_structure

DESCRIPTION = (
    "Asks a question about pictures and streams the answer. With --url a running gateway answers; "
    "without, a stack is started for this one question."
)
EPILOG = 'Example: opticnerve ask photo.jpg "What is in this image?"'
NO_GATEWAY = "what answers at this URL is no gateway; check --url"


def parser() -> Parser:
    made = Parser("ask", DESCRIPTION, "[PICTURE ...] QUESTION [flags]", EPILOG)
    what = made.add_argument_group("Question")
    what.add_argument("pictures", nargs="*", metavar="PICTURE", help="files or URLs")
    what.add_argument("question", metavar="QUESTION", help="what to ask, in quotes")
    who = made.add_argument_group("Who answers")
    who.add_argument(
        "--url",
        metavar="URL",
        type=typed(gateway_url),
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
        type=number(int, least=1),
        metavar="N",
        help="longest answer (default: the model's)",
    )
    answer.add_argument(
        "--temperature",
        type=number(float),
        default=0.0,
        metavar="T",
        help="0: the likeliest words; higher: more varied ones (default: 0)",
    )
    answer.add_argument(
        "--timings", action="store_true", help="print the stages' milliseconds after the answer"
    )
    return made


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    body: dict[str, Any] = {
        "model": args.model if args.url and args.model else "model",
        "messages": [_message(args.question, args.pictures)],
        "temperature": args.temperature,
        "timings": True,
    }
    if args.max_tokens is not None:
        body["max_tokens"] = args.max_tokens
    with _gateway(args.url, args.model) as url:
        try:
            timings = _print_answer(url, body)
        except OpticNerveError as error:
            print(f"opticnerve: {error.message}", file=sys.stderr)
            return 1
    if args.timings:
        print(json.dumps(timings, indent=2), file=sys.stderr)
    return 0


def gateway_url(text: str) -> str:
    """The address that routes are appended to, of a URL as users have it at hand: a host and a
    port alone, or with what OpenAI's clients are given behind it, ``/v1``, or a whole route.
    Raises ValueError."""
    wrong = f"{text!r} is no address such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        _ = parts.port  # Parsed when it is asked for.
    except ValueError as error:
        raise ValueError(wrong) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(wrong)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path.rstrip('/')}"


@contextmanager
def _gateway(url: str | None, model: str | None) -> Iterator[str]:
    """The gateway to ask: the one at ``url``, or one of a stack started for this question."""
    if url:
        yield url
        return
    print("starting a stack for this question", file=sys.stderr)
    with serve(model) as stack:
        yield stack.url


def _message(question: str, pictures: Sequence[str]) -> dict[str, Any]:
    """Everything that can be wrong with the question is told here, before a stack is started.
    Raises StartupError."""
    _check_order(question, pictures)
    return user_message(question, [_read(picture) for picture in pictures])


def _check_order(question: str, pictures: Sequence[str]) -> None:
    """Raises StartupError for a picture where the question is to stand."""
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
    """Why a name is none of a picture."""
    if os.path.isdir(name):
        return f"{name} is a directory; give the pictures in it"
    hint = "; a URL begins with http:// or https://" if "://" in name else ""
    return f"{name}: no such file{hint}"


def _is_picture(word: str) -> bool:
    return os.path.isfile(word) or (is_url(word) and len(word.split()) == 1)


def _read(picture: str) -> str:
    """The picture's URL; a file as a data: URL, if it is a picture of a format that is served.
    How large it may be is the gateway's to say."""
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


def _print_answer(url: str, body: dict[str, Any]) -> dict[str, Any]:
    timings: dict[str, Any] = {}
    for chunk in stream_chat(url, body):
        timings = chunk.get("timings") or timings
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
    print()
    return timings


def stream_chat(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of one streamed chat completion. Raises the typed error of the answer."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with (
            httpx2.Client(timeout=600.0, trust_env=False) as client,
            client.stream(
                "POST",
                f"{url}/v1/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {key}"},
            ) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise error_of(answer)
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise OpticNerveError(NO_GATEWAY)
            yield from _events(answer.iter_lines())
    except httpx2.ConnectError as error:
        raise Unavailable(
            f"nothing answers at {url} ({error}); check --url, or start a gateway: opticnerve up"
        ) from error
    except httpx2.HTTPError as error:
        why = str(error) or type(error).__name__
        raise OpticNerveError(f"no answer from {url}: {why}") from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise OpticNerveError(NO_GATEWAY) from error
        if isinstance(event, dict) and "error" in event:
            raise from_openai(event)
        if not isinstance(event, dict) or not isinstance(event.get("choices"), list):
            raise OpticNerveError(NO_GATEWAY)
        yield event
    raise OpticNerveError("the answer ended early, without [DONE]")
