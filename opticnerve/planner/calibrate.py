"""Measures the rates of a running stack in a short run: from its timings and limits, and a client's
clock."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import numpy as np

from opticnerve.benchmark.answer import Answer
from opticnerve.benchmark.connection import LoadTarget
from opticnerve.benchmark.pictures import Album, Size
from opticnerve.benchmark.workload import (
    ANSWER_FIELDS,
    Dialogue,
    Shape,
    body_fields,
    dialogues,
)
from opticnerve.cli.chat_client import trust_for
from opticnerve.errors import StartupError
from opticnerve.planner.rates import PictureCost, Rates

ROUNDS = 8  # Requests of each kind; medians count.
TOKENS = 24  # Length of an answer.
SHORT, LONG = 8, 256  # Prompt lengths, in words.
AT_ONCE = 8  # Sequences that decode together in each LLM worker, if it has so many slots.
TOKENS_AT_ONCE = 64  # Length of their answers; long enough that mostly all decode together.
# Pictures are measured at sizes divided by these, to separate costs per batch and per patch.
SHRUNK = (1, 2, 4)
PATCHES_PER_TOKEN = 4  # Where the plan has no grid.
LEAST_S = 1e-9  # So that every kind of work takes some time.
TIMEOUT_S = 120.0


class Calibration:
    """Measures one server, which must otherwise be idle."""

    def __init__(
        self, target: LoadTarget, http: httpx2.AsyncClient, model: str, say: Callable[[str], None]
    ) -> None:
        self._target = target
        self._http = http
        self._model = model
        self._say = say
        self._source = random.Random()

    async def rates(self, sizes: Sequence[Size]) -> Rates:
        """The server's rates. Raises StartupError if it does not answer, or sends no timings."""
        limits, llms = await self._limits()
        await self._alone(Shape(1, 0, SHORT), 2)  # Warm-up.
        self._say("text, alone")
        short, long = [await self._alone(Shape(1, 0, words)) for words in (SHORT, LONG)]
        at_once = min(AT_ONCE, limits.get("max_sequences", AT_ONCE))
        self._say(f"text, {at_once} at once")
        together = _tpot(await self._together(at_once * llms))
        step_s, sequence_s = _step(_tpot(short), together, at_once)
        gained = _median(long, _prefilled) - _median(short, _prefilled)
        slower = _stage(long, "prefill") - _stage(short, "prefill")
        token_s = max(LEAST_S, slower / max(1.0, gained))
        text = Rates(
            gateway_s=max(0.0, _ttft(short) - step_s - token_s * _median(short, _prefilled)),
            picture_s=0.0, prepare_s=0.0, batch_s=0.0, patch_s=0.0,
            step_s=step_s, sequence_s=sequence_s, prefill_token_s=token_s, **limits,
        )  # fmt: skip
        return await self._with_pictures(text, sizes) if sizes else text

    async def _with_pictures(self, text: Rates, sizes: Sequence[Size]) -> Rates:
        known, patches, seconds, first = {}, [], [], {}
        for size in dict.fromkeys(_shrunk(sizes)):
            name = f"{size[0]}x{size[1]}"
            self._say(f"pictures of {name}")
            cost = await self._picture_cost(size)
            answers = await self._alone(Shape(1, 1, SHORT), size=size)
            patches.append(cost.patches)
            seconds.append(_stage(answers, "encode"))
            if size in sizes:
                known[name], first[name] = cost, answers
        batch_s, patch_s = _line(patches, seconds)
        rates = dataclasses.replace(text, batch_s=batch_s, patch_s=patch_s, sizes=known)
        prepare = statistics.fmean(_stage(each, "preprocess") for each in first.values())
        rest = [
            _ttft(each) - prepare - _path(rates, known[name], each) for name, each in first.items()
        ]
        return dataclasses.replace(
            rates, prepare_s=prepare, picture_s=max(0.0, statistics.fmean(rest))
        )

    # ---- requests

    def _dialogue(self, shape: Shape, size: Size = (8, 8), tokens: int = TOKENS) -> Dialogue:
        given = {"max_tokens": tokens, **ANSWER_FIELDS, "timings": True}
        album = Album(self._source, (size,))
        return next(dialogues(shape, album, self._source, body_fields(self._model, given)))

    async def _alone(self, shape: Shape, rounds: int = ROUNDS, size: Size = (8, 8)) -> list[Answer]:
        return [await self._ask(self._dialogue(shape, size)) for _ in range(rounds)]

    async def _together(self, count: int) -> list[Answer]:
        """Asks ``count`` requests at once, twice. The first answers do not count, so that hardly
        any prefill disturbs the others."""
        shape = Shape(1, 0, SHORT)
        made = [self._dialogue(shape, tokens=TOKENS_AT_ONCE) for _ in range(count)]
        rounds = [await asyncio.gather(*map(self._ask, made)) for _ in range(3)]
        return [answer for each in rounds[1:] for answer in each]

    async def _ask(self, dialogue: Dialogue) -> Answer:
        answer = await self._target.ask(dialogue.body([]))
        if answer.outcome != "answered":
            raise StartupError(f"--calibrate: a request failed: {answer.status} {answer.code}")
        if answer.timings is None:
            raise StartupError("--calibrate: the server tells no timings; is it OpticNerve?")
        return answer

    # ---- what the gateway knows

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = await self._http.request(method, path, json=body)
            answer.raise_for_status()
            return answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise StartupError(f"--calibrate: {path}: {error}") from error

    async def _limits(self) -> tuple[dict[str, Any], int]:
        """Limits of the smallest worker of each kind, and the number of LLM workers."""
        health = await self._json("GET", "/health")
        found: dict[str, Any] = {}
        llms = health.get("llms", {})
        for worker in health.get("encoders", {}).get("workers", ()):
            batch = worker.get("limits", {}).get("max_batch_patches", 0)
            if batch:
                found["max_batch_patches"] = min(batch, found.get("max_batch_patches", batch))
        for worker in llms.get("workers", ()):
            limits = worker.get("limits", {})
            values = {
                "max_sequences": limits.get("max_num_seqs", 0),
                "max_batched_tokens": limits.get("max_num_batched_tokens", 0),
                "kv_tokens": limits.get("num_kv_blocks", 0) * limits.get("block_size", 0),
            }
            found |= {name: min(v, found.get(name, v)) for name, v in values.items() if v}
        return found, max(1, llms.get("serving", 1))

    async def _picture_cost(self, size: Size) -> PictureCost:
        """The cost of a picture, from the plan that a server makes without encoding it."""
        message = b"".join(self._dialogue(Shape(1, 1, 1), size).askings[0].messages)
        body = b'{"model":%s,"messages":[%s]}' % (json.dumps(self._model).encode(), message)
        try:
            answer = await self._http.post("/v1/apply_template", content=body)
            answer.raise_for_status()
            spans = answer.json()["spans"]
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            raise StartupError(f"--calibrate: /v1/apply_template: {error}") from error
        tokens = sum(span["num_tokens"] for span in spans)
        grid = spans[0].get("grid_thw") if len(spans) == 1 else None
        patches = int(np.prod(grid)) if grid else PATCHES_PER_TOKEN * tokens
        return PictureCost(patches, tokens)


