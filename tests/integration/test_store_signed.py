"""What others write to Redis, or answer to Fetch, is never a picture's rows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import redis
import torch

from llm_service.rows.fetcher import Fetcher
from llm_service.rows.store_rows import StoreRows
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.redis_store import PREFIX, SIGNED_PREFIX, RedisStore
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.signing import MAC_BYTES, Seal
from opticnerve.errors import EmbeddingNotFound
from opticnerve.rpc import convert
from opticnerve.secret import make_secret, read_secret
from tests import encoders, llms
from tests.encoders import COLUMNS, FINGERPRINT, FakeBackend, Running, picture
from tests.integration.test_damage import ask, gateway
from tests.llms import Worker
from tests.redis import RedisServer, find_redis_server
from tests.stores import key, rows
from tests.unit.test_seal import refused

WIDTH = 192  # The demo checkpoint's.
SECRET, OTHER = "s" * 32, "t" * 32
Test = TypeVar("Test", bound=Callable[..., None])


def needs_redis(test: Test) -> Test:
    marks = (
        pytest.mark.process,
        pytest.mark.redis,
        pytest.mark.skipif(find_redis_server() is None, reason="no redis"),
    )
    for mark in marks:
        test = mark(test)
    return test


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def opened(server: RedisServer) -> Iterator[Callable[..., RedisStore]]:
    """``opened(secret)``: a store on the server; none watches it after the test."""
    with contextlib.ExitStack() as stack:

        def opened(secret: str | None = SECRET) -> RedisStore:
            seal = None if secret is None else Seal(secret)
            store = open_store(f"{server.url}?local=memory://", seal=seal)
            assert isinstance(store, RedisStore)
            stack.callback(store.close)
            return store

        yield opened


def name(number: int, secret: str = SECRET) -> str:
    return f"{SIGNED_PREFIX}{Seal(secret).id}:{key(number)}"


# ---- Redis


@needs_redis
@pytest.mark.parametrize("forged", ["wrong numbers", "moved", "unsigned", "foreign", "a list"])
def test_what_others_set_is_a_miss_and_goes_at_the_next_put(
    server: RedisServer, opened: Callable[..., RedisStore], forged: str
) -> None:
    writer, reader = opened(), opened()
    for number in (1, 2):
        writer.put(key(number), rows(number), {})
    fake = codec.to_bytes(rows(666), {})
    with redis.Redis(port=server.port) as client:
        good = {number: client.get(name(number)) for number in (1, 2)}
        values = {
            "wrong numbers": good[1][:MAC_BYTES] + fake,
            "moved": good[2],
            "unsigned": fake,
            "foreign": Seal(OTHER).mac(key(1), [fake]) + fake,
        }
        for read in (reader.get, reader.read_bytes):
            client.delete(name(1))
            if forged == "a list":
                client.rpush(name(1), fake)
            else:
                client.set(name(1), values[forged])
            before = refused("redis")
            assert read(key(1)) is None
            assert refused("redis") == before + 1
            assert client.exists(name(1)) == 0 and reader.local.contains([key(1)]) == set()
        client.delete(name(1))
        client.set(name(1), fake)
        opened().put(key(1), rows(1), {})
        assert client.get(name(1)) == good[1] and 0 < client.ttl(name(1)) <= 3600
    entry = reader.get(key(1))
    assert entry is not None and torch.equal(entry.tensors["rows"], rows(1)["rows"])
    assert reader.state.reachable


@needs_redis
def test_pools_of_different_secrets_share_a_server_and_never_meet(
    server: RedisServer, opened: Callable[..., RedisStore]
) -> None:
    stores = {secret: opened(secret) for secret in (SECRET, OTHER, None)}
    before = refused("redis")
    for number, store in enumerate(stores.values()):
        store.put(key(1), rows(number), {})
    for number, secret in enumerate(stores):
        entry = opened(secret).get(key(1))
        assert entry is not None and torch.equal(entry.tensors["rows"], rows(number)["rows"])
    assert refused("redis") == before
    with redis.Redis(port=server.port) as client:
        found = {each.decode() for each in client.keys("*")}
        assert found == {name(1), name(1, OTHER), PREFIX + key(1)}
        assert not any(SECRET in each or OTHER in each for each in found)


# ---- Fetch


def fetch_ref(found: EmbeddingRef) -> EmbeddingRef:
    return found.at(Location(fetch_address=found.location.fetch_address))


@pytest.mark.parametrize(
    ("encoders_secret", "used"), [(SECRET, True), (OTHER, False), (None, False)]
)
def test_rows_of_an_address_that_anyone_may_name_are_signed(
    tmp_path: Path, encoders_secret: str | None, used: bool
) -> None:
    async def scenario() -> None:
        tier, plain = MemoryStore(), MemoryStore()
        fetcher = Fetcher(tier, StoreRows(tier), COLUMNS, seal=Seal(SECRET))
        without = Fetcher(plain, StoreRows(plain), COLUMNS)
        async with encoders.running(tmp_path, secret=encoders_secret) as encoder:
            ref = fetch_ref(convert.ref_from_pb((await encoder.encode(picture(1))).ref))
            before = refused("fetch")
            with contextlib.nullcontext() if used else pytest.raises(EmbeddingNotFound):
                await fetcher.ensure(ref)
            assert refused("fetch") == before + (not used)
            assert tier.contains([ref.key]) == ({ref.key} if used else set())
            await without.ensure(ref)  # A worker without the secret takes them as ever.
            assert plain.contains([ref.key])
            await fetcher.close()
            await without.close()

    asyncio.run(scenario())


def test_rows_that_another_address_answers_are_not_shared(tmp_path: Path) -> None:
    """The caller's own server, which has rows of its own for a picture of somebody else's."""

    class Theirs(MemoryStore):
        def read_bytes(self, key: str) -> bytes | None:
            return codec.to_bytes({"rows": torch.full((9, COLUMNS), 666.0)}, {})

    async def scenario() -> None:
        tier = MemoryStore()
        fetcher = Fetcher(tier, StoreRows(tier), COLUMNS, seal=Seal(SECRET))
        async with (
            encoders.running(tmp_path / "ours", secret=SECRET) as ours,
            encoders.running(tmp_path / "theirs", store=Theirs()) as theirs,
        ):
            good = convert.ref_from_pb((await ours.encode(picture(1))).ref)
            with pytest.raises(EmbeddingNotFound):
                await fetcher.ensure(good.at(Location(fetch_address=theirs.server.address)))
            assert not tier.contains([good.key])
            await fetcher.ensure(fetch_ref(good))
            entry = tier.get(good.key)
            assert entry is not None and not (entry.tensors["rows"] == 666).any()
        await fetcher.close()

    asyncio.run(scenario())


# ---- all three services


@dataclass
class Stack:
    encoder: Running
    llm: Worker
    client: redis.Redis
    tiers: list[Path]
    secret: str

    @property
    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for tier in self.tiers for path in tier.glob("*.safe*")}

    def empty(self, *which: int) -> None:
        for index in which:
            for path in self.tiers[index].glob("*.safetensors"):
                path.unlink()


@contextlib.asynccontextmanager
async def stack(directory: Path, server: RedisServer) -> AsyncIterator[Stack]:
    """Encoder and LLM on tiers of their own, one Redis and one secret between them."""
    key_file = str(make_secret(directory, "secret"))
    secret = read_secret(key_file, "store_key_file")
    tiers = [directory / each / "tier" for each in "ab"]
    urls = [f"{server.url}?local=shm://{tier}" for tier in tiers]
    async with (
        asyncio.timeout(280),
        encoders.running(
            directory,
            backend=FakeBackend(hidden_size=WIDTH),
            store=open_store(urls[0], seal=Seal(secret)),
            pair_id=Checkpoint.open(None).pair_id,
            secret=secret,
        ) as encoder,
        llms.running(
            directory / "llm", store=urls[1], store_key_file=key_file, no_prefix_caching=True
        ) as llm,
    ):
        with redis.Redis(port=server.port) as client:
            yield Stack(encoder, llm, client, tiers, secret)


def planted(good: bytes) -> bytes:
    """A well-formed value of the right shapes, with the attacker's numbers."""
    tensors, meta = codec.from_bytes(good[MAC_BYTES:])
    assert meta["fingerprint"] == FINGERPRINT
    return codec.to_bytes({each: torch.full_like(t, 7.0) for each, t in tensors.items()}, meta)


@needs_redis
def test_another_users_picture_keeps_its_own_rows(tmp_path: Path, server: RedisServer) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, server) as running:
            async with gateway(running.encoder, running.llm) as client:
                first = await ask(client)
            (where,) = running.client.keys(f"{SIGNED_PREFIX}*")
            good, files = running.client.get(where), running.files
            assert len(files) == 2 and good[MAC_BYTES:] in files.values()
            fake = planted(good)
            content_key = where.decode().rpartition(":")[2]
            for value in (good[:MAC_BYTES] + fake, fake):
                for emptied in ((1,), (0, 1)):
                    running.client.set(where, value)
                    running.client.set(PREFIX + content_key, fake)
                    running.empty(*emptied)
                    async with gateway(running.encoder, running.llm) as client:
                        assert await ask(client) == first
                    assert set(running.files.values()) == {good[MAC_BYTES:]}
            assert running.client.get(where) == good

    asyncio.run(scenario())
