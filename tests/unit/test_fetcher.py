"""Bringing rows to a host: what is kept, what is deleted, what is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
import torch

from llm_service.rows import fetcher as fetcher_module
from llm_service.rows.fetcher import Fetcher
from llm_service.rows.store_rows import StoreRows
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import local_tier
from opticnerve.embeddings.redis_store import RedisStore
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.errors import EmbeddingCorrupt, EmbeddingNotFound, InvalidRequest
from opticnerve.telemetry.metrics import CACHE_LOOKUPS

KEY = "a" * 64
ROWS = {"rows": torch.arange(32.0).reshape(4, 8)}


class Elsewhere(RedisStore):
    """A Redis of one dictionary."""

    def __init__(self, held: dict[str, bytes]) -> None:
        self.local = MemoryStore()
        self.tier_id = ""
        self.held = held

    def read_bytes(self, key: str) -> bytes | None:
        return self.local.read_bytes(key) or self.held.get(key)

    def delete(self, key: str) -> None:
        self.local.delete(key)
        self.held.pop(key, None)


def ref(location: Location, rows: Mapping[str, torch.Tensor] = ROWS) -> EmbeddingRef:
    return EmbeddingRef(KEY, "f" * 64, codec.specs_of(rows), 4, location)


def test_bytes_that_are_corrupt_where_all_find_them_are_deleted() -> None:
    """Else the encoder, asked to encode again, finds them there and answers with them."""
    store = Elsewhere({KEY: codec.to_bytes(ROWS, {})[:-4] + b"\xff" * 4})

    async def main() -> None:
        fetcher = Fetcher(store, StoreRows(local_tier(store)), 8)
        try:
            with pytest.raises(EmbeddingCorrupt):
                await fetcher.ensure(ref(Location(redis=True)))
            assert store.held == {}
            store.held[KEY] = codec.to_bytes(ROWS, {})
            await fetcher.ensure(ref(Location(redis=True)))
            assert KEY in store.held
            assert store.local.contains([KEY]) == {KEY}
        finally:
            await fetcher.close()

    asyncio.run(main())


def lookups(result: str) -> float:
    return CACHE_LOOKUPS.labels(tier="memory", result=result)._value.get()


def test_each_picture_is_looked_up_once_as_metrics_count() -> None:
    """Looking before there is a reference, and reading again what was fetched, are no look-ups."""
    store = Elsewhere({KEY: codec.to_bytes(ROWS, {})})

    async def main() -> None:
        fetcher = Fetcher(store, StoreRows(local_tier(store)), 8)
        try:
            hits, misses = lookups("hit"), lookups("miss")
            assert not await fetcher.find(KEY)
            await fetcher.ensure(ref(Location(redis=True)))
            assert (lookups("hit"), lookups("miss")) == (hits, misses + 1)
            assert await fetcher.find(KEY)
            assert (lookups("hit"), lookups("miss")) == (hits + 1, misses + 1)
        finally:
            await fetcher.close()

    asyncio.run(main())


def test_rows_that_are_not_finite_are_nowhere_taken_for_rows() -> None:
    """The caller's own are its error; those that an encoder stored are deleted."""
    bad = codec.to_bytes({"rows": ROWS["rows"] * float("inf")}, {})
    store = Elsewhere({KEY: bad})

    async def main() -> None:
        fetcher = Fetcher(store, StoreRows(local_tier(store)), 8)
        try:
            with pytest.raises(InvalidRequest, match="finite"):
                await fetcher.ensure(ref(Location(inline=bad)))
            assert store.held
            with pytest.raises(EmbeddingCorrupt):
                await fetcher.ensure(ref(Location(redis=True)))
            assert not store.held
            store.local.put_bytes(KEY, bad)
            with pytest.raises(EmbeddingCorrupt):
                await fetcher.ensure(ref(Location(redis=True)))
            assert store.local.contains([KEY]) == set()
        finally:
            await fetcher.close()

    asyncio.run(main())


def test_who_waits_with_another_for_rows_that_are_no_good_tries_its_own() -> None:
    bad = codec.to_bytes({"rows": ROWS["rows"] * float("inf")}, {})
    store = MemoryStore()

    async def main() -> None:
        fetcher = Fetcher(store, StoreRows(local_tier(store)), 8)
        try:
            with fetcher.hold_own([KEY]):
                outcomes = await asyncio.gather(
                    fetcher.ensure(ref(Location(inline=bad))),
                    fetcher.ensure(ref(Location(inline=codec.to_bytes(ROWS, {})))),
                    return_exceptions=True,
                )
                assert isinstance(outcomes[0], InvalidRequest) and outcomes[1] is None
                assert store.contains([KEY]) == {KEY}
        finally:
            await fetcher.close()

    asyncio.run(main())


def test_channels_to_encoders_that_are_gone_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher_module, "MAX_CHANNELS", 2)

    async def main() -> None:
        store = MemoryStore()
        fetcher = Fetcher(store, StoreRows(store), 8)
        try:
            for port in (1, 2, 1, 3):  # Nobody listens there.
                with pytest.raises(EmbeddingNotFound):
                    await fetcher.ensure(ref(Location(fetch_address=f"127.0.0.1:{port}")))
            assert list(fetcher._channels) == ["127.0.0.1:1", "127.0.0.1:3"]
        finally:
            await fetcher.close()

    asyncio.run(main())


def test_rows_without_a_level_that_the_model_has_are_refused() -> None:
    level = {"deepstack.0": ROWS["rows"]}

    async def main() -> None:
        for tensors, fits in ((ROWS, False), ({**ROWS, **level}, True)):
            store = Elsewhere({KEY: codec.to_bytes(tensors, {})})
            fetcher = Fetcher(store, StoreRows(local_tier(store)), 8, levels=1)
            try:
                if fits:
                    await fetcher.ensure(ref(Location(redis=True), tensors))
                    continue
                with pytest.raises(EmbeddingCorrupt):
                    await fetcher.ensure(ref(Location(redis=True), tensors))
            finally:
                await fetcher.close()

    asyncio.run(main())
