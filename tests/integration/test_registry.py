"""Workers that gateways find in a registry, with a real Redis: they join, drain and leave, and
outlive Redis; what else is there harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from opticnerve.config.shared import RegistryConfig
from opticnerve.registry import redis_registry
from opticnerve.registry.entry import MAX_ENTRY_BYTES
from opticnerve.registry.redis_registry import Registry
from opticnerve.secret import make_secret
from tests.certificates import Authority
from tests.fakes import FakeEncoder, FakeLLM, until
from tests.gateways import PAIR_ID, data_url, stack, user
from tests.redis import PATIENT, RedisServer
from tests.registry import member
from tests.system import free_port

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("one_loop"),
    pytest.mark.redis,
    pytest.mark.process,
]
NAMESPACE = "tests"
SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def url(server: RedisServer) -> str:
    with redis.Redis(port=server.port) as client:
        client.flushall()
    return f"{server.url}?namespace={NAMESPACE}&{PATIENT}"


@contextlib.asynccontextmanager
async def gateway(url: str, **settings: Any) -> AsyncIterator[Any]:
    """A gateway that knows no worker but those of the registry."""
    found = {"store": RegistryConfig(registry=url), "worker_wait_s": 60.0, **settings}
    async with stack(encoders=0, llms=0, ready=False, **found) as s:
        yield s


@contextlib.asynccontextmanager
async def workers(url: str, **settings: Any) -> AsyncIterator[tuple[FakeEncoder, FakeLLM]]:
    """One of each kind, of the gateways' checkpoint, in the registry."""
    async with (
        FakeEncoder(pair_id=PAIR_ID) as encoder,
        FakeLLM(pair_id=PAIR_ID) as llm,
        member(url, llm, **settings),
        member(url, encoder, **settings),
    ):
        yield encoder, llm


def pools(s: Any) -> tuple[Any, Any]:
    return s.gateway.pipeline.encoders.pool, s.gateway.pipeline.llms


def states(pool: Any) -> dict[str, str]:
    return {worker.address: worker.state.value for worker in pool.workers}


def is_ready(s: Any) -> bool:
    return not s.gateway.pipeline.pairing.missing()


async def ask(s: Any) -> int:
    return int((await s.chat(user("What?", data_url()))).status_code)


async def test_workers_join_and_leave_a_gateway_that_knows_none(url: str) -> None:
    async with gateway(url) as s:
        eyes, mouths = pools(s)
        async with workers(url) as (encoder, llm):
            await until(lambda: is_ready(s))
            assert await ask(s) == 200
            assert states(eyes) == {encoder.address: "serving"}
            assert states(mouths) == {llm.address: "serving"}
            told = (await s.client.get("/health")).json()
            assert told["status"] == "ok"
            assert told["llms"]["workers"][0]["sources"] == ["registry"]
            assert told["llms"]["workers"][0]["revision"] == f"fp_{PAIR_ID[:12]}"
            (name,) = told["llms"]["sources"]
            assert name.startswith("registry redis://127.0.0.1") and "hush" not in name
        await until(lambda: not (eyes.workers or mouths.workers))


async def test_a_worker_that_is_killed_leaves_when_its_entry_expires(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_registry, "TTL_S", 2)
    async with gateway(url) as s, FakeLLM(pair_id=PAIR_ID) as llm:
        _, mouths = pools(s)
        registry = Registry(url)
        try:
            async with member(url, llm) as joined:
                await until(mouths.serving)
            await registry.put(joined.entry())  # It has left; its last heartbeat has not.
            await llm.die()
            mouths.report_down(mouths.workers[0])
            await until(lambda: states(mouths) == {llm.address: "dead"})
            await until(lambda: not mouths.workers)
        finally:
            await registry.close()


async def test_text_is_served_without_encoders_and_pictures_wait_for_one(url: str) -> None:
    async with (
        gateway(url, worker_wait_s=0.2) as s,
        FakeLLM(pair_id=PAIR_ID) as llm,
        member(url, llm),
    ):
        await until(s.gateway.pipeline.llms.serving)
        assert (await s.chat()).status_code == 200
        answer = await s.chat(user("What?", data_url()))
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "no encoder is known" in answer.json()["error"]["message"]
        for path in ("/ready", "/ready?pictures=true"):
            told = await s.client.get(path)
            assert told.status_code == 503  # Never yet could all be served.
            assert told.json()["missing"] == ["no encoder is known"]
        told = await s.client.get("/health")
        assert (told.status_code, told.json()["status"]) == (200, "degraded")
        assert told.json()["missing"] == ["no encoder is known"]
        async with FakeEncoder(pair_id=PAIR_ID) as encoder, member(url, encoder):
            await until(lambda: is_ready(s))
            assert await ask(s) == 200
            assert (await s.client.get("/ready")).status_code == 200
        eyes, _ = pools(s)
        await until(lambda: not eyes.workers)
        assert (await s.client.get("/ready")).status_code == 200  # Text is served.
        assert (await s.client.get("/ready?pictures=true")).status_code == 503