async def calibrate(
    url: str, model: str, headers: dict[str, str], sizes: Sequence[Size], say: Callable[[str], None]
) -> Rates:
    """Rates of the server at ``url``. Raises StartupError."""
    json_headers = {"content-type": "application/json", **headers}
    async with (
        LoadTarget(url, headers, TIMEOUT_S) as target,
        httpx2.AsyncClient(
            base_url=url,
            verify=trust_for(url) or True,
            headers=json_headers,
            timeout=TIMEOUT_S,
            trust_env=False,
        ) as http,
    ):
        return await Calibration(target, http, model, say).rates(sizes)


# ---- figures of answers


def _shrunk(sizes: Sequence[Size]) -> list[Size]:
    return [(max(8, width // by), max(8, height // by)) for width, height in sizes for by in SHRUNK]


def _median(answers: Sequence[Answer], read: Callable[[Answer], float]) -> float:
    return float(statistics.median(map(read, answers)))


def _prefilled(answer: Answer) -> float:
    return answer.prompt_tokens - (answer.cached_tokens or 0)


def _ttft(answers: Sequence[Answer]) -> float:
    return _median(answers, lambda answer: answer.ttft or 0.0)


def _tpot(answers: Sequence[Answer]) -> float:
    return _median(answers, lambda answer: answer.tpot or 0.0)


def _step(alone: float, together: float, at_once: int) -> tuple[float, float]:
    """(seconds per step, seconds per sequence in it), from the TPOT of one sequence alone and of
    several together. The sum for one sequence is always its TPOT alone."""
    more = (together - alone) / (at_once - 1) if at_once > 1 else 0.0
    sequence_s = min(max(more, LEAST_S), alone)
    return max(LEAST_S, alone - sequence_s), sequence_s


def _stage(answers: Sequence[Answer], name: str) -> float:
    """The median seconds of a stage."""
    return _median(answers, lambda answer: (answer.timings or {}).get(f"{name}_ms", 0.0)) / 1000


def _path(rates: Rates, cost: PictureCost, answers: Sequence[Answer]) -> float:
    """The part of TTFT that the rates explain, in seconds, without preparing the picture."""
    encode = rates.batch_s + rates.patch_s * cost.patches
    prefill = rates.step_s + rates.prefill_token_s * _median(answers, _prefilled)
    return rates.gateway_s + encode + prefill


def _line(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of seconds over counts, by least squares, neither below 0."""
    if len(set(counts)) > 1:
        slope, start = (float(value) for value in np.polyfit(counts, seconds, 1))
        if slope > 0 and start >= 0:
            return start, slope
        if slope <= 0:
            return statistics.fmean(seconds), LEAST_S
    return 0.0, sum(seconds) / max(1, sum(counts))
