"""``opticnerve batch``: the requests of a file, answered into another, in OpenAI's batch format."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from tqdm import tqdm

from opticnerve.addresses import gateway_url
from opticnerve.cli.batch_files import (
    AnswerFile,
    BatchRequest,
    answer_line,
    check_requests,
    has_failed,
    read_requests,
)
from opticnerve.cli.chat_client import error_of, trust_for
from opticnerve.config.command_line import Parser, add_options, argument_type, number_type
from opticnerve.config.shared import client_tls_options
from opticnerve.config.up import up_options
from opticnerve.errors import StartupError
from opticnerve.local.serve import serve

DESCRIPTION = (
    "Answers the requests of IN, a file in OpenAI's batch format, into OUT. With --url a running "
    "server answers; without, `up` is started for the batch, with MODEL and its flags. A batch "
    "that was stopped, or killed, goes on where it was when the same command is given again."
)
EPILOG = (
    "A line of IN: "
    '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}. '
    "The answers are in the order in which they come; custom_id tells which is which. Exit status: "
    "0 if every request has an answer, 1 if some failed or the server was lost, 2 if it could not "
    "begin, or its files could not be read or written."
)
RETRIED = frozenset({408, 429, 502, 503})  # Statuses after which another attempt may succeed.
REFUSING = frozenset({401, 403})  # Statuses with which all requests would be refused.
MAX_BACKOFF_S = 10.0
CONNECT_TIMEOUT_S = 10.0
MAX_SHOWN = 200  # Characters that are quoted of an answer that is not JSON.


def parser() -> Parser:
    made = Parser("batch", DESCRIPTION, "IN OUT [MODEL] [flags]", EPILOG)
    files = made.add_argument_group("Files")
    files.add_argument("requests", metavar="IN", type=Path, help="requests, one a line")
    files.add_argument("answers", metavar="OUT", type=Path, help="file that answers are added to")
    files.add_argument(
        "--errors",
        metavar="FILE",
        type=Path,
        help="file for the answers of requests that failed; delete it to ask them again "
        "(default: OUT)",
    )
    who = made.add_argument_group("Who answers")
    who.add_argument(
        "--url",
        metavar="URL",
        type=argument_type(gateway_url),
        help="a running server, such as http://127.0.0.1:8000, with or without /v1; at https:// "
        "its certificate is checked by --tls-ca for --tls-server-name (default: by the system's "
        "authorities for its host), and shown --tls-certificate",
    )
    who.add_argument(
        "--api-key",
        metavar="KEY",
        help="the server's key (default: OPENAI_API_KEY, which other users do not see in `ps`)",
    )
    _add_pace(made)
    add_options(made, up_options())
    return made


def _add_pace(made: Parser) -> None:
    how = made.add_argument_group("Pace")
    how.add_argument(
        "--concurrency",
        metavar="N",
        type=number_type(int, minimum=1),
        default=32,
        help="requests at once (default: 32)",
    )
    how.add_argument(
        "--retry-s",
        metavar="SECONDS",
        type=number_type(float),
        default=600.0,
        help="how long a request is sent again while the server is busy or away; then it has "
        "failed if the server answers others, and else the batch stops (default: 600)",
    )
    how.add_argument(
        "--answer-timeout-s",
        metavar="SECONDS",
        type=number_type(float, minimum=1),
        default=900.0,
        help="silence after which a connection counts as lost (default: 900)",
    )


def main(argv: Sequence[str]) -> int:
    given = vars(parser().parse_args(argv))
    flags = {item.name: given.pop(item.name) for item in up_options()}
    settings = BatchSettings(**given)
    tls = {item.name for item in client_tls_options()}
    chosen = sorted(flags.keys() - tls - {name for name, value in flags.items() if value is None})
    if settings.url and chosen:
        shown = "MODEL" if "model" in chosen else "--" + chosen[0].replace("_", "-")
        raise StartupError(f"{shown} is for a server that is started here; leave it or --url out")
    with contextlib.ExitStack() as exits:
        work = exits.enter_context(open_work(settings))
        if work.left:
            if settings.url is None:
                print("starting a server for this batch", file=sys.stderr)
                stack = exits.enter_context(serve(**flags))
                url, trust = stack.url, stack.trust
            else:
                url, trust = settings.url, trust_for(settings.url, flags)
            try:
                asyncio.run(run(work, url, trust))
            except KeyboardInterrupt:
                work.stopped = "interrupted"
                work.report()
                raise
        return work.report()


@dataclass(frozen=True)
class BatchSettings:
    """The command's own arguments."""

    requests: Path
    answers: Path
    errors: Path | None
    url: str | None
    api_key: str | None
    concurrency: int
    retry_s: float
    answer_timeout_s: float

    @property
    def key(self) -> str:
        return self.api_key or os.environ.get("OPENAI_API_KEY") or "none"


