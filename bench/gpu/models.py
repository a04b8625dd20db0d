"""What ``bench.gpu`` works with: a device, sizes that suit it, and checkpoints, whole and split."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from encoder_service.backends.torch_backend import TorchBackend
from llm_service.device.attention.base import ATTENTION_NAME
from llm_service.policy.messages import FinishedEvent, GenerateRequest
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.generation.values import PositionLogprobs, Sampling
from opticnerve.media.plan import Modality, Overrides, Plan, Span, Structure
from opticnerve.models.registry import (
    load_language,
    load_tower,
    make_layout,
    make_preprocessor,
)
from tests.checkpoints import DEMO, make_checkpoint
from tests.local_engine import LocalEngine
from tests.reference import load_reference, picture, pixel_values

VISION_START, VISION_END = 630, 631  # Of the demo's tokenizer, which all checkpoints here use.
TEXT_IDS = (5, 600)


@dataclass(frozen=True)
class Sizes:
    """How large the work is. ``text`` and ``vision``: arguments of ``make_checkpoint``."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    layers: int  # Of decoder and tower, in checks of correctness.
    full_layers: int  # Of the decoder, in figures.
    full_depth: int  # Of the tower, in figures.
    pictures: tuple[tuple[int, int], ...]  # (width, height), in checks.
    side: int  # Of square pictures, in figures.
    context: int  # Tokens that a decode step attends over.
    steps: int  # Decode steps that are timed.
    prefills: tuple[int, ...]  # Tokens of a prompt.
    tower_batches: tuple[int, ...]  # Pictures of one forward pass.
    at_once: tuple[int, int]  # Requests in flight at the stack.
    requests: tuple[int, int]
    output: int  # Tokens of one request to the stack.
    copy_bytes: int
    product: int  # Rows and columns of the matrices that are multiplied.


_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}

REAL = Sizes(  # Qwen2-VL-2B.
    text={
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_parameters": _ROPE,
    },
    vision={"embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    layers=4,
    full_layers=28,
    full_depth=32,
    pictures=((448, 448), (644, 364), (140, 224)),
    side=448,
    context=3050,
    steps=40,
    prefills=(2048, 8192),
    tower_batches=(1, 8, 32),
    at_once=(1, 32),
    requests=(8, 64),
    output=64,
    copy_bytes=4 << 30,
    product=8192,
)

TWIN = Sizes(  # The same size of heads, narrow enough for two cores.
    text={
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": _ROPE,
    },
    vision={"embed_dim": 160, "num_heads": 2, "mlp_ratio": 2},
    layers=2,
    full_layers=2,
    full_depth=2,
    pictures=((84, 84), (140, 84), (84, 168)),
    side=112,
    context=40,
    steps=4,
    prefills=(48, 96),
    tower_batches=(1, 2),
    at_once=(1, 32),
    requests=(1, 32),
    output=4,
    copy_bytes=32 << 20,
    product=256,
)


@dataclass(frozen=True, eq=False)
class Picture:
    key: str
    plan: Plan
    pixels: NDArray[np.uint8]
    values: torch.Tensor  # The pixels as transformers' processors return them.


@dataclass(frozen=True, eq=False)
class Prompt:
    token_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, eq=False)
class Said:
    """What the engine answered to one prompt."""

    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    prompt: tuple[PositionLogprobs, ...]  # Of the prompt's tokens, if requested.
    cached: int  # Tokens of the prompt that were in pages already.


