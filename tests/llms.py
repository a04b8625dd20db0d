"""LLM workers for tests: the real service in this process, the demo checkpoint, raw calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from llm_service.service import open_worker
from llm_service.wire.servicer import LLMServicer, Loaded
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import LLMConfig, ModelConfig, RpcConfig, StoreConfig
from opticnerve.embeddings import codec
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.signing import Seal
from opticnerve.embeddings.store import Store
from opticnerve.media.plan import Modality, Overrides, Plan, Span, Structure
from opticnerve.models.family import Layout, Tower
from opticnerve.models.registry import load_tower, make_layout, make_preprocessor
from opticnerve.pb import embedding_pb2, llm_pb2_grpc
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.channel import open_channel
from opticnerve.rpc.errors import from_rpc
from opticnerve.rpc.token import load_token
from tests.checkpoints import DEMO, EOS
from tests.reference import load_reference, pixel_values

WAIT_S = 60.0
VISION_START, VISION_END = 630, 631
NOWHERE = Location()


@dataclass(frozen=True)
class Picture:
    """A picture of random blocks: what the tower sees, and its rows under ``key``."""

    key: str
    plan: Plan
    pixels: NDArray[np.uint8] = field(compare=False)
    rows: dict[str, torch.Tensor] = field(compare=False)

    def ref(self, location: Location = NOWHERE) -> EmbeddingRef:
        specs = codec.specs_of(self.rows)
        return EmbeddingRef(self.key, "f" * 64, specs, self.plan.num_tokens, location)

    def data(self) -> bytes:
        return codec.to_bytes(self.rows, {})


class Demo:
    """The demo checkpoint: whole, for what is right, and its tower. In fp32."""

    def __init__(self) -> None:
        checkpoint = Checkpoint.open(None)
        self.layout: Layout = make_layout(checkpoint)
        self.preprocess = make_preprocessor(checkpoint, self.layout)
        self.tower: Tower = load_tower(checkpoint, torch.float32, "cpu")
        self.whole = load_reference(DEMO)
        self.whole.generation_config.eos_token_id = EOS
        self.whole.generation_config.pad_token_id = EOS

    def picture(self, seed: int, size: tuple[int, int] = (84, 84)) -> Picture:
        random = np.random.default_rng(seed)
        blocks = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
        plan = self.layout.plan(Structure("png", *size), Overrides())
        pixels = self.preprocess(image, plan)
        (rows,) = self.tower.encode([pixels], [plan])
        key = random.bytes(32).hex()
        return Picture(key, plan, pixels, rows)

    def prompt(self, *parts: int | Picture, seed: int = 0) -> Prompt:
        """Parts are numbers of text tokens, or pictures."""
        random = np.random.default_rng(seed)
        ids: list[int] = []
        spans: list[Span] = []
        pictures = [part for part in parts if isinstance(part, Picture)]
        for part in parts:
            if isinstance(part, int):
                ids += random.integers(5, 600, part).tolist()
                continue
            count, item = part.plan.num_tokens, pictures.index(part)
            spans.append(Span(len(ids) + 1, count, item, 0, Modality.IMAGE, part.plan.grid))
            ids += [VISION_START, *[self.layout.item_token_ids[Modality.IMAGE]] * count, VISION_END]
        return Prompt(ids, spans, pictures)

    def reference(self, prompt: Prompt, max_tokens: int) -> list[int]:
        """What transformers' unsplit model says, greedily."""
        with torch.inference_mode():
            out = self.whole.generate(
                **self._inputs(prompt), max_new_tokens=max_tokens, do_sample=False
            )
        return [int(token) for token in out[0, len(prompt.token_ids) :]]

    def logprobs(self, prompt: Prompt, more: Sequence[int] = ()) -> torch.Tensor:
        """fp32 [tokens, vocabulary]: after each token of the prompt and ``more``."""
        with torch.inference_mode():
            logits = self.whole(**self._inputs(prompt, more)).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def _inputs(self, prompt: Prompt, more: Sequence[int] = ()) -> dict[str, Any]:
        ids = torch.tensor([[*prompt.token_ids, *more]])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.pictures:
            grids = [picture.plan.grid for picture in prompt.pictures]
            pixels = [picture.pixels for picture in prompt.pictures]
            inputs["pixel_values"] = pixel_values(self.layout, pixels)
            inputs["image_grid_thw"] = torch.tensor([(g.t, g.h, g.w) for g in grids])
            inputs["mm_token_type_ids"] = (ids == self.layout.item_token_ids[Modality.IMAGE]).int()
        return inputs


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    spans: list[Span]
    pictures: list[Picture]

    def start(
        self, refs: Sequence[EmbeddingRef | None] | None = None, **fields: Any
    ) -> pb.GenerateIn:
        """Start; ``refs`` one a picture, by default without any. ``sampling``: keyword fields."""
        sampling = {"max_tokens": 12, "eos_token_ids": [EOS], **fields.pop("sampling", {})}
        items = [pb.Item(key=picture.key) for picture in self.pictures]
        for item, ref in zip(items, refs or [], strict=False):
            if ref is not None:
                item.ref.CopyFrom(convert.ref_to_pb(ref))
        given = {
            "request_id": "test",
            "token_ids": self.token_ids,
            "spans": [convert.span_to_pb(span) for span in self.spans],
            "items": items,
            "sampling": pb.SamplingParams(**sampling),
        }
        return pb.GenerateIn(start=pb.Start(**{**given, **fields}))


