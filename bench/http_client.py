"""Load on ``/v1/chat/completions`` from a benchmark, by the client of ``opticnerve bench serve``.

``drive`` runs several clients at once on an event loop; ``figures`` turns their answers into the
figures of a table. Times are seconds of ``time.perf_counter``; figures name their own units.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.connection import LoadTarget
from opticnerve.benchmark.figures import percentile

Figures = dict[str, float]


def encode(messages: list[dict[str, Any]], max_tokens: int) -> bytes:
    """The body of a streamed, greedy request for exactly ``max_tokens`` tokens."""
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


async def drive(
    target: LoadTarget,
    bodies: Sequence[bytes],
    clients: int,
    *,
    stagger_s: float = 0.0,
    say: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answers of ``clients`` clients, in the order in which they ended.

    Request i is sent by client i modulo ``clients``. A client sends its next request when its last
    has ended, and its first ``stagger_s`` after that of the client before it. ``say`` is called
    with the number of requests that have ended.
    """
    answers: list[Answer] = []

    async def client(index: int) -> None:
        await asyncio.sleep(index * stagger_s)
        for body in bodies[index::clients]:
            answers.append(await target.ask(body))
            say(len(answers))

    async with asyncio.TaskGroup() as group:
        for index in range(clients):
            group.create_task(client(index))
    return answers


def figures(answers: Sequence[Answer]) -> Figures:
    """Outcomes, rates and latencies of some requests; percentiles if there is anything to rank."""
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
    """The number of requests without an answer, by status and code."""
    kinds = Counter(f"{a.status} {a.code}" for a in answers if a.outcome != "answered")
    return {f"of these {kind.strip()}": float(count) for kind, count in sorted(kinds.items())}


def spread(name: str, seconds: Sequence[float]) -> Figures:
    """Median and 99th percentile in milliseconds; empty without values."""
    if not seconds:
        return {}
    return {f"{name} p{rank}, ms": percentile(seconds, rank) * 1000 for rank in (50, 99)}


def order(answers: Iterable[Answer]) -> Figures:
    """How closely the order in which requests ended follows that in which they were sent.

    The rank correlation (Spearman's: 1 for the same order, 0 for none, -1 for the reverse), and the
    most places that a request fell behind.
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
    """The median of each figure. A count of refusals that a run lacks is 0 in that run."""
    names = dict.fromkeys(name for found in runs for name in found)
    return {
        name: statistics.median(
            found.get(name, 0.0) for found in runs if name in found or name.startswith("of these")
        )
        for name in names
    }
