"""The cost of splitting: a picture request through three services, against one process.

    python -m bench.split [MODEL] [--requests N] [--dtype float32]

Both sides do the same work with the same code and the same number of threads: JSON in, picture
planned, template, tokens, decode, tower, prefill, first token out. The whole does it in this
process, one call after the other; the split in `opticnerve up`'s three processes, over HTTP, gRPC
and shared memory. Every request shows a new picture, so nothing is cached. The sides alternate, one
request at a time; figures are medians. The budget: the split's TTFT may exceed the whole's by at
most 15 loopback unary gRPC round trips to one of the services. One round trip is measured in each
round, between the requests (so that it is as cold as they are), and some more in a tight loop for
comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import torch
from grpc_health.v1 import health_pb2

import opticnerve
from bench import report
from examples.demo_training import scenes
from gateway.api.chat import ChatRequest
from gateway.api.schemas.parsing import parse
from gateway.job import ChatPrompt
from gateway.media.dataurl import read_data_url
from gateway.output.detokenizer import Vocabulary
from gateway.prompt.placeholders import ExpandedPrompt
from gateway.prompt.renderer import ChatRenderer
from gateway.sampling import Defaults, SamplingLimits, resolve_sampling
from llm_service.device.attention import make_backend
from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.device.model_runner import ModelRunner, RunnerLimits
from llm_service.engine.engine import Engine
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import GenerateRequest, TokensEvent
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import GatewayConfig
from opticnerve.content_keys import content_key
from opticnerve.generation.values import Sampling
from opticnerve.media.decode import decode
from opticnerve.media.probe import parse_structure
from opticnerve.models.registry import (
    load_language,
    load_tower,
    make_layout,
    make_preprocessor,
)
from opticnerve.rpc.channel import open_channel

BUDGET_ROUND_TRIPS = 15
WARM_UP = 5
CHECK = "/grpc.health.v1.Health/Check"


class Rows:
    """A RowSource over a dictionary."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, torch.Tensor]] = {}

    def ready(self, key: str) -> bool:
        return key in self.items

    def can_acquire(self, num_bytes: int) -> bool:
        return True

    def acquire(self, key: str, num_bytes: int) -> None: ...

    def release(self, key: str) -> None: ...

    def get(self, key: str) -> dict[str, torch.Tensor]:
        return self.items[key]

    def discard(self, key: str) -> None:
        self.items.pop(key, None)

    def load(self, key: str) -> bool:
        return key in self.items