class Split:
    """Tower and decoder of one checkpoint, as in the services, and engines that use them."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        checkpoint = Checkpoint.open(str(path))
        self.layout = make_layout(checkpoint)
        self.tower = load_tower(checkpoint, dtype, device)
        self.preprocess = make_preprocessor(checkpoint, self.layout)
        self.backend = TorchBackend(self.tower, self.preprocess, lambda plan, patches: plan)
        self.language: Any = load_language(checkpoint, dtype, device, ATTENTION_NAME)

    def picture(self, size: tuple[int, int], seed: int) -> Picture:
        plan = self.layout.plan(Structure("png", *size), Overrides())
        pixels = self.preprocess(picture(*size, seed=seed), plan)
        return Picture(f"{seed}-{size}", plan, pixels, pixel_values(self.layout, [pixels]))

    def prompt(self, *parts: int | Picture, seed: int = 0) -> Prompt:
        """Parts are numbers of random text tokens, or pictures."""
        random = np.random.default_rng(seed)
        pictures = tuple(part for part in parts if isinstance(part, Picture))
        ids: list[int] = []
        spans: list[Span] = []
        for part in parts:
            if isinstance(part, int):
                ids += random.integers(*TEXT_IDS, part).tolist()
                continue
            span, more = picture_span(self.layout, part.plan, len(ids), pictures.index(part))
            spans.append(span)
            ids += more
        return Prompt(tuple(ids), tuple(spans), pictures)

    def engine(self, **settings: Any) -> LocalEngine:
        return LocalEngine(self.language, self.layout, **settings)

    def ask(
        self,
        engine: LocalEngine,
        prompts: Sequence[Prompt],
        tag: str,
        max_tokens: int = 16,
        prompt_logprobs: int | None = None,
    ) -> list[Said]:
        """Answers to ``prompts``, run together; ``tag`` keeps requests of one engine apart."""
        requests = []
        for index, prompt in enumerate(prompts):
            for each in prompt.pictures:
                if each.key not in engine.rows.items:
                    [rows] = self.backend.encode([each.pixels], [each.plan])
                    engine.rows.items[each.key] = rows
            sampling = Sampling(max_tokens=max_tokens, logprobs=2, prompt_logprobs=prompt_logprobs)
            keys = tuple(each.key for each in prompt.pictures)
            requests.append(
                GenerateRequest(f"{tag}{index}", prompt.token_ids, prompt.spans, keys, sampling)
            )
        answers = engine.generate(requests)
        prompts_said = engine.prompt_logprobs()
        cached = {
            each.request_id: each.usage.cached_tokens
            for each in engine.messages
            if isinstance(each, FinishedEvent)
        }
        return [
            Said(
                answers[request.request_id, 0].token_ids,
                answers[request.request_id, 0].logprobs,
                prompts_said.get(request.request_id, ()),
                cached[request.request_id],
            )
            for request in requests
        ]


def picture_span(layout: Any, plan: Plan, offset: int, item: int) -> tuple[Span, list[int]]:
    """The span and the ids of one picture whose markers begin at ``offset``."""
    span = Span(offset + 1, plan.num_tokens, item, 0, Modality.IMAGE, plan.grid)
    return span, [VISION_START, *layout.expand(plan).token_ids, VISION_END]


@dataclass
class Room:
    """The device, the sizes, and the models loaded there. ``release`` frees the models."""

    device: torch.device
    sizes: Sizes
    directory: Path
    measured: dict[str, float] = field(default_factory=dict)  # Ceilings of the device, by name.
    _splits: dict[tuple[str, torch.dtype], Split] = field(default_factory=dict)
    _wholes: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of figures, which a server would use on this device."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    def checkpoint(self, name: str) -> Path:
        """The checkpoint "demo", "real widths", "full depth" (of the same widths, and as deep as
        figures need), or the small random one of a family. Made on first use."""
        path = DEMO if name == "demo" else self.directory / name.replace(" ", "-")
        if not path.exists():
            if name in ("real widths", "full depth"):
                self._make_wide(path, name == "full depth")
            else:
                make_checkpoint(name, path, seed=3)
        return path

    def _make_wide(self, path: Path, full: bool) -> None:
        sizes = self.sizes
        layers = sizes.full_layers if full else sizes.layers
        depth = sizes.full_depth if full else sizes.layers
        make_checkpoint(
            "qwen2_vl",
            path,
            dtype=torch.bfloat16,
            tied=True,
            text={**sizes.text, "num_hidden_layers": layers},
            vision={**sizes.vision, "depth": depth},
            device=str(self.device),
            max_pixels=1280 * 28 * 28,
        )

    def split(self, name: str, dtype: torch.dtype) -> Split:
        if (name, dtype) not in self._splits:
            self._splits[name, dtype] = Split(self.checkpoint(name), dtype, self.device)
        return self._splits[name, dtype]

    def whole(self, name: str, dtype: torch.dtype) -> Any:
        """transformers' unsplit model."""
        if (name, dtype) not in self._wholes:
            model = load_reference(self.checkpoint(name), dtype)
            self._wholes[name, dtype] = model.to(self.device)
        return self._wholes[name, dtype]

    def release(self) -> None:
        self._splits.clear()
        self._wholes.clear()
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def median_ms(self, work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Median milliseconds of ``work``, by the device's events; by the clock on a CPU."""
        for _ in range(warm):
            work()
        self.synchronize()
        once = self._events_ms if self.on_cuda else wall_ms
        return statistics.median(once(work) for _ in range(repeats))

    def _events_ms(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        self.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed


def wall_ms(work: Callable[[], object]) -> float:
    """Milliseconds by the host's clock."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000
