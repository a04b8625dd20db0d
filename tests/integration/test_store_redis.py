"""The Redis store against a real server: shared bytes, time to live, faults, secrets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis
import torch

from opticnerve import redis_server
from opticnerve.embeddings import redis_store
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.redis_store import PREFIX, RedisStore
from opticnerve.embeddings.store import StoreState
from opticnerve.errors import ConfigError, EmbeddingCorrupt, StoreError
from tests.damage import UNREADABLE
from tests.redis import RedisServer, commands, find_redis_server
from tests.system import wait_for

pytestmark = [
    pytest.mark.process,
    pytest.mark.redis,
    pytest.mark.skipif(find_redis_server() is None, reason="redis-server is not installed"),
]


def key(number: int) -> str:
    return f"{number:064x}"


def rows(number: int) -> dict[str, torch.Tensor]:
    return {"rows": torch.full((8, 512), float(number)).bfloat16()}


TIMEOUTS = redis_store.CONNECT_TIMEOUT_S, redis_store.ANSWER_TIMEOUT_S  # As they are in use.


def opened(url: str, ttl_s: int = 60) -> RedisStore:
    separator = "&" if "?" in url else "?"
    store = open_store(f"{url}{separator}local=memory://", ttl_s=ttl_s)
    assert isinstance(store, RedisStore)
    return store


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that gets no core for a while is not one that is down."""
    monkeypatch.setattr(redis_store, "CONNECT_TIMEOUT_S", 30.0)
    monkeypatch.setattr(redis_store, "ANSWER_TIMEOUT_S", 30.0)
    monkeypatch.setattr(redis_store, "SEND_TIMEOUT_S", 30.0)
    monkeypatch.setattr(redis_store, "WATCH_S", 600.0)  # Tests ask by themselves.


@dataclass
class Clock:
    """Stands in for ``time``; it moves when told to."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(redis_server, "time", made)
    return made


def count_calls(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that a server is asked something."""
    asked: list[str] = []
    for client in (store._client, store._sender):
        for name in ("pipeline", "expire", "get", "set", "delete"):
            call = getattr(client, name)

            def counted(
                *args: object, name: str = name, call: object = call, **kwargs: object
            ) -> object:
                asked.append(name)
                return call(*args, **kwargs)  # type: ignore[operator]

            monkeypatch.setattr(client, name, counted)
    return asked


def use(store: RedisStore, number: int) -> None:
    """What requests do with an embedding that nobody has."""
    assert store.get(key(number)) is None
    assert store.read_bytes(key(number)) is None
    assert store.contains([key(number)]) == set()
    store.put(key(number), rows(number), {})  # The local tier takes it.
    store.delete(key(number))


def test_what_one_machine_puts_another_gets_and_keeps(server: RedisServer) -> None:
    writer, reader = opened(server.url), opened(server.url)
    writer.put(key(1), rows(1), {"family": "x"})
    assert reader.contains([key(1), key(2)]) == {key(1)}
    assert reader.local.contains([key(1)]) == set()
    entry = reader.get(key(1))
    assert entry is not None
    assert torch.equal(entry.tensors["rows"], rows(1)["rows"])
    assert entry.meta["family"] == "x"
    assert reader.local.contains([key(1)]) == {key(1)}
    assert reader.read_bytes(key(1)) == writer.read_bytes(key(1))
    writer.close()
    reader.close()


def test_time_to_live_first_writer_and_delete(server: RedisServer) -> None:
    store, other = opened(server.url, ttl_s=60), opened(server.url, ttl_s=60)
    client = redis.Redis(port=server.port)
    store.put(key(1), rows(1), {})
    assert 0 < client.ttl(PREFIX + key(1)) <= 60
    other.put(key(1), rows(2), {})
    fresh = opened(server.url, ttl_s=600)
    entry = fresh.get(key(1))
    assert entry is not None
    assert entry.tensors["rows"][0, 0] == 1
    assert client.ttl(PREFIX + key(1)) > 60  # A get keeps it longer.
    fresh.delete(key(1))
    assert client.exists(PREFIX + key(1)) == 0
    assert fresh.get(key(1)) is None
    for opened_store in (store, other, fresh):
        opened_store.close()
    client.close()


