"""Encoders for tests: a backend without a model, a service in this process, and raw calls."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from encoder_service import service
from encoder_service.backends.base import Capacity, Embedding, Recovery, VisionModel
from encoder_service.servicer import EncoderServicer
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import EncoderConfig, RpcConfig, StoreConfig
from opticnerve.content_keys import content_key
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.store import Store
from opticnerve.errors import OpticNerveError
from opticnerve.media.plan import Overrides, Plan
from opticnerve.media.probe import parse_structure
from opticnerve.models.family import Layout
from opticnerve.models.registry import make_layout
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.pb import encoder_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.channel import chunks, open_channel
from opticnerve.rpc.errors import from_rpc
from tests.preprocessors import mean_colour

FINGERPRINT = "f" * 64
WAIT_S = 60.0
COLUMNS = 8
ANY = 10**15  # As a limit.
MAX_ITEM_PATCHES = 4096


def picture(seed: int = 0, size: tuple[int, int] = (84, 84), format: str = "PNG") -> bytes:
    """A picture of random blocks."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


class FakeBackend:
    """Rows are the picture's mean colour. ``hold`` makes batches wait for ``go``. The batches
    before ``begin``, those of the service's start, are not recorded and do not fail."""

    name, device, dtype, precision = "fake", "none", "F32", "float32"

    def __init__(
        self,
        fail: Callable[[Sequence[Plan]], None] = lambda plans: None,
        hidden_size: int = COLUMNS,
    ) -> None:
        self.hidden_size = hidden_size
        self.preprocess = mean_colour
        self.reference: FakeBackend | None = None
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)
        self._begun = False
        self._free = threading.Event()
        self._free.set()
        self.fail = fail
        self.lost = False  # Every failure is the device's.

    def begin(self) -> None:
        self._begun = True

    def hold(self) -> None:
        """From here on ``entered`` counts batches that wait for ``go``."""
        while self.entered.acquire(blocking=False):
            pass
        self._free.clear()

    def go(self) -> None:
        self._free.set()

    def encode(self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]) -> list[Embedding]:
        if self._begun:
            self.batches.append(len(plans))
            self.entered.release()
            assert self._free.wait(WAIT_S)
            self.fail(plans)
        return [
            {"rows": torch.full((plan.num_tokens, self.hidden_size), float(pixel.sum()))}
            for pixel, plan in zip(pixels, plans, strict=True)
        ]

    def classify(self, error: Exception) -> Recovery:
        if self.lost:
            return Recovery.STOP
        return Recovery.SPLIT if isinstance(error, MemoryError) else Recovery.ISOLATE

    def warm(self, largest: Plan, max_batch_patches: int) -> Capacity:
        return Capacity(max_batch_patches, MAX_ITEM_PATCHES)

    def close(self) -> None:
        self.go()


class Running:
    """A service in this process, with a fake backend, and calls to it."""

    def __init__(self, servicer: EncoderServicer, backend: FakeBackend) -> None:
        self.encoder = servicer.require_loaded()
        self.uploads = servicer.uploads
        self.backend = backend
        self.server = servicer.server
        self.channel = open_channel(self.server.address)
        self.stub = encoder_pb2_grpc.EncoderStub(self.channel)

    def messages(
        self, data: bytes, chunk: int = 2**20, **changes: object
    ) -> list[pb.EncodeRequest]:
        """The messages of an Encode call; ``changes`` replace fields of its header, to whose
        overrides the key belongs."""
        message = changes.get("overrides", convert.overrides_to_pb(Overrides()))
        overrides = convert.overrides_from_pb(message)
        header = {
            "request_id": "test",
            "key": content_key(data, self.encoder.model.layout.settings(), overrides, FINGERPRINT),
            "fingerprint": FINGERPRINT,
            "overrides": message,
            "num_bytes": len(data),
        }
        if "plan" not in changes:
            plan = self.encoder.model.layout.plan(parse_structure(data, ANY, ANY), overrides)
            header["plan"] = convert.plan_to_pb(plan)
        first = pb.EncodeRequest(header=pb.EncodeHeader(**{**header, **changes}))
        return [first, *(pb.EncodeRequest(data=part) for part in chunks(data, chunk))]

    def encode(
        self, data: bytes, timeout: float = WAIT_S, **changes: object
    ) -> grpc.aio.StreamUnaryCall:
        return self.stub.Encode(iter(self.messages(data, **changes)), timeout=timeout)

    async def fetch(self, key: str) -> bytes:
        parts = [part async for part in self.stub.Fetch(pb.FetchRequest(key=key), timeout=WAIT_S)]
        assert parts[0].num_bytes == sum(len(part.data) for part in parts)
        return b"".join(part.data for part in parts)


def demo_layout() -> Layout:
    return make_layout(Checkpoint.open(None))


async def refusal(call: grpc.aio.StreamUnaryCall) -> OpticNerveError:
    """The typed error that a call ends in."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


def key_file(directory: Path, secret: str) -> str:
    directory.mkdir(exist_ok=True)
    path = directory / "store-key"
    path.touch(0o600)
    path.write_text(secret)
    return str(path)


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path,
    *,
    backend: FakeBackend | None = None,
    store: Store | None = None,
    secret: str | None = None,
    drain_timeout_s: float = 10.0,
    pair_id: str = "pair",
    rpc: RpcConfig | None = None,
    registry: str = "",
    **settings: Any,
) -> AsyncIterator[Running]:
    """The service on a fake backend. ``secret``: of its --store-key-file. ``settings``: other
    fields of ``EncoderConfig``."""
    backend = backend or FakeBackend()
    store = store or MemoryStore()
    model = VisionModel("fake", "qwen2_vl", pair_id, FINGERPRINT, demo_layout(), backend)
    config = EncoderConfig(
        rpc=rpc or RpcConfig(drain_timeout_s=drain_timeout_s),
        store=StoreConfig(registry=registry, store_key_file=secret and key_file(tmp_path, secret)),
        **{
            "max_batch_patches": 1024,
            "max_item_bytes": 2**20,
            "max_image_pixels": 10**7,
            "preprocess_workers": 2,
            **settings,
        },
    )
    with (
        contextlib.closing(store),
        mock.patch.object(service, "base_directory", lambda: tmp_path),
    ):
        async with service.open_worker(config, lambda _: model, lambda *_: store) as servicer:
            backend.begin()
            live = Running(servicer, backend)
            try:
                yield live
            finally:
                backend.close()
                await live.channel.close()
                await live.server.grpc.stop(grace=0)
    live.encoder.backlog.check_integrity()
    assert live.encoder.backlog.items == 0 and live.encoder.pool.staging.held == 0
    assert len(live.uploads) == 0 and live.uploads.num_bytes == 0
