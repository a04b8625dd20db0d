"""The whole stack on requests of three pictures: in one process, and over the real services.

In one process nothing goes over a network: the encoder's own pool, batches and backend, and the
engine behind its service's client, run on one event loop. That needs nothing but torch.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

import opticnerve
from bench.gpu.checks import Figures, Seen, Skipped
from bench.gpu.figures import MODEL
from bench.gpu.models import TEXT_IDS, Room, Split, picture_span
from encoder_service.batcher import Batcher
from encoder_service.fair_queue import FairQueue
from llm_service.engine.client import ThreadEngineClient
from llm_service.engine.engine import Emit, Engine
from llm_service.policy.messages import FailedEvent, GenerateRequest, TokensEvent
from opticnerve.generation.values import Sampling
from opticnerve.media.decode import decode
from opticnerve.media.plan import Plan, Span
from opticnerve.media.probe import parse_structure
from tests.reference import picture

SERVICES = ("encoder_service.service", "llm_service.service", "gateway.service")
PICTURES = 3  # Of one request.
TEXT = 24  # Tokens after each picture.
STAGED_PATCHES = 1 << 17
BATCH_PATCHES = 1 << 16


@dataclass
class Told:
    """One request as its client saw it. Seconds."""

    began: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0

    def heard(self, tokens: int) -> None:
        now = time.perf_counter()
        if self.tokens:
            self.gaps.append((now - self.last) / tokens)
        else:
            self.first = now - self.began
        self.last = now
        self.tokens += tokens


Ask = Callable[[Sequence[bytes]], Awaitable[Told]]


async def _drive(ask: Ask, pictures: list[bytes], at_once: int) -> Figures:
    """One request to warm up; then all others, ``at_once`` in flight."""
    groups = [pictures[i : i + PICTURES] for i in range(0, len(pictures), PICTURES)]
    await ask(groups[0])
    gate = asyncio.Semaphore(at_once)

    async def one(group: list[bytes]) -> Told:
        async with gate:
            return await ask(group)

    began = time.perf_counter()
    told = await asyncio.gather(*map(one, groups[1:]))
    seconds = time.perf_counter() - began
    first, gaps = [each.first for each in told], [gap for each in told for gap in each.gaps]
    return {
        "requests": len(told),
        "requests_per_s": len(told) / seconds,
        "tokens_per_s": sum(each.tokens for each in told) / seconds,
        "ttft_p50_ms": _percentile(first, 50),
        "ttft_p99_ms": _percentile(first, 99),
        "itl_p50_ms": _percentile(gaps, 50),
        "itl_p99_ms": _percentile(gaps, 99),
    }


def _percentile(seconds: list[float], percent: int) -> float:
    return float(np.percentile(seconds, percent)) * 1000 if seconds else float("nan")


def _seen(figures: Figures) -> Seen:
    return Seen(
        f"TTFT {figures['ttft_p50_ms']:.0f} ms (p99 {figures['ttft_p99_ms']:.0f}), "
        f"ITL {figures['itl_p50_ms']:.2f} (p99 {figures['itl_p99_ms']:.2f}), "
        f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['requests_per_s']:.2f} requests/s",
        figures,
    )


def _jpegs(room: Room, index: int) -> list[bytes]:
    """Distinct pictures for a warm-up and the requests of ``at_once[index]``."""
    side = room.sizes.side
    bases = [np.asarray(picture(side, side, seed=seed)) for seed in range(4)]
    made = []
    for number in range(PICTURES * (1 + room.sizes.requests[index])):
        pixels = bases[number % len(bases)].copy()
        pixels[:28, :28] = (number % 251, number // 251 * 97 % 251, index * 128)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


# ---- in one process


def one_process(room: Room, index: int) -> Seen:
    """``index``: 0 for one request at a time, 1 for many."""

    async def run() -> Figures:
        at_once = room.sizes.at_once[index]
        async with _OneProcess.open(room, at_once) as stack:
            return await _drive(stack.ask, _jpegs(room, index), at_once)

    return _seen(asyncio.run(run()))


class _OneProcess:
    """The work of the encoder and the LLM worker, without gRPC and store."""

    def __init__(self, room: Room, at_once: int) -> None:
        self._split: Split = room.split(MODEL, room.dtype)
        self._output = room.sizes.output
        self._number = 0
        plan = self._split.picture((room.sizes.side, room.sizes.side), seed=0).plan
        length = PICTURES * (plan.num_tokens + 2 + TEXT) + self._output + 16
        self._local = self._split.engine(
            max_model_len=length,
            max_num_seqs=at_once,
            max_num_batched_tokens=2048,
            kv_cache_tokens=(at_once + 1) * (length + 16),
        )

    @classmethod
    @asynccontextmanager
    async def open(cls, room: Room, at_once: int) -> AsyncIterator[_OneProcess]:
        stack = cls(room, at_once)

        def build(_: Any, emit: Emit) -> Engine:
            stack._local.engine._emit = emit
            return stack._local.engine

        stack._threads, stack._staging = ThreadPoolExecutor(), FairQueue(STAGED_PATCHES)
        stack._batcher = Batcher(stack._encode_batch, BATCH_PATCHES)
        stack._client = ThreadEngineClient(build, None)
        try:
            await stack._client.start()
            yield stack
        finally:
            await stack._client.close()
            stack._batcher.close()
            stack._threads.shutdown()
            stack._local.runner.close()

    _threads: ThreadPoolExecutor
    _staging: FairQueue
    _batcher: Batcher[tuple[Any, Plan], Any]
    _client: ThreadEngineClient

    def _encode_batch(self, batch: Sequence[tuple[Any, Plan]]) -> list[Any]:
        pixels, plans = zip(*batch, strict=True)
        return self._split.backend.encode(pixels, plans)

    async def _encode(self, data: bytes) -> tuple[Plan, Any]:
        plan = self._split.layout.plan(parse_structure(data))
        async with self._staging.hold(plan.num_patches):
            prepared = self._threads.submit(self._prepare, data, plan)
            pixels = await asyncio.wrap_future(prepared)
            job = self._batcher.submit((pixels, plan), plan.num_patches)
            finished = await asyncio.wrap_future(job)
        return plan, finished.result

    def _prepare(self, data: bytes, plan: Plan) -> Any:
        return self._split.backend.preprocess(decode(data, plan), plan)

    async def ask(self, pictures: Sequence[bytes]) -> Told:
        told = Told()
        number, self._number = self._number, self._number + 1
        encoded = await asyncio.gather(*map(self._encode, pictures))
        keys = tuple(f"{number}-{i}" for i in range(len(encoded)))
        rows = self._local.rows.items
        rows |= {key: item for key, (_, item) in zip(keys, encoded, strict=True)}
        request = self._request(number, [plan for plan, _ in encoded], keys)
        with self._client.submit(request) as stream:
            async for event in stream:
                if isinstance(event, TokensEvent) and event.delta.token_ids:
                    told.heard(len(event.delta.token_ids))
                elif isinstance(event, FailedEvent):
                    raise event.error
        for key in keys:
            del rows[key]
        return told

    def _request(
        self, number: int, plans: Iterable[Plan], keys: tuple[str, ...]
    ) -> GenerateRequest:
        random = np.random.default_rng(number)
        ids: list[int] = []
        spans: list[Span] = []
        for item, plan in enumerate(plans):
            span, more = picture_span(self._split.layout, plan, len(ids), item)
            spans.append(span)
            ids += [*more, *random.integers(*TEXT_IDS, TEXT).tolist()]
        sampling = Sampling(max_tokens=self._output, ignore_eos=True)
        return GenerateRequest(f"stack-{number}", tuple(ids), tuple(spans), keys, sampling)


# ---- over the services


def services(room: Room) -> Seen:
    """``opticnerve.serve`` on the same checkpoint: HTTP, gRPC, shared memory, processes."""
    try:
        for name in SERVICES:
            importlib.import_module(name)
        import httpx2
    except ImportError as error:
        raise Skipped(f"this Python cannot run the services: {error}") from error
    room.release()  # The services load weights of their own.
    figures: Figures = {}

    async def run(url: str, index: int) -> Figures:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(
            base_url=url, timeout=300.0, trust_env=False, limits=limits
        ) as http:
            client = _OverHttp(http, room.sizes.output)
            return await _drive(client.ask, _jpegs(room, index), room.sizes.at_once[index])

    with opticnerve.serve(room.checkpoint(MODEL), **_flags(room)) as stack:
        for index, at_once in enumerate(room.sizes.at_once):
            figures[f"{at_once} at once"] = asyncio.run(run(stack.url, index))
    parts = [f"{name}: {_seen(each).text}" for name, each in figures.items()]
    return Seen("; ".join(parts), figures)


def _flags(room: Room) -> dict[str, Any]:
    """Flags with a fixed size of the KV cache, since encoder and LLM worker share the device."""
    if room.on_cuda:
        return {"dtype": "bfloat16", "kv_cache_tokens": 65_536}
    return {"dtype": "float32", "kv_cache_tokens": 16_384, "threads": 1}


class _OverHttp:
    """Asks as a user's program would; counts a delta with text as a token."""

    def __init__(self, http: Any, output: int) -> None:
        self._http, self._output = http, output

    async def ask(self, pictures: Sequence[bytes]) -> Told:
        body = self._body(pictures)
        told, counted = Told(), 0
        async with self._http.stream("POST", "/v1/chat/completions", content=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()[:300]}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    told.heard(1)
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
        told.tokens = counted
        return told

    def _body(self, pictures: Sequence[bytes]) -> bytes:
        parts: list[dict[str, Any]] = []
        for data in pictures:
            url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
        parts.append({"type": "text", "text": "What do you see?"})
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": self._output,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()
