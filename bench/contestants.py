"""The contestants of ``bench.engine``: transformers in three ways, and the engine in two."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_service.engine.client import ThreadEngineClient
from llm_service.engine.engine import Emit, Engine
from llm_service.policy.messages import FailedEvent, GenerateRequest, TokensEvent
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Plan, Span
from tests.local_engine import LocalEngine

DEADLINE_S = 300.0

Outputs = list[list[int]]
_ids = itertools.count()


@dataclass(frozen=True)
class Ask:
    """One request, the same for every contestant."""

    token_ids: tuple[int, ...]
    num_output: int
    picture: int = -1
    span: Span | None = None


@dataclass(frozen=True)
class Picture:
    key: str
    plan: Plan
    pixels: Any
    rows: dict[str, torch.Tensor]


class Whole:
    """transformers' unsplit model."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.pictures: list[Picture] = []

    def inputs(self, ask: Ask) -> dict[str, Any]:
        ids = torch.tensor([ask.token_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if ask.span is not None:
            picture = self.pictures[ask.picture]
            grid = picture.plan.grid
            image_token = ask.token_ids[ask.span.token_offset]
            inputs["pixel_values"] = torch.from_numpy(picture.pixels)
            inputs["image_grid_thw"] = torch.tensor([(grid.t, grid.h, grid.w)])
            inputs["mm_token_type_ids"] = (ids == image_token).int()
        return inputs

    def _give_rows(self, rows: torch.Tensor) -> None:
        """Sets the tower's next output, so that transformers encodes nothing but does all the
        rest."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tower = self.model.model.visual
        tower.forward = lambda *_, **__: BaseModelOutputWithPooling(pooler_output=rows)

    def generate(self, asks: Sequence[Ask]) -> Outputs:
        outputs = []
        for ask in asks:
            if ask.picture >= 0:
                self._give_rows(self.pictures[ask.picture].rows["rows"])
            with torch.inference_mode():
                out = self.model.generate(
                    **self.inputs(ask), max_new_tokens=ask.num_output, do_sample=False
                )
            outputs.append(out[0, len(ask.token_ids) :].tolist())
        return outputs

    def static(self, asks: Sequence[Ask], batch: int) -> Outputs:
        outputs: Outputs = []
        for first in range(0, len(asks), batch):
            group = asks[first : first + batch]
            width = max(len(ask.token_ids) for ask in group)
            ids = torch.zeros((len(group), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, ask in enumerate(group):
                ids[row, width - len(ask.token_ids) :] = torch.tensor(ask.token_ids)
                mask[row, width - len(ask.token_ids) :] = 1
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max(ask.num_output for ask in group),
                    do_sample=False,
                )
            outputs += [
                out[row, width : width + ask.num_output].tolist() for row, ask in enumerate(group)
            ]
        return outputs

    def gap(self, ask: Ask, output: list[int]) -> float:
        """The gap between the two best logits after ``output``."""
        longer = replace(ask, token_ids=(*ask.token_ids, *output))
        with torch.inference_mode():
            best = self.model(**self.inputs(longer)).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


class Continuous:
    """transformers' continuous batching; a context, so that its thread runs only in its turn."""

    def __init__(self, whole: Whole, asks: Sequence[Ask], concurrency: int) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        page = 16
        longest = max(len(ask.token_ids) + ask.num_output for ask in asks)
        self._asks = asks
        self._context = whole.model.continuous_batching_context_manager(
            generation_config=GenerationConfig(
                max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=concurrency * -(-longest // page) + 1,
                max_batch_tokens=512,
                max_requests_per_batch=concurrency,
                use_cuda_graph=False,
            ),
            block=True,
            timeout=5,
            warmup=False,
        )

    def __enter__(self) -> Continuous:
        self._manager = self._context.__enter__()
        self._finish([self._manager.add_request([5, 6, 7], max_new_tokens=4)])
        return self

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)

    def run(self) -> Outputs:
        ids = [
            self._manager.add_request(list(ask.token_ids), max_new_tokens=ask.num_output)
            for ask in self._asks
        ]
        return self._finish(ids)

    def _finish(self, ids: Sequence[str]) -> Outputs:
        found: dict[str, list[int]] = {}
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"generate_batch failed: {result.error}")
                found[result.request_id] = list(result.generated_tokens)
            if time.monotonic() > deadline:
                raise RuntimeError("generate_batch did not end")
        return [found[each] for each in ids]


class Ours:
    """The engine, in this thread and behind its client."""

    def __init__(self, path: str, asks: Sequence[Ask]) -> None:
        self._longest = max(len(ask.token_ids) + ask.num_output for ask in asks)
        self._template = LocalEngine.load(path)
        self.language = self._template.runner._language
        self.layout = self._template.runner._slots._layout

    def engine(self, concurrency: int, pictures: Sequence[Picture] = ()) -> LocalEngine:
        pages = -(-self._longest // 16)
        engine = LocalEngine(
            self.language,
            self.layout,
            max_model_len=self._longest,
            max_num_seqs=concurrency,
            kv_cache_tokens=(concurrency + 1) * pages * 16,
            prefix_caching=False,  # Rounds repeat prompts, and other contestants have no cache.
        )
        engine.rows.items |= {picture.key: picture.rows for picture in pictures}
        return engine

    def run(self, engine: LocalEngine, asks: Sequence[Ask]) -> Outputs:
        made = requests(asks, engine)
        answers = engine.generate(made)
        engine.messages.clear()
        return [answers[request.request_id, 0].token_ids for request in made]


def requests(asks: Sequence[Ask], engine: LocalEngine) -> list[GenerateRequest]:
    keys = list(engine.rows.items)
    return [
        GenerateRequest(
            f"bench-{next(_ids)}",
            ask.token_ids,
            () if ask.span is None else (ask.span,),
            () if ask.picture < 0 else (keys[ask.picture],),
            Sampling(max_tokens=ask.num_output, ignore_eos=True),
        )
        for ask in asks
    ]


class ThroughClient:
    """An engine in its own thread, started before time is measured."""

    def __init__(self, local: LocalEngine, asks: Sequence[Ask]) -> None:
        self._local, self._asks = local, asks
        self._runner = asyncio.Runner()

    def __enter__(self) -> ThroughClient:
        def build(_: Any, emit: Emit) -> Engine:
            self._local.engine._emit = emit
            return self._local.engine

        self._client = ThreadEngineClient(build, None)
        self._runner.run(self._client.start())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        self._local.engine._emit = self._local.messages.extend

    def run(self) -> Outputs:
        async def one(request: GenerateRequest) -> list[int]:
            token_ids: list[int] = []
            with self._client.submit(request) as stream:
                async for event in stream:
                    if isinstance(event, TokensEvent):
                        token_ids += event.delta.token_ids
                    elif isinstance(event, FailedEvent):
                        raise event.error
            return token_ids

        async def everyone() -> Outputs:
            return await asyncio.gather(*map(one, requests(self._asks, self._local)))

        return self._runner.run(everyone())