def test_large_embeddings_stay_local(server: RedisServer) -> None:
    store = opened(server.url + "?max_bytes=1000")
    store.put(key(1), rows(1), {})
    assert redis.Redis(port=server.port).exists(PREFIX + key(1)) == 0
    assert store.contains([key(1)]) == {key(1)}
    store.close()


def test_corrupt_values_are_deleted_and_said_once(server: RedisServer) -> None:
    store = opened(server.url)
    client = redis.Redis(port=server.port)
    client.set(PREFIX + key(1), b"garbage")
    with pytest.raises(EmbeddingCorrupt):
        store.get(key(1))
    assert store.get(key(1)) is None
    assert client.exists(PREFIX + key(1)) == 0
    store.close()
    client.close()


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("tier", ["redis", "local"])
def test_whatever_cannot_be_read_goes_from_both_tiers(
    server: RedisServer, tier: str, data: bytes
) -> None:
    store = opened(server.url)
    client = redis.Redis(port=server.port)
    assert isinstance(store.local, MemoryStore)
    for read in (store.get, store.read_bytes):
        client.set(PREFIX + key(1), data)
        if tier == "local":
            store.local._files[key(1)] = data
        if tier == "redis" or read == store.get:
            with pytest.raises(EmbeddingCorrupt):
                read(key(1))
            assert store.contains([key(1)]) == set()
            assert client.exists(PREFIX + key(1)) == 0
        assert store.state.reachable
    store.close()
    client.close()