# ---- what is to be done


@dataclass
class BatchWork:
    """A batch: its files, and which of its requests are answered. ``stopped``: why it ends early;
    running the command again asks the rest. ``answered_at``: when the server last answered.
    ``doubted``: a request lost since then; either it failed by itself, or the server is lost."""

    settings: BatchSettings
    answers: AnswerFile
    errors: AnswerFile
    total: int
    answered: set[bytes] = field(default_factory=set)
    failed: int = 0
    stopped: str = ""
    answered_at: float = -math.inf  # In time.monotonic().
    doubted: RequestLost | None = None

    @property
    def left(self) -> int:
        return self.total - len(self.answered)

    def todo(self) -> Iterator[BatchRequest]:
        """The requests that have no answer yet."""
        for request in read_requests(self.settings.requests):
            if request.digest not in self.answered:
                yield request

    def answer(self, request: BatchRequest, answer: Mapping[str, Any]) -> None:
        """Adds the server's answer, which proves that a doubted request failed by itself."""
        self.answered_at = time.monotonic()
        if self.doubted is not None:
            self._add(self.doubted.request, self.doubted.line)
            self.doubted = None
        self._add(request, answer)

    def lose(self, lost: RequestLost) -> None:
        """Records a request that was not answered. If the server answered others meanwhile, the
        request has failed; otherwise the next request tells whether it or the server is lost.
        Raises ServerLost."""
        if self.answered_at >= lost.since:
            self._add(lost.request, lost.line)
        elif self.doubted is None:
            self.doubted = lost
        else:
            raise ServerLost(str(lost))

    def _add(self, request: BatchRequest, answer: Mapping[str, Any]) -> None:
        failed = has_failed(answer)
        (self.errors if failed else self.answers).append(answer)
        self.answered.add(request.digest)
        self.failed += failed

    def report(self) -> int:
        """Prints how the batch ended; returns the exit status."""
        if self.stopped:
            print(
                f"opticnerve: {self.stopped}; {self.left} of {self.total} requests are left: give "
                "the same command again",
                file=sys.stderr,
            )
            return 1
        where = f", see {self.errors.path}" if self.failed else ""
        shown = f"{self.total} requests: {self.total - self.failed} answered, {self.failed} failed"
        print(shown + where, file=sys.stderr)
        return 1 if self.failed else 0


@contextlib.contextmanager
def open_work(settings: BatchSettings) -> Iterator[BatchWork]:
    """Checks the batch, and opens its files. Raises StartupError."""
    named = [settings.requests, settings.answers, *filter(None, [settings.errors])]
    if len({path.resolve() for path in named}) < len(named):
        raise StartupError("IN, OUT and --errors are different files")
    numbers = check_requests(settings.requests)
    with contextlib.ExitStack() as files:
        answers = files.enter_context(AnswerFile(settings.answers))
        errors = answers
        if settings.errors is not None:
            errors = files.enter_context(AnswerFile(settings.errors))
        work = BatchWork(settings, answers, errors, len(numbers))
        for file in {answers, errors}:
            for digest, failed in file.recover(numbers):
                if digest in work.answered:
                    line = numbers[digest]
                    raise StartupError(f"{file.path} answers the request of line {line} twice")
                work.answered.add(digest)
                work.failed += failed
        yield work


# ---- doing it


async def run(work: BatchWork, url: str, trust: ssl.SSLContext | None = None) -> None:
    """Asks the remaining requests. ``trust``: verifies the server's certificate. Raises
    StartupError if the server does not answer or refuses the key; if it is lost later,
    ``work.stopped`` says so."""
    settings = work.settings
    async with httpx2.AsyncClient(
        base_url=url,
        verify=trust or True,
        headers={"authorization": f"Bearer {settings.key}", "content-type": "application/json"},
        timeout=httpx2.Timeout(settings.answer_timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=None),
        trust_env=False,
    ) as http:
        await _greet(http, url)
        todo = work.todo()
        with tqdm(
            total=work.total, initial=len(work.answered), unit="request", disable=None
        ) as bar:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(settings.concurrency, work.left)):
                        group.create_task(_answer_all(http, work, todo, bar))
                if work.doubted is not None:
                    work.stopped = str(work.doubted)
            except* ServerLost as lost:
                work.stopped = str(lost.exceptions[0])
            except* StartupError as errors:
                raise errors.exceptions[0] from None