@contextlib.asynccontextmanager
async def load(s: Any) -> AsyncIterator[list[int]]:
    """Chats with a picture, one after the other while the context lasts; yields their statuses.
    All of them are answered."""
    answers: list[int] = []
    ending = asyncio.Event()

    async def chat() -> None:
        while not ending.is_set():
            answers.append(await ask(s))

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(chat())
        yield answers
        ending.set()
    assert set(answers) == {200}


async def more(answers: list[int]) -> None:
    """Waits for a few more answers."""
    before = len(answers)
    await until(lambda: len(answers) >= before + 4)


@pytest.mark.slow
async def test_no_request_is_lost_while_redis_is_flushed_killed_and_started_again(
    url: str, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "opticnerve.redis_server")
    async with gateway(url) as s, workers(url) as (encoder, llm):
        await until(lambda: is_ready(s))
        eyes, mouths = pools(s)
        known = {id(worker) for worker in (*eyes.workers, *mouths.workers)}
        async with load(s) as answers:
            await more(answers)
            with redis.Redis(port=server.port) as client:
                client.flushall()
                await until(lambda: len(client.keys("on:v1:worker:*")) == 2)  # They join again.
            await more(answers)
            server.stop()
            try:
                await until(lambda: eyes.troubles)
                await more(answers)
                told = (await s.client.get("/health")).json()
                assert told["status"] == "degraded"
                assert "the registry does not answer" in told["encoders"]["sources"].values()
            finally:
                server.start()
            await until(lambda: not (eyes.troubles or mouths.troubles))
            await more(answers)
            async with FakeLLM(pair_id=PAIR_ID) as another, member(url, another):
                await until(lambda: len(mouths.serving()) == 2)
                await more(answers)
            await until(lambda: len(mouths.workers) == 1)
        assert known == {id(worker) for worker in (*eyes.workers, *mouths.workers)}
        assert (states(eyes), states(mouths)) == (
            {encoder.address: "serving"},
            {llm.address: "serving"},
        )
    told = [each.message for each in caplog.records if "as the registry" in each.message]
    assert sum("fails" in each for each in told) == 3  # The gateway, and each of two workers.
    assert sum("answers again" in each for each in told) >= 3  # The worker that joined, once.


@pytest.mark.slow
async def test_a_gateway_that_is_started_before_redis_finds_workers_later(
    url: str, server: RedisServer
) -> None:
    server.stop()
    try:
        async with workers(url), gateway(url, worker_wait_s=0.2) as s:
            eyes, _ = pools(s)
            await until(lambda: eyes.troubles)
            answer = await s.chat()
            assert answer.status_code == 503
            told = answer.json()["error"]["message"]
            assert "no LLM is known; the registry does not answer" in told
            server.start()
            await until(lambda: is_ready(s))
            assert await ask(s) == 200
    finally:
        server.stop()
        server.start()


async def test_gateways_share_a_registry(url: str) -> None:
    async with gateway(url) as one, gateway(url) as another, workers(url) as (_, llm):
        for s in (one, another):
            await until(lambda s=s: is_ready(s))
            assert await ask(s) == 200
        async with FakeLLM(pair_id=PAIR_ID) as second, member(url, second):
            both = {llm.address: "serving", second.address: "serving"}
            for s in (one, another):
                await until(lambda s=s: states(s.gateway.pipeline.llms) == both)


async def test_deployments_in_one_redis_do_not_see_each_other(url: str) -> None:
    elsewhere = url.replace(f"namespace={NAMESPACE}", "namespace=other")
    async with gateway(url) as s, workers(elsewhere), workers(url) as (encoder, llm):
        await until(lambda: is_ready(s))
        eyes, mouths = pools(s)
        assert (list(states(eyes)), list(states(mouths))) == ([encoder.address], [llm.address])


async def test_a_worker_that_is_named_and_registered_is_one(url: str) -> None:
    async with workers(url) as (encoder, llm):
        named = {"llm_addresses": (llm.address,), "encoder_addresses": (encoder.address,)}
        async with gateway(url, **named) as s:
            _, mouths = pools(s)
            await until(lambda: len(mouths.workers[0].sources) == 2)
            told = (await s.client.get("/health")).json()
            (worker,) = told["llms"]["workers"]
            assert worker["sources"] == ["registry", "static"]
            assert await ask(s) == 200


