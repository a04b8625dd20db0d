"""Damage in Redis and in the tiers beside it, through all three services: encoded anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import redis
import torch

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.embeddings import codec
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.redis_store import PREFIX, RedisStore
from opticnerve.embeddings.shm_store import ShmStore
from tests import encoders, llms
from tests.damage import UNREADABLE
from tests.encoders import FakeBackend, Running
from tests.integration.test_damage import ask, gateway
from tests.llms import Worker
from tests.redis import PATIENT, RedisServer, find_redis_server

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="redis-server is not installed"),
]

WIDTH = 192  # The demo checkpoint's.


OTHERWISE_FIT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "more rows": lambda rows: torch.cat([rows, rows]),
    "another type": torch.Tensor.half,
}
"""Rows that fit some reference: the engine, which has none, takes them from its own tier."""


def damaged(good: bytes) -> dict[str, bytes]:
    """What may stand where ``good`` stood."""
    rows = codec.from_bytes(good)[0]["rows"]
    others = {
        "a number": {"rows": torch.tensor(1.0)},
        "another width": {"rows": torch.ones(len(rows), WIDTH + 1)},
        "fewer rows": {"rows": rows[1:]},
        "a level more": {"rows": rows, "deepstack.0": rows},
        "no numbers": {"rows": torch.full_like(rows, float("nan"))},
        **{case: {"rows": made(rows)} for case, made in OTHERWISE_FIT.items()},
    }
    return {**UNREADABLE, **{case: codec.to_bytes(each, {}) for case, each in others.items()}}


@dataclass
class Stack:
    """An encoder and an LLM worker over one Redis."""

    encoder: Running
    llm: Worker
    client: redis.Redis
    tiers: list[Path]

    def stored(self) -> tuple[bytes, bytes]:
        """The key in Redis, and its value."""
        (name,) = self.client.keys(PREFIX + "*")
        return name, self.client.get(name)

    def empty_tiers(self) -> None:
        for tier in self.tiers:
            for path in tier.glob("*.safetensors"):
                path.unlink()

    def plant(self, data: bytes, *, in_tiers: bool) -> None:
        """``data`` in place of the only embedding: in Redis, and in each tier or in none."""
        name, _ = self.stored()
        self.client.set(name, data)
        for tier in self.tiers:
            path = tier / f"{name.decode().removeprefix(PREFIX)}.safetensors"
            path.unlink(missing_ok=True)
            if in_tiers:
                path.write_bytes(data)


@contextlib.asynccontextmanager
async def stack(
    directory: Path, server: RedisServer, *, together: bool, options: str = f"&{PATIENT}"
) -> AsyncIterator[Stack]:
    """``together``: encoder and LLM are on one machine, and share its tier. ``options``: of the
    stores' URLs."""
    tiers = [directory / "tier" if together else directory / name / "tier" for name in "ab"]
    urls = [f"{server.url}?local=shm://{tier}{options}" for tier in tiers]
    store = open_store(urls[0])
    assert isinstance(store, RedisStore) and isinstance(store.local, ShmStore)
    async with (
        asyncio.timeout(280),
        encoders.running(
            directory,
            backend=FakeBackend(hidden_size=WIDTH),
            store=store,
            pair_id=Checkpoint.open(None).pair_id,
        ) as encoder,
        llms.running(directory / "llm", store=urls[1], no_prefix_caching=True) as llm,
    ):
        with redis.Redis(port=server.port) as client:
            yield Stack(encoder, llm, client, tiers)


async def ask_without_references(running: Stack) -> str:
    """Through a gateway that has just started: it remembers no picture."""
    async with gateway(running.encoder, running.llm) as client:
        return await ask(client)


async def check(running: Stack, client: httpx2.AsyncClient, in_tiers: bool) -> None:
    first = await ask(client)
    name, good = running.stored()
    encoded = running.encoder.encoder.encoded_items
    cases = damaged(good)
    for case, data in cases.items():
        if in_tiers and case in OTHERWISE_FIT:
            continue
        running.plant(data, in_tiers=in_tiers)
        assert await ask(client) == first, case
        encoded += 1
        assert running.encoder.encoder.encoded_items == encoded, case
        assert running.stored() == (name, good), case
        for tier in running.tiers:
            for path in tier.glob("*.safetensors"):
                assert path.read_bytes() == good, case
    for case in ("no rows beyond torch", "another width"):
        running.plant(cases[case], in_tiers=in_tiers)
        assert await ask_without_references(running) == first
        encoded += 1
        assert running.encoder.encoder.encoded_items == encoded
        assert running.stored() == (name, good)


@pytest.mark.parametrize("in_tiers", [False, True], ids=["redis", "everywhere"])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_a_damaged_value_costs_one_encoding_and_no_error(
    tmp_path: Path, together: bool, in_tiers: bool
) -> None:
    async def scenario() -> None:
        async with (
            stack(tmp_path, server, together=together) as running,
            gateway(running.encoder, running.llm) as client,
        ):
            await check(running, client, in_tiers)

    with RedisServer() as server:
        asyncio.run(scenario())