class Whole:
    """The three services' work in one process, as plain calls."""

    def __init__(self, model: str | None, dtype: torch.dtype) -> None:
        checkpoint = Checkpoint.open(model)
        self.layout = make_layout(checkpoint)
        self.renderer = ChatRenderer.load(checkpoint.path, self.layout)
        self.vocabulary = Vocabulary(self.renderer.tokenizer)
        self.preprocess = make_preprocessor(checkpoint, self.layout)
        self.tower = load_tower(checkpoint, dtype, "cpu")
        language = load_language(checkpoint, dtype, "cpu", ATTENTION_NAME)
        self.rows = Rows()
        limits = RunnerLimits(max_model_len=self.layout.max_positions, kv_cache_tokens=16_384)
        runner = ModelRunner(language, self.layout, make_backend("auto"), limits, self.rows)
        config = EngineConfig(
            runner.num_blocks,
            runner.block_size,
            self.layout.max_positions,
            vocab_size=language.vocab_size,
        )
        self.max_pixels = GatewayConfig().max_image_pixels
        self.first: float | None = None
        self.engine = Engine(config, runner, self.rows, self._on_events)
        self.text = ""
        self.limits = SamplingLimits(self.layout.max_positions, vocab_size=language.vocab_size)
        self.parts: dict[str, float] = {}

    def ask(self, body: bytes) -> float:
        """Seconds from the request's bytes to the first token's text."""
        began = mark = time.perf_counter()
        parts: dict[str, float] = {}

        def part(name: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            parts[name] = (now - mark) * 1000
            mark = now

        request, _ = parse(ChatRequest, body)
        (source,) = request.sources
        data = read_data_url(source.url, 2**25, source.param)
        plan = self.layout.plan(parse_structure(data, self.max_pixels))
        key = content_key(data, self.layout.settings(), source.overrides(None), "whole")
        prompt = self.renderer.build(self.renderer.render(request.prompt), [plan])
        part("plan and template")
        pixels = self.preprocess(decode(data, plan, self.max_pixels), plan)
        part("preprocess")
        self.rows.items = {key: self.tower.encode([pixels], [plan])[0]}
        part("encode")
        sampling = self._sampling(request, prompt)
        self.first = None
        self.engine.submit(
            GenerateRequest(
                key, prompt.token_ids, prompt.spans, (key,),
                Sampling(max_tokens=sampling.max_tokens, temperature=0.0),
            )
        )  # fmt: skip
        while self.first is None:
            self.engine.step()
        part("prefill")
        self.engine.abort(key)
        self.engine.step()
        self.parts = parts
        return self.first - began

    def _sampling(self, request: ChatRequest, prompt: ExpandedPrompt) -> Sampling:
        return resolve_sampling(
            request.options,
            kind=ChatPrompt,
            prompt_tokens=len(prompt.token_ids),
            item_tokens=prompt.num_item_tokens,
            defaults=Defaults(),
            limits=self.limits,
            tokenizer=self.renderer.tokenizer,
        )

    def _on_events(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, TokensEvent) and self.first is None:
                self.text = self.vocabulary.detokenizer().push(event.delta.token_ids[0])
                self.first = time.perf_counter()


class Split:
    """The same over HTTP. ``timings``: milliseconds by stage, from the gateway."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=60.0, trust_env=False)
        self.timings: dict[str, Any] = {}

    def ask(self, body: bytes) -> float:
        """Seconds from sending the request to the first delta with text."""
        first = None
        began = time.perf_counter()
        with self.http.stream("POST", "/v1/chat/completions", content=body) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if first is None and _text(event):
                    first = time.perf_counter()
                self.timings = event.get("timings") or self.timings
        if first is None:
            raise SystemExit("the split answered without text")
        return first - began


def _text(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


class RoundTrips:
    """Loopback unary gRPC calls to one of the services, from an asyncio client."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.loop = asyncio.new_event_loop()
        self.channel = self.loop.run_until_complete(self._open())

    async def _open(self) -> Any:
        return open_channel(self.address)

    def measure(self, calls: int = 1) -> float:
        """Median seconds of ``calls`` calls, one after the other."""
        return self.loop.run_until_complete(self._measure(calls))

    async def _measure(self, calls: int) -> float:
        check = self.channel.unary_unary(
            CHECK,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            await check(health_pb2.HealthCheckRequest())
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def close(self) -> None:
        self.loop.run_until_complete(self.channel.close())
        self.loop.close()


def bodies() -> Iterator[bytes]:
    """Requests, each with a new picture."""
    seed = 0
    while True:
        rng = scenes.Random(seed, scenes.PICTURE_SIZES[0], 4)
        picture = scenes.draw_scene(scenes.random_items(rng, 2), rng)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What do you see?"},
        ]
        yield json.dumps(
            {
                "model": "model",
                "messages": [{"role": "user", "content": parts}],
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "timings": True,
                "max_tokens": 8,
            }
        ).encode()
        seed += 1


def median(values: list[float]) -> float:
    return statistics.median(values)


def run(requests: int, whole: Whole, split: Split, trips: RoundTrips) -> dict[str, Any]:
    """Alternates the two sides. Lists hold milliseconds, one value for each request."""
    seen: dict[str, list[float]] = {
        name: [] for name in ("whole", "split", "round_trip", "hot_round_trip")
    }
    parts: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    source = bodies()
    for index in range(WARM_UP + requests):
        sides: list[tuple[str, Callable[[bytes], float]]] = [
            ("whole", whole.ask), ("split", split.ask),
        ]  # fmt: skip
        for name, ask in sides if index % 2 else reversed(sides):
            value = ask(next(source)) * 1000
            if index >= WARM_UP:
                seen[name].append(value)
        trip = trips.measure() * 1000
        if index < WARM_UP:
            continue
        seen["round_trip"].append(trip)
        seen["hot_round_trip"].append(trips.measure(20) * 1000)
        for name, value in whole.parts.items():
            parts.setdefault(name, []).append(value)
        for name, value in split.timings.items():
            if name.endswith("_ms"):
                stages.setdefault(name.removesuffix("_ms"), []).append(value)
        print(f"\r{index + 1 - WARM_UP}/{requests} rounds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    overhead = median([s - w for s, w in zip(seen["split"], seen["whole"], strict=True)])
    return {
        "whole_ttft_ms": median(seen["whole"]),
        "split_ttft_ms": median(seen["split"]),
        "overhead_ms": overhead,
        "round_trip_ms": median(seen["round_trip"]),
        "hot_round_trip_ms": median(seen["hot_round_trip"]),
        "overhead_round_trips": overhead / median(seen["round_trip"]),
        "budget_round_trips": BUDGET_ROUND_TRIPS,
        "whole_parts_ms": {name: median(values) for name, values in parts.items()},
        "split_stages_ms": {name: median(values) for name, values in stages.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="checkpoint; default: the built-in demo")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = Whole(args.model, getattr(torch, args.dtype))
    model = Path(args.model) if args.model else None
    with opticnerve.serve(model, dtype=args.dtype, threads=1) as stack:
        split = Split(stack.url)
        health = split.http.get("/health").json()
        trips = RoundTrips(health["encoders"]["workers"][0]["address"])
        try:
            results = run(args.requests, whole, split, trips)
        finally:
            trips.close()
    show(results)
    print("written to", report.save("split", results).relative_to(Path.cwd()))


def show(results: dict[str, Any]) -> None:
    rows = [
        ("one process, TTFT", f"{results['whole_ttft_ms']:.2f}"),
        ("three services, TTFT", f"{results['split_ttft_ms']:.2f}"),
        ("overhead (median of differences)", f"{results['overhead_ms']:.2f}"),
        ("one unary gRPC round trip", f"{results['round_trip_ms']:.3f}"),
        ("the same in a tight loop", f"{results['hot_round_trip_ms']:.3f}"),
    ]
    print(report.table(("median of requests", "ms"), rows))
    print(
        f"\noverhead = {results['overhead_round_trips']:.1f} round trips "
        f"(budget {results['budget_round_trips']})\n"
    )
    whole = [(name, f"{value:.2f}") for name, value in results["whole_parts_ms"].items()]
    print(report.table(("one process: part", "ms"), whole), end="\n\n")
    stages = [(name, f"{value:.2f}") for name, value in results["split_stages_ms"].items()]
    print(report.table(("three services: stage", "ms"), stages), end="\n\n")


if __name__ == "__main__":
    main()