async def test_a_process_that_is_known_by_two_addresses_gets_work_once(url: str) -> None:
    async with FakeLLM(pair_id=PAIR_ID) as llm:
        llm.instance_id = "ab" * 16
        name = llm.address.replace("127.0.0.1", "localhost")
        async with member(url, llm), gateway(url, llm_addresses=(name,)) as s:
            _, mouths = pools(s)
            await until(lambda: states(mouths) == {name: "serving", llm.address: "alias"})
            assert [worker.address for worker in mouths.serving()] == [name]


async def test_a_gateway_believes_only_entries_that_are_signed_with_its_token(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_secret(tmp_path, "token")
    token = path.read_text().strip()
    async with (
        workers(url) as unsigned,
        workers(url, token="e" * 40) as others,
        workers(url, token=token) as (encoder, llm),
        gateway(url, rpc_token_file=str(path)) as s,
    ):
        await until(lambda: is_ready(s))
        eyes, mouths = pools(s)
        assert await ask(s) == 200
        assert (list(states(eyes)), list(states(mouths))) == ([encoder.address], [llm.address])
        assert not any(each.starts for each in (unsigned[1], others[1]))
    warned = [each.message for each in caplog.records if "ignored" in each.message]
    assert len(warned) == 2 and all("--rpc-token-file" in each for each in warned)
    assert token not in caplog.text


async def test_whatever_else_is_in_redis_is_ignored_and_told_once(
    url: str, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    unsigned = "-" * 64
    wrong: dict[str, str] = {
        "a" * 32: "",
        "b" * 32: "x" * 2**20,
        "c" * 32: unsigned + "{",
        "d" * 32: unsigned + '{"instance_id": 7}',
        "e" * 32: unsigned + "[" * MAX_ENTRY_BYTES,
        "ü": unsigned + "{}",
    }
    with redis.Redis(port=server.port) as client:
        for name, value in wrong.items():
            client.set(f"on:v1:worker:{NAMESPACE}:{name}", value)
            client.zadd(f"on:v1:workers:{NAMESPACE}:llm", {name: 1e12})
        client.lpush(f"on:v1:worker:{NAMESPACE}:{'f' * 32}", "a list")
        client.zadd(f"on:v1:workers:{NAMESPACE}:llm", {"f" * 32: 1e12})
        client.set(f"on:v1:workers:{NAMESPACE}:encoder", "not a set")
    async with gateway(url) as s, FakeLLM(pair_id=PAIR_ID) as llm, member(url, llm):
        eyes, mouths = pools(s)
        await until(mouths.serving)
        assert (await s.chat()).status_code == 200
        assert list(states(mouths)) == [llm.address] and not eyes.workers
    warned = [each.message for each in caplog.records if "ignored" in each.message]
    assert len(warned) == 1 and "5 entries" in warned[0]


async def test_users_of_redis_need_no_more_than_the_docs_say(server: RedisServer, url: str) -> None:
    text = SECURITY.read_text()
    rules = re.findall(r"`((?:~on:v1:worker\*)?[ +a-z]+)`", text.partition("Gateways only read")[2])
    reads, writes = rules[:2]
    keys = reads.split()[0]
    with redis.Redis(port=server.port) as client:
        for name, rule in (("reader", reads), ("writer", f"{keys} {writes}")):
            client.execute_command("ACL", "SETUSER", name, "on", ">hush", *rule.split())
    reader, writer = (url.replace("//", f"//{name}:hush@") for name in ("reader", "writer"))
    async with gateway(reader) as s, workers(writer):
        await until(lambda: is_ready(s))
    eyes, mouths = pools(s)
    assert not (eyes.troubles or mouths.troubles)


async def test_a_registry_speaks_tls_with_those_that_are_known(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    there, worker, port = (
        authority.issue("server"),
        authority.issue("worker", "worker"),
        free_port(),
    )
    own = f"ssl_certfile={worker.certificate}&ssl_keyfile={worker.key}"
    url = f"rediss://127.0.0.1:{port}/0?{PATIENT}&ssl_ca_certs="
    with RedisServer(
        *("--tls-port", str(port), "--tls-ca-cert-file", authority.certificate),
        *("--tls-cert-file", there.certificate, "--tls-key-file", there.key),
    ):
        async with FakeLLM(pair_id=PAIR_ID) as llm:
            known = f"{url}{authority.certificate}&{own}"
            async with member(known, llm), gateway(known) as s:
                await until(s.gateway.pipeline.llms.serving)
        for wrong in (f"{url}{other.certificate}&{own}", url + authority.certificate):
            stranger = Registry(wrong)
            assert await stranger.entries("llm") is None
            await stranger.close()
