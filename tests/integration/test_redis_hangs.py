"""A Redis that is stopped and not dead, under all three services."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from opticnerve.embeddings import redis_store
from opticnerve.embeddings.redis_store import RedisStore
from tests.integration.test_damage import ask, gateway
from tests.integration.test_damage_redis import stack
from tests.integration.test_store_redis import count_calls
from tests.redis import RedisServer, find_redis_server

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="redis-server is not installed"),
]


def test_requests_go_on_and_do_not_ask_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "CONNECT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(redis_store, "ANSWER_TIMEOUT_S", 2.0)  # Busy is not hung.
    monkeypatch.setattr(redis_store, "WATCH_S", 600.0)  # What is counted is the requests'.

    async def scenario() -> None:
        async with (
            stack(tmp_path, server, together=False, options="") as running,
            gateway(running.encoder, running.llm) as client,
        ):
            first = await ask(client)
            theirs = running.encoder.encoder.results.store, running.llm.loaded.fetcher.store
            stores = [store for store in theirs if isinstance(store, RedisStore)]
            assert len(stores) == 2
            asked = [count_calls(store, monkeypatch) for store in stores]
            server.hang()
            try:
                for _ in range(5):
                    running.empty_tiers()
                    assert await ask(client) == first
                assert running.encoder.encoder.encoded_items == 6
                assert [len(calls) for calls in asked] == [1, 1]
                assert not any(store.state.reachable for store in stores)
            finally:
                server.go_on()
            for store in stores:
                store._look()
                assert store.state.reachable
            assert await ask(client) == first

    with RedisServer() as server:
        asyncio.run(scenario())
