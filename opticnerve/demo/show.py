"""``opticnerve demo``: the whole stack answers questions about bundled pictures.

Starts an encoder, an LLM worker and the gateway on this machine, asks over HTTP, prints each answer
as it is streamed, and ends with a table of the time in each stage. Exit status 0 only if every
answer is right.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any

from opticnerve.addresses import gateway_url
from opticnerve.cli.chat_client import print_answer, trust_for, user_message
from opticnerve.config.command_line import Parser, argument_type
from opticnerve.demo.chats import TURNS, Turn
from opticnerve.errors import OpticNerveError, StartupError
from opticnerve.local.serve import serve

DESCRIPTION = (
    "The built-in checkpoint answers questions about bundled pictures: each answer is streamed as "
    "it comes, and a table shows where the time went. Ends with status 0 if every answer is right."
)
STAGES = ("preprocess", "encode", "put", "get", "prefill", "decode", "ttft", "total")
CACHED = {"no": "encoded", "store": "from store", "ref": "cache hit"}
WIDTH = 78


@dataclass(frozen=True)
class TurnResult:
    """The answer to one turn. ``timings``: milliseconds by stage, as the gateway reports them."""

    turn: Turn
    text: str
    timings: dict[str, Any]

    @property
    def right(self) -> bool:
        return self.text == self.turn.answer

    @property
    def pictures(self) -> str:
        """Where the pictures' embeddings came from."""
        ways = [CACHED[item["cached"]] for item in self.timings["items"]]
        return ", ".join(dict.fromkeys(ways)) or "no picture"


def main(argv: Sequence[str]) -> int:
    parser = Parser("demo", DESCRIPTION, "[flags]")
    parser.add_argument_group("Who answers").add_argument(
        "--url",
        metavar="URL",
        type=argument_type(gateway_url),
        help="a running gateway that serves the demo checkpoint, such as http://127.0.0.1:8000 "
        "(default: a stack is started)",
    )
    args = parser.parse_args(argv)
    try:
        answers = ask_all(args.url, trust_for(args.url)) if args.url else _ask_own_stack()
    except StartupError:
        raise
    except OpticNerveError as error:
        print(f"\nopticnerve: {error.message}", file=sys.stderr)
        return 1
    print(table(answers))
    wrong = sum(not answer.right for answer in answers)
    print(f"\n{len(answers) - wrong} of {len(answers)} answers are right.")
    return 1 if wrong else 0


def _ask_own_stack() -> list[TurnResult]:
    print("Starting one encoder, one LLM worker and the gateway on this machine ...")
    began = time.monotonic()
    with serve() as stack:
        print(f"Ready at {stack.url} after {time.monotonic() - began:.1f} s.\n", flush=True)
        return ask_all(stack.url, stack.trust)


def ask_all(url: str, trust: SSLContext | None) -> list[TurnResult]:
    """Asks every turn in order; a follow-up repeats the chat before it. ``trust``: verifies the
    server's certificate."""
    answers: list[TurnResult] = []
    history: list[dict[str, Any]] = []
    for turn in TURNS:
        history = history if turn.follows else []
        history.append(user_message(turn.question, turn.paths()))
        answers.append(ask(url, trust, turn, history))
        history.append({"role": "assistant", "content": answers[-1].text})
    return answers


def ask(
    url: str, trust: SSLContext | None, turn: Turn, history: list[dict[str, Any]]
) -> TurnResult:
    shown = ", ".join(turn.pictures) or ("the same picture" if turn.follows else "no picture")
    print(f"Q  {turn.question}  [{shown}]\nA  ", end="", flush=True)
    body = {"model": "model", "messages": history, "temperature": 0}
    answer = TurnResult(turn, *print_answer(url, body, trust))
    if not answer.right:
        print(textwrap.fill(f"WRONG; the right answer is: {turn.answer}", WIDTH), file=sys.stderr)
    print(flush=True)
    return answer


def table(answers: Sequence[TurnResult]) -> str:
    """Milliseconds by stage, a line for each question; a dash for a stage that did not occur."""
    head = ["milliseconds", "picture", *STAGES]
    rows = [head]
    for answer in answers:
        values = [answer.timings.get(f"{stage}_ms") for stage in STAGES]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        rows.append([answer.turn.question[:27], answer.pictures, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
