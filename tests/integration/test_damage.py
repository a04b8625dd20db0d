"""Embeddings that are damaged or gone where they are kept: found out, deleted, encoded again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray

from encoder_service.backends.base import Embedding
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.ref import Location
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import EngineFailure, InvalidRequest
from opticnerve.media.plan import Plan
from opticnerve.rpc.errors import from_rpc
from tests import encoders, llms
from tests.encoders import FakeBackend, Running, picture
from tests.gateways import body, data_url, over, user
from tests.llms import Worker

pytestmark = pytest.mark.slow

DAMAGE = bytes(range(1, 51))


def damage(store: ShmStore) -> None:
    """Overwrites the last 50 bytes of rows in every embedding of a tier; headers stay whole."""
    files = list(store.directory.glob("*.safetensors"))
    assert files
    for path in files:
        with path.open("r+b") as file:
            file.seek(-len(DAMAGE), os.SEEK_END)
            file.write(DAMAGE)


class FarStore(MemoryStore):
    """Of those that other machines reach; what they have been given is in ``there``."""

    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.there: set[str] = set()

    def put(self, key: str, *rest: object) -> None:
        super().put(key, *rest)  # type: ignore[arg-type]
        self.there.add(key)

    def put_bytes(self, key: str, data: bytes) -> None:
        super().put_bytes(key, data)
        self.there.add(key)


# ---- the encoder


def test_damaged_bytes_are_not_fetched_and_encoded_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = ShmStore(tmp_path / "tier", 10**7)
        async with encoders.running(tmp_path, store=store) as encoder:
            data = picture(1)
            key = (await encoder.encode(data)).ref.key
            damage(store)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await encoder.fetch(key)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert not (await encoder.encode(data)).timings.hit
            assert await encoder.fetch(key)

    asyncio.run(scenario())


def test_what_a_consumer_could_not_use_is_checked_before_it_is_an_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = ShmStore(tmp_path / "tier", 10**7)
        async with encoders.running(tmp_path, store=store) as encoder:
            data = picture(1)
            first = await encoder.encode(data)
            assert (await encoder.encode(data, lost=True)).timings.hit
            damage(store)
            again = await encoder.encode(data, lost=True)
            assert not again.timings.hit and again.ref == first.ref
            assert encoder.backend.batches == [1, 1]

    asyncio.run(scenario())


def test_what_is_gone_where_others_look_is_put_there_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = FarStore()
        async with encoders.running(tmp_path, store=store) as encoder:
            data = picture(1)
            key = (await encoder.encode(data)).ref.key
            store.there.clear()
            assert (await encoder.encode(data)).timings.hit and not store.there
            assert (await encoder.encode(data, lost=True)).timings.hit
            assert store.there == {key}
            assert encoder.backend.batches == [1]

    asyncio.run(scenario())


class Overflowing(FakeBackend):
    """Makes infinite values for the pictures of one size."""

    def encode(
        self, pixels: Sequence[NDArray[np.float32]], plans: Sequence[Plan]
    ) -> list[Embedding]:
        outputs = super().encode(pixels, plans)
        for output, plan in zip(outputs, plans, strict=True):
            if plan.width == 140:
                output["rows"][1, 2] = float("inf")
        return outputs


def test_values_that_are_not_finite_fail_their_item_alone_and_are_not_stored(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        async with encoders.running(tmp_path, store=store, backend=Overflowing()) as encoder:
            good, bad = encoder.encode(picture(1)), encoder.encode(picture(2, (140, 84)))
            assert (await good).ref.num_rows == 9
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bad
            error = from_rpc(caught.value)
            assert isinstance(error, EngineFailure) and "finite" in error.message
            assert store.contains([(await good).ref.key]) and len(store._files) == 1
            assert not encoder.encoder.results.fallback.stored_bytes()

    asyncio.run(scenario())


# ---- the LLM


def test_own_rows_that_are_not_finite_are_the_callers_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        demo = llms.Demo()
        image = demo.picture(3)
        rows = image.rows["rows"].clone()
        rows[4, 5] = float("nan")
        bad = Location(inline=codec.to_bytes({"rows": rows}, {}))
        prompt = demo.prompt(4, image, 3)
        async with asyncio.timeout(250), llms.running(tmp_path) as llm:
            with pytest.raises(InvalidRequest, match="finite"):
                await llm.generate(prompt.start([image.ref(bad)]))
            assert (await llm.generate(prompt.start([llm.put(image)]))).tokens

    asyncio.run(scenario())


# ---- all three services, encoder and LLM on tiers of their own


def gateway(encoder: Running, llm: Worker) -> AbstractAsyncContextManager[httpx2.AsyncClient]:
    return over(encoder.server.address, llm.server.address)


async def ask(client: httpx2.AsyncClient) -> str:
    """The answer to a question about one and the same picture."""
    message = user("What is this?", data_url("red"))
    answer = await client.post(
        "/v1/chat/completions", json=body(message, max_tokens=8, temperature=0)
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_a_picture_whose_embedding_was_damaged_behind_fetch_is_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        checkpoint = Checkpoint.open(None)
        store = ShmStore(tmp_path / "encoder" / "tier", 10**7)
        backend = FakeBackend(hidden_size=192)
        async with (
            asyncio.timeout(250),
            encoders.running(
                tmp_path / "encoder", backend=backend, store=store, pair_id=checkpoint.pair_id
            ) as encoder,
            llms.running(tmp_path / "llm", no_prefix_caching=True) as llm,
            gateway(encoder, llm) as client,
        ):
            assert store.tier_id != llm.store.tier_id
            first = await ask(client)
            for round_ in (2, 3):
                damage(store)
                assert isinstance(llm.store, ShmStore)
                for path in llm.store.directory.glob("*.safetensors"):
                    path.unlink()
                assert await ask(client) == first
                assert encoder.encoder.encoded_items == round_

    asyncio.run(scenario())