class ServerLost(Exception):
    """The server has not answered for as long as requests are retried, or refuses the key."""


class RequestLost(Exception):
    """A request was not answered for as long as it was retried. ``since``: when it was first sent.
    ``line``: its line of the output, used unless the server is lost."""

    def __init__(self, request: BatchRequest, since: float, line: Mapping[str, Any], why: str):
        super().__init__(why)
        self.request, self.since, self.line = request, since, line


async def _greet(http: httpx2.AsyncClient, url: str) -> None:
    """Raises StartupError unless a server answers and accepts the key."""
    try:
        answer = await http.get("/v1/models")
    except (httpx2.RequestError, ssl.SSLError) as error:
        raise StartupError(f"nothing answers at {url} ({_why(error)}); check --url") from error
    if answer.status_code in REFUSING:
        raise StartupError(f"{url}: {error_of(answer).message}; see --api-key")


async def _answer_all(
    http: httpx2.AsyncClient, work: BatchWork, todo: Iterator[BatchRequest], bar: tqdm[Any]
) -> None:
    """Answers requests from ``todo``, which is shared with other tasks, until none are left."""
    for request in todo:
        try:
            work.answer(request, await _answer(http, request, work.settings.retry_s))
        except RequestLost as lost:
            work.lose(lost)
        bar.set_postfix(failed=work.failed, refresh=False)
        bar.update(len(work.answered) - bar.n)


async def _answer(
    http: httpx2.AsyncClient, request: BatchRequest, retry_s: float
) -> Mapping[str, Any]:
    """The output line for ``request``. Retries while the server is busy or away, up to ``retry_s``
    after the first such attempt. Raises RequestLost if there is still no answer, and ServerLost if
    the key is refused."""
    body = json.dumps(request.body, separators=(",", ":")).encode()
    since, deadline, attempt = time.monotonic(), None, 0
    while True:
        answer, why = None, ""
        try:
            answer = await http.post(request.url, content=body)
        except httpx2.RequestError as error:
            why = _why(error)
        else:
            if answer.status_code in REFUSING:
                raise ServerLost(error_of(answer).message)
            if answer.status_code not in RETRIED:
                return _line(request, answer)
            why = f"{answer.status_code}: {error_of(answer).message}"
        now = time.monotonic()
        deadline = now + retry_s if deadline is None else deadline
        if now >= deadline:
            why = f"no answer from the server for {retry_s:g} s ({why})"
            raise RequestLost(request, since, _lost_line(request, answer, why), why)
        await asyncio.sleep(min(_delay_s(answer, attempt), deadline - now))
        attempt += 1


def _delay_s(answer: httpx2.Response | None, attempt: int) -> float:
    """Seconds until the next attempt: as the server asks, or doubled each time, with jitter so that
    requests that failed together are not retried together."""
    after = error_of(answer).retry_after_s if answer is not None else None
    backoff = min(MAX_BACKOFF_S, 0.25 * 2.0 ** min(attempt, 10))
    return (backoff if after is None else after) * random.uniform(1.0, 1.25)


def _line(request: BatchRequest, answer: httpx2.Response) -> Mapping[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        message = f"the answer, of status {answer.status_code}, is no JSON: "
        error = {"code": "invalid_answer", "message": message + answer.text[:MAX_SHOWN]}
        return answer_line(request.custom_id, None, error)
    return answer_line(
        request.custom_id,
        {
            "status_code": answer.status_code,
            "request_id": answer.headers.get("x-request-id", ""),
            "body": body,
        },
    )


def _lost_line(
    request: BatchRequest, answer: httpx2.Response | None, why: str
) -> Mapping[str, Any]:
    """The line of a request that was not answered: the server's last refusal, if it has one."""
    if answer is not None:
        return _line(request, answer)
    return answer_line(request.custom_id, None, {"code": "connection_lost", "message": why})


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
