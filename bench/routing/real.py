"""Conversations that send their pictures again, over HTTP, on the demo checkpoint's processes.

One encoder and two LLM workers run all the time, one thread each. A gateway is started for each
policy; the conversations are the same, with a cache salt for each policy, so that none uses what
another one cached. ``least loaded`` is the gateway without its knowledge of prompts; ``one worker``
uses only one of the workers, with the same cache, and shows the most that a cache gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2

from bench.load import Material
from opticnerve.owned_directories import create_tier_directory, remove_tier
from tests.services import process
from tests.system import wait_for

KV_TOKENS = "65536"
CONVERSATIONS, AT_ONCE = 12, 3
SYSTEM_WORDS, MORE_TURNS, PICTURE_SIDE, ANSWER_TOKENS = 60, 3, 336, 8
START_S = 300.0
WITHOUT_AFFINITY = (
    "import sys; from gateway import service; from gateway.workers import generate;"
    "generate.PromptChain.of = staticmethod(lambda *args, **flags: None); sys.exit(service.main())"
)
WITH_AFFINITY = "import sys; from gateway import service; sys.exit(service.main())"
HEADER = ("policy", "requests", "prompt tokens", "cached %", "load, requests", "TTFT p50 ms")


def play(seed: int) -> dict[str, dict[str, Any]]:
    """Figures by policy, in the order of HEADER."""
    tier = create_tier_directory()
    store = ["--store", f"shm://{tier}"]
    llm = [*store, "--kv-cache-tokens", KV_TOKENS]
    try:
        with (
            process("encoder_service", *store) as encoder,
            process("llm_service", *llm) as one,
            process("llm_service", *llm) as other,
        ):
            both = [one.address, other.address]
            found = {}
            for name, code, llms in (
                ("affine", WITH_AFFINITY, both),
                ("least loaded", WITHOUT_AFFINITY, both),
                ("one worker", WITH_AFFINITY, both[:1]),
            ):
                with gateway(code, encoder.address, llms) as (url, told):
                    answers = asyncio.run(converse(url, seed, name))
                found[name] = figures(answers, told[0], llms)
            return found
    finally:
        remove_tier(tier)


@contextlib.contextmanager
def gateway(code: str, encoder: str, llms: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A gateway's URL, and a list to which its log is added once it has ended."""
    told: list[str] = []
    flags = ["--port", "0", "--encoder-addresses", encoder, "--llm-addresses", ",".join(llms)]
    flags += ["--log-format", "json", "--metrics-port", "-1"]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, "-c", code, *flags],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ,
            )
        try:
            assert child.stdout is not None
            url = child.stdout.readline().split()[1]
            wait_for("the gateway", functools.partial(is_ready, url), START_S)
            yield url, told
        finally:
            child.terminate()
            child.wait(START_S)
            told.append(log.read_text())


def is_ready(url: str) -> bool:
    return httpx2.get(f"{url}/ready?pictures=true").status_code == 200


async def converse(url: str, seed: int, salt: str) -> list[tuple[dict[str, Any], float]]:
    """Usage and TTFT in milliseconds of every turn."""
    material = Material(seed, PICTURE_SIDE)
    system = {"role": "system", "content": Material(0).text(SYSTEM_WORDS)}
    chance, answers = random.Random(seed), []
    places = asyncio.Semaphore(AT_ONCE)

    async def one(http: httpx2.AsyncClient, turns: int) -> None:
        pictures = [
            {"type": "image_url", "image_url": {"url": material.picture()}} for _ in range(3)
        ]
        text = {"type": "text", "text": material.text()}
        messages = [system, {"role": "user", "content": [*pictures, text]}]
        async with places:
            for _ in range(turns):
                body = {"model": "model", "messages": messages, "max_tokens": ANSWER_TOKENS}
                answer = await http.post(
                    f"{url}/v1/chat/completions",
                    json={**body, "temperature": 0, "timings": True, "cache_salt": salt},
                    timeout=START_S,
                )
                told = answer.raise_for_status().json()
                answers.append((told["usage"], told["timings"]["ttft_ms"]))
                messages.append(told["choices"][0]["message"])
                messages.append({"role": "user", "content": material.text()})

    async with httpx2.AsyncClient() as http, asyncio.TaskGroup() as group:
        for _ in range(CONVERSATIONS):
            group.create_task(one(http, chance.randint(1, 1 + MORE_TURNS)))
    return answers


def figures(
    answers: Sequence[tuple[dict[str, Any], float]], log: str, llms: Sequence[str]
) -> dict[str, Any]:
    served: Counter[str] = Counter()
    for line in log.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            served.update(json.loads(line).get("llm", ()))
    prompt = sum(usage["prompt_tokens"] for usage, _ in answers)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage, _ in answers)
    load = max(served.values()) / (sum(served.values()) / len(llms))
    return {
        "requests": len(answers),
        "prompt_tokens": prompt,
        "cached_percent": round(100 * cached / prompt, 1),
        "requests_max_over_mean": round(load, 2),
        "ttft_p50_ms": round(statistics.median(ttft for _, ttft in answers)),
    }
