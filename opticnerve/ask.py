"""``opticnerve ask``: one question about pictures, the answer streamed to the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from opticnerve.errors import OpticNerveError, StartupError, from_openai
from opticnerve.flags import Parser, number
from opticnerve.stack import error_of, picture_url, serve, user_message

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
        help="a running gateway, such as http://127.0.0.1:8000; OPENAI_API_KEY is its key",
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
    for picture in pictures:
        if ":" not in picture and not Path(picture).is_file():
            raise StartupError(f"{picture}: no such file")
    return user_message(question, [picture_url(picture) for picture in pictures])


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
                f"{url.rstrip('/')}/v1/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {key}"},
            ) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise error_of(answer)
            yield from _events(answer.iter_lines())
    except httpx2.HTTPError as error:
        raise OpticNerveError(f"no answer from {url}: {error}") from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise from_openai(event)
        yield event
    raise OpticNerveError("the answer ended early, without [DONE]")
