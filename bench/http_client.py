"""A client of ``/v1/chat/completions`` that keeps when each piece of a streamed answer came.

``drive`` plays so many clients at once over an event loop; ``figures`` makes of their answers what
a table shows. Times are seconds of ``time.perf_counter``; figures name their own units.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

PATH = "/v1/chat/completions"
TIMEOUT_S = 1200.0  # Longer than any deadline of the server: it is the server that gives up.

Figures = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it."""

    sent: float
    ended: float
    status: int = 0  # Of HTTP; 0: no answer came.
    code: str = ""  # Of the error in the body or in the stream, or the transport's own; "": none.
    times: tuple[float, ...] = ()  # When each chunk with text came.
    prompt_tokens: int = 0
    output_tokens: int = 0
    done: bool = False  # The stream came to its own end, [DONE].

    @property
    def outcome(self) -> str:
        """``answered``; ``refused`` by a typed error; or ``lost``: neither, an end without one."""
        if self.status == 200 and self.done and not self.code:
            return "answered"
        return "refused" if self.code and (self.done or self.status not in (0, 200)) else "lost"

    @property
    def ttft(self) -> float | None:
        """Seconds from sending the request to its first text."""
        return self.times[0] - self.sent if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk with text and the next: inter-token latencies."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Stream:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.code = ""
        self.usage: dict[str, Any] = {}
        self.done = False

    def line(self, line: str, now: float) -> None:
        """One line of the event stream, which came at ``now``."""
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                self.code = error_code(event)
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                self.times.append(now)
            self.usage = event.get("usage") or self.usage


def error_code(body: Any) -> str:
    """The code of an error in OpenAI's form, or its type; ``unknown`` in any other body."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    return str(error.get("code") or error.get("type") or "unknown")


def _body_code(body: bytes) -> str:
    try:
        return error_code(json.loads(body))
    except ValueError:
        return "unknown"


@contextlib.asynccontextmanager
async def open_client(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the server at ``url``, with as many connections as are asked for."""
    async with httpx2.AsyncClient(
        base_url=url,
        timeout=TIMEOUT_S,
        trust_env=False,
        headers={"content-type": "application/json"},
        limits=httpx2.Limits(max_connections=None),
    ) as http:
        yield http


def encode(messages: list[dict[str, Any]], max_tokens: int) -> bytes:
    """The body of a streamed request for exactly so many tokens, the likeliest ones."""
    return json.dumps(
        {
            "model": "model",
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def ask(http: httpx2.AsyncClient, body: bytes) -> Answer:
    """Sends one request and reads its stream to the end. Errors are part of the answer."""
    stream, status, code = Stream(), 0, ""
    sent = time.perf_counter()
    try:
        async with http.stream("POST", PATH, content=body) as response:
            status = response.status_code
            if status == 200:
                async for line in response.aiter_lines():
                    stream.line(line, time.perf_counter())
            else:
                code = _body_code(await response.aread())
    except httpx2.HTTPError as error:
        status, code = 0, type(error).__name__
    return Answer(
        sent,
        time.perf_counter(),
        status,
        code or stream.code,
        tuple(stream.times),
        stream.usage.get("prompt_tokens", 0),
        stream.usage.get("completion_tokens", 0),
        stream.done,
    )


async def drive(
    http: httpx2.AsyncClient,
    bodies: Sequence[bytes],
    clients: int,
    *,
    stagger_s: float = 0.0,
    say: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answers in the order of their ends, from so many clients at once.

    Request i is of client i modulo ``clients``; a client sends its next request when its last has
    ended, its first ``stagger_s`` after that of the client before it. ``say`` hears how many
    requests have ended.
    """
    answers: list[Answer] = []

    async def client(index: int) -> None:
        await asyncio.sleep(index * stagger_s)
        for body in bodies[index::clients]:
            answers.append(await ask(http, body))
            say(len(answers))

    async with asyncio.TaskGroup() as group:
        for index in range(clients):
            group.create_task(client(index))
    return answers


def figures(answers: Sequence[Answer]) -> Figures:
    """What came of some requests, and how fast; percentiles where there is anything to rank."""
    outcomes = Counter(answer.outcome for answer in answers)
    answered = [answer for answer in answers if answer.outcome == "answered"]
    seconds = max(a.ended for a in answers) - min(a.sent for a in answers)
    ttfts = [answer.ttft for answer in answered if answer.ttft is not None]
    gaps = [gap for answer in answered for gap in answer.gaps]
    return {
        "requests": len(answers),
        "answered": outcomes["answered"],
        "refused": outcomes["refused"],
        **refusals(answers),
        "lost": outcomes["lost"],
        "prompt tokens, mean": sum(a.prompt_tokens for a in answered) / max(1, len(answered)),
        "time, s": seconds,
        "requests/s": len(answered) / seconds,
        "output tokens/s": sum(answer.output_tokens for answer in answered) / seconds,
        **spread("TTFT", ttfts),
        **spread("ITL", gaps),
    }


def refusals(answers: Iterable[Answer]) -> Figures:
    """How many requests ended with each status and code that is no answer."""
    kinds = Counter(f"{a.status} {a.code}" for a in answers if a.outcome != "answered")
    return {f"of these {kind.strip()}": float(count) for kind, count in sorted(kinds.items())}


def spread(name: str, seconds: Sequence[float]) -> Figures:
    """Median and 99th percentile in milliseconds; nothing of nothing."""
    if not seconds:
        return {}
    return {f"{name} p{rank}, ms": percentile(seconds, rank) * 1000 for rank in (50, 99)}


def percentile(values: Sequence[float], rank: float) -> float:
    """Between the two nearest values, linearly."""
    return float(np.percentile(values, rank))


def order(answers: Iterable[Answer]) -> Figures:
    """How far the order in which requests ended is that in which they were sent.

    The rank correlation (Spearman's: 1 the same order, 0 none, -1 the reverse), and the longest
    overtaking: how many places the unluckiest request fell behind.
    """
    sent = sorted(answers, key=lambda answer: answer.sent)
    if len(sent) < 2:
        return {}
    ended = sorted(range(len(sent)), key=lambda index: sent[index].ended)
    behind = [place - index for place, index in enumerate(ended)]
    squares, count = sum(places**2 for places in behind), len(sent)
    return {
        "order, rank correlation": 1 - 6 * squares / (count * (count**2 - 1)),
        "order, places lost at most": float(max(behind)),
    }


def medians(runs: Sequence[Figures]) -> Figures:
    """Of each figure; one that some runs lack (so many refused with some code) is 0 in those."""
    names = dict.fromkeys(name for found in runs for name in found)
    return {
        name: statistics.median(
            found.get(name, 0.0) for found in runs if name in found or name.startswith("of these")
        )
        for name in names
    }