def ready(ref: EmbeddingRef) -> pb.GenerateIn:
    return pb.GenerateIn(embedding_ready=pb.EmbeddingReady(ref=convert.ref_to_pb(ref)))


def failed(key: str, detail: embedding_pb2.ErrorDetail) -> pb.GenerateIn:
    return pb.GenerateIn(embedding_failed=pb.EmbeddingFailed(key=key, status=3, detail=detail))


@dataclass
class Answer:
    """All that one call said."""

    tokens: dict[int, list[int]] = field(default_factory=dict)  # By choice.
    deltas: list[pb.TokenDelta] = field(default_factory=list)
    needed: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    prompt_logprobs: list[pb.PositionLogprobs] = field(default_factory=list)
    done: pb.Done | None = None

    def take(self, message: pb.GenerateOut) -> None:
        for delta in message.deltas:
            have = self.tokens.setdefault(delta.choice, [])
            self.deltas.append(delta)
            have.extend(delta.token_ids)
        if message.HasField("embedding_needed"):
            name = pb.NeededReason.Name(message.embedding_needed.reason)
            reason = name.removeprefix("NEEDED_REASON_")
            self.needed += [(key, reason) for key in message.embedding_needed.keys]
        if message.HasField("prompt_logprobs"):
            self.prompt_logprobs += message.prompt_logprobs.positions
        if message.HasField("done"):
            self.done = message.done


class Worker:
    """A running service and calls to it."""

    def __init__(self, servicer: LLMServicer, store: Store) -> None:
        self.server = servicer.server
        self.loaded: Loaded = servicer.require_loaded()
        self.store = store  # This test's own end of the worker's store.
        self.channel = open_channel(
            self.server.address, load_token(self.server.config.rpc_token_file)
        )
        self.stub = llm_pb2_grpc.LLMStub(self.channel)

    def here(self) -> Location:
        """This worker's own tier."""
        return Location(shm_tier_id=self.store.tier_id)

    def put(self, picture: Picture) -> EmbeddingRef:
        self.store.put(picture.key, picture.rows, {})
        return picture.ref(self.here())

    async def open(self, *messages: pb.GenerateIn) -> grpc.aio.StreamStreamCall:
        call = self.stub.Generate(timeout=WAIT_S)
        for message in messages:
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(message)
        return call

    async def generate(self, *messages: pb.GenerateIn) -> Answer:
        """Sends messages and reads to the end. Raises the typed error of a failed call."""
        return await read(await self.open(*messages))

    async def idle(self) -> None:
        """Waits until the engine runs nothing (an abort may be on its way), and checks its
        invariants."""
        engine = self.loaded.engine
        async with asyncio.timeout(WAIT_S):
            await engine.check_integrity()  # Brings fresh figures, too.
            while (engine.stats.running, engine.stats.waiting) != (0, 0):
                await asyncio.sleep(0.01)
                await engine.check_integrity()


async def read(call: grpc.aio.StreamStreamCall, answer: Answer | None = None) -> Answer:
    """To the end. Raises the typed error of a failed call."""
    answer = answer or Answer()
    try:
        while isinstance(message := await call.read(), pb.GenerateOut):
            answer.take(message)
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error
    if await call.code() is not grpc.StatusCode.OK:
        raise from_rpc(await ended(call))
    return answer


async def ended(call: grpc.aio.StreamStreamCall) -> grpc.aio.AioRpcError:
    """How a call that is over ended."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )


async def next_message(call: grpc.aio.StreamStreamCall) -> Answer:
    answer = Answer()
    message = await call.read()
    assert isinstance(message, pb.GenerateOut), await call.code()
    answer.take(message)
    return answer


@contextlib.asynccontextmanager
async def running(directory: Path, capacity: str = "64MiB", **fields: Any) -> AsyncIterator[Worker]:
    """The service on the demo checkpoint in fp32, with a tier in ``directory``."""
    url = fields.pop("store", f"shm://{directory}/tier?capacity={capacity}")
    key_file = fields.pop("store_key_file", None)
    settings = LLMConfig(
        model=ModelConfig(dtype="float32", device="cpu", threads=1),
        rpc=fields.pop("rpc", RpcConfig(drain_timeout_s=0.5)),
        store=StoreConfig(store=url, store_key_file=key_file),
        **{"kv_cache_tokens": 4096, "max_model_len": 1024, **fields},
    )
    store = open_store(url, seal=Seal.load(key_file))
    with contextlib.closing(store):
        async with open_worker(settings) as servicer:
            worker = Worker(servicer, store)
            try:
                yield worker
                await worker.idle()
            finally:
                await worker.channel.close()
                await servicer.server.grpc.stop(grace=0)
