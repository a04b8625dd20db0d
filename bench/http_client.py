"""Load on ``/v1/chat/completions`` from a benchmark, by the client of ``opticnerve bench serve``.

``drive`` plays so many clients at once over an event loop; ``figures`` makes of their answers what
a table shows. Times are seconds of ``time.perf_counter``; figures name their own units.
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


async def drive(
    target: LoadTarget,
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
            answers.append(await target.ask(body))
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