def test_a_value_of_another_kind_is_corrupt_and_no_failure_of_the_server(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(server.url)
    client = redis.Redis(port=server.port)
    for read in (store.get, store.read_bytes):
        client.rpush(PREFIX + key(1), "a list")
        with pytest.raises(EmbeddingCorrupt):
            read(key(1))
        assert client.exists(PREFIX + key(1)) == 0
    assert store.state.reachable and "fails" not in caplog.text
    store.put(key(1), rows(1), {})
    assert client.exists(PREFIX + key(1)) == 1
    store.close()
    client.close()


def test_of_a_value_no_more_is_read_than_an_embedding_may_have(server: RedisServer) -> None:
    store = opened(server.url + "?max_bytes=1000")
    with redis.Redis(port=server.port) as client:
        for read in (store.get, store.read_bytes):
            client.set(PREFIX + key(1), bytes(20 * 2**20))
            before = client.info("stats")["total_net_output_bytes"]
            with pytest.raises(EmbeddingCorrupt):
                read(key(1))
            assert client.info("stats")["total_net_output_bytes"] - before < 2**20
            assert client.exists(PREFIX + key(1)) == 0
    store.close()


def test_redis_down_is_a_miss_with_one_warning(
    server: RedisServer,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = opened(server.url)
    store.put(key(1), rows(1), {})
    server.stop()
    asked = count_calls(store, monkeypatch)
    with caplog.at_level(logging.WARNING):
        for number in range(2, 30):
            use(store, number)
            clock.now += 60.0
        assert asked == ["pipeline"]  # Then nobody asks but the watch.
        store._look()
        assert asked == ["pipeline", "get"]
        use(store, 30)
        assert asked == ["pipeline", "get"]
    assert store.get(key(1)) is not None
    assert len([record for record in caplog.records if "Redis" in record.message]) == 1
    server.start()
    other = opened(server.url)
    store.put(key(50), rows(50), {})
    assert other.contains([key(50)]) == set()
    store._look()
    store.put(key(51), rows(51), {})
    assert other.contains([key(51)]) == {key(51)}
    other.close()
    store.close()


def test_a_server_that_hangs_is_waited_for_once(
    server: RedisServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server's own count: what it was sent while it hung it answers when it goes on."""
    monkeypatch.setattr(redis_store, "ANSWER_TIMEOUT_S", 2.0)
    store = opened(server.url)
    store.put(key(1), rows(1), {})
    store.local.delete(key(1))
    client = redis.Redis(port=server.port)
    before = commands(client)
    server.hang()
    for number in range(100, 110):
        use(store, number)
        clock.now += 60.0  # However long it hangs.
    assert store.state == StoreState("redis", reachable=False)
    server.go_on()
    wait_for("the first question's arrival", lambda: (commands(client) - before).total() > 1)
    assert commands(client) - before == Counter(getrange=1, expire=1)
    assert store.get(key(1)) is None  # No request finds out that it goes on:
    store._look()
    assert store.get(key(1)) is not None
    store.close()
    client.close()


def test_the_watch_sees_a_server_go_on(
    server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "WATCH_S", 0.01)
    monkeypatch.setattr(redis_store, "ANSWER_TIMEOUT_S", 2.0)
    with caplog.at_level(logging.INFO):
        store = opened(server.url)
        server.hang()
        wait_for("the failure", lambda: not store.state.reachable)
        assert "again" not in caplog.text
        server.go_on()
        wait_for("the recovery", lambda: store.state.reachable)
        wait_for("its record", lambda: "answers again" in caplog.text)
        store.close()


def test_answers_are_waited_for_tens_of_milliseconds() -> None:
    assert max(TIMEOUTS) < 0.1


def test_a_full_server_is_read_from_and_not_written_to(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer("--maxmemory-policy", "noeviction") as server, caplog.at_level(logging.INFO):
        writer, reader = opened(server.url), opened(server.url)
        client = redis.Redis(port=server.port)
        writer.put(key(1), rows(1), {})
        client.config_set("maxmemory", 1)  # Less than the server has in use: OOM is its answer.
        asked = count_calls(writer, monkeypatch)
        for number in range(2, 30):
            writer.put(key(number), rows(number), {})
            writer._look()
        assert asked == ["expire", "set", *["get", "set"] * 28]  # One by a request.
        assert writer.state.reachable and reader.get(key(1)) is not None
        assert caplog.text.count("refuses writes (OutOfMemoryError)") == 1
        assert "again" not in caplog.text and " fails " not in caplog.text
        assert client.keys(PREFIX + "*") == [(PREFIX + key(1)).encode()]
        writer.delete(key(1))
        assert client.exists(PREFIX + key(1)) == 0
        client.config_set("maxmemory", 0)
        writer._look()
        writer.put(key(40), rows(40), {})
        assert reader.get(key(40)) is not None
        assert caplog.text.count("takes writes again") == 1
        for each in (writer, reader, client):
            each.close()


def test_a_server_that_forbids_writes_is_read_from(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """EXPIRE, which a look-up sends as well, is one of them."""
    store = opened(server.url)
    store.put(key(1), rows(1), {})
    store.local.delete(key(1))
    client = redis.Redis(port=server.port)
    client.execute_command("ACL", "SETUSER", "default", "-@write")
    assert store.get(key(1)) is not None
    store.put(key(2), rows(2), {})
    assert store.state.reachable and " fails " not in caplog.text
    assert caplog.text.count("refuses writes (NoPermissionError)") == 1
    store.close()
    client.close()


def test_its_end_and_its_return_are_noticed_without_use(
    server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "WATCH_S", 0.01)
    with caplog.at_level(logging.INFO):
        store = opened(server.url)
        assert store.state == StoreState("redis", reachable=True)
        server.stop()
        wait_for("the failure", lambda: not store.state.reachable)
        server.start()
        wait_for("the recovery", lambda: store.state.reachable)
        wait_for("its record", lambda: "answers again" in caplog.text)
        store.close()
    assert caplog.text.count("look-ups there are misses") == 1


def test_values_are_never_decoded_as_text() -> None:
    with pytest.raises(ConfigError, match="decode_responses"):
        open_store("redis://127.0.0.1:1/0?decode_responses=true")


def test_neither_tier_takes_it(server: RedisServer) -> None:
    server.stop()
    store = open_store(server.url + "?local=memory://%3Fcapacity%3D100")
    with pytest.raises(StoreError):
        store.put(key(1), rows(1), {})
    store.close()


def test_credentials_work_and_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer("--requirepass", "s3cret-right") as server, caplog.at_level(logging.DEBUG):
        good = opened(f"redis://:s3cret-right@127.0.0.1:{server.port}/0")
        good.put(key(1), rows(1), {})
        bad = opened(f"redis://:s3cret-wrong@127.0.0.1:{server.port}/0")
        assert bad.get(key(1)) is None
        fresh = opened(f"redis://:s3cret-right@127.0.0.1:{server.port}/0")
        assert fresh.get(key(1)) is not None
        for store in (good, bad, fresh):
            store.close()
    assert "AuthenticationError" in caplog.text
    assert "s3cret" not in caplog.text
