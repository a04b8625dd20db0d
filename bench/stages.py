"""How much of a request's TTFT its stages explain.

    python -m bench.stages [--requests 96] [--save]

Requests with a new picture each, and requests of text, are sent one at a time and 16 at once to a
stack of three processes. The stages before the first token that do not overlap are added up: the
gateway's before and around the call to the LLM worker, and the worker's queue and prefill, which
contain the wait for the picture. Their sum is compared with the TTFT that the gateway measures,
from the accepted request on. ``wire`` is the part of the call that the worker does not account for,
so the share without it is shown too; ``read``, receiving the request, comes before the TTFT begins.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np

import opticnerve
from bench import report
from bench.load import Material

STAGES = (
    "check", "fetch", "plan", "name", "render", "pair", "prepare", "worker_wait", "wire",
    "queue", "prefill",
)  # fmt: skip
AT_ONCE = (1, 16)
TIMEOUT_S = 600.0
MAX_TOKENS = 16
FOUND = ("explained_p50", "explained_p5", "without_wire_p50")
HEADER = ("requests", "at once", "TTFT, ms", "explained, p50", "p5", "without wire, p50")


def body(seed: int, *, picture: bool) -> bytes:
    """A request that is unlike any other."""
    material = Material(seed, side=224)
    text: dict[str, Any] = {"type": "text", "text": material.text()}
    parts = [{"type": "image_url", "image_url": {"url": material.picture()}}, text]
    return json.dumps(
        {
            "model": "model",
            "messages": [{"role": "user", "content": parts if picture else [text]}],
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "timings": True,
        }
    ).encode()


async def measure(url: str, bodies: Sequence[bytes], clients: int) -> list[dict[str, float]]:
    """The timings of each answer."""

    async def client(http: httpx2.AsyncClient, mine: Sequence[bytes]) -> list[dict[str, float]]:
        answers = [await http.post("/v1/chat/completions", content=each) for each in mine]
        return [answer.raise_for_status().json()["timings"] for answer in answers]

    headers = {"content-type": "application/json"}
    async with httpx2.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, trust_env=False, headers=headers
    ) as http:
        parts = [client(http, bodies[index::clients]) for index in range(clients)]
        return [one for part in await asyncio.gather(*parts) for one in part]


def shares(timings: Sequence[dict[str, float]], stages: Sequence[str]) -> list[float]:
    """The share of each TTFT that ``stages`` explain."""
    return [
        sum(one.get(f"{stage}_ms", 0.0) for stage in stages) / one["ttft_ms"] for one in timings
    ]


def figures(timings: Sequence[dict[str, float]]) -> dict[str, float]:
    explained = shares(timings, STAGES)
    without_wire = shares(timings, [stage for stage in STAGES if stage != "wire"])
    medians = {
        f"{stage}_ms": float(np.median([one.get(f"{stage}_ms", 0.0) for one in timings]))
        for stage in STAGES
    }
    return {
        "ttft_ms": float(np.median([one["ttft_ms"] for one in timings])),
        "explained_p50": float(np.percentile(explained, 50)),
        "explained_p5": float(np.percentile(explained, 5)),
        "without_wire_p50": float(np.percentile(without_wire, 50)),
        **{name: round(ms, 3) for name, ms in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a first token waits for.")
    parser.add_argument("--requests", type=int, default=96, help="for each kind and concurrency")
    parser.add_argument("--save", action="store_true", help="write bench/results/stages.json")
    given = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    rows = []
    with opticnerve.serve() as stack:
        for run, (kind, clients) in enumerate(
            (kind, clients) for kind in ("text", "picture") for clients in AT_ONCE
        ):
            seeds = range(10_000 * run, 10_000 * run + given.requests)
            bodies = [body(seed, picture=kind == "picture") for seed in seeds]
            asyncio.run(measure(stack.url, bodies[:2], 1))  # Warms up.
            found = figures(asyncio.run(measure(stack.url, bodies[2:], clients)))
            results[f"{kind}, {clients} at once"] = found
            percents = (f"{found[name]:.1%}" for name in FOUND)
            rows.append((kind, clients, f"{found['ttft_ms']:.1f}", *percents))
    print(report.table(HEADER, rows))
    if given.save:
        print(f"written: {report.save('stages', {'runs': results})}")


if __name__ == "__main__":
    main()
