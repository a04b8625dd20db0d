"""Encoders whose advertised address is somebody else's, behind a gateway: none of their pictures is
begun that would fail, and what is wrong is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from gateway.workers import encoder_check as reachability
from gateway.workers import pool as pools
from opticnerve.config import RpcConfig
from opticnerve.pb import embedding_pb2
from tests import encoders
from tests.fakes import FakeEncoder, until
from tests.gateways import PAIR_ID, data_url, stack, user
from tests.system import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


@contextlib.asynccontextmanager
async def two_encoders(tmp_path: Path, *, crossed: bool) -> AsyncIterator[tuple[str, str]]:
    """Two real encoder servers, each of which advertises its own address or the other's."""
    ports = free_port(), free_port()
    told = ports[::-1] if crossed else ports
    async with contextlib.AsyncExitStack() as exits:
        for number, (port, advertise) in enumerate(zip(ports, told, strict=True)):
            rpc = RpcConfig(port=port, advertise=f"127.0.0.1:{advertise}")
            directory = tmp_path / str(number)
            running = encoders.running(directory, rpc=rpc, pair_id=PAIR_ID)
            await exits.enter_async_context(running)
        yield f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"


def workers(told: Any) -> dict[str, dict[str, Any]]:
    return {worker["address"]: worker for worker in told["encoders"]["workers"]}


async def test_encoders_with_crossed_addresses_get_no_pictures_and_health_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "UNUSABLE_WAIT_S", 0.2)
    async with (
        asyncio.timeout(100),  # Less than a request waits for workers that may come.
        two_encoders(tmp_path, crossed=True) as (one, two),
        stack(encoders=0, encoder_addresses=(one, two), ready=False) as s,
    ):
        pool = s.gateway.pipeline.encoders.pool
        await until(lambda: all(worker.fault for worker in pool.workers))
        await until(s.gateway.pipeline.llms.serving)
        told = (await s.client.get("/health")).json()
        assert told["status"] == "degraded" and told["encoders"]["serving"] == 0
        for address, other in ((one, two), (two, one)):
            shown = workers(told)[address]
            assert shown["state"] == "unusable"
            assert f"advertises {other} (--advertise), where another process" in shown["fault"]
        assert (await s.client.get("/ready", params={"pictures": "true"})).status_code == 503
        refused = await s.chat(user("What?", data_url()))
        message = refused.json()["error"]["message"]
        assert refused.status_code == 503 and "unusable; /health says why" in message
        assert (await s.chat(user("Hello"))).status_code == 200
        assert s.llm.refs == []  # No LLM worker heard of a wrong address.
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    for address, other in ((one, two), (two, one)):
        (line,) = [r.getMessage() for r in logged if f"encoder {address} " in r.getMessage()]
        assert other in line and "--advertise" in line


async def test_encoders_that_advertise_themselves_are_used(tmp_path: Path) -> None:
    async with (
        two_encoders(tmp_path, crossed=False) as (one, two),
        stack(encoders=0, encoder_addresses=(one, two)) as s,
    ):
        assert (await s.chat(user("What?", data_url()))).status_code == 200
        told = (await s.client.get("/health")).json()
        assert told["status"] == "ok"
        assert {worker["fault"] for worker in told["encoders"]["workers"]} == {None}
        (ref,) = s.llm.refs
        assert ref.location.fetch_address in (one, two)


class Advertising(FakeEncoder):
    """Says that it is elsewhere."""

    def __init__(self, advertise: str = "") -> None:
        super().__init__(pair_id=PAIR_ID)
        self.advertise = advertise
        self.instance_id = uuid4().hex


async def test_where_nobody_answers_is_told_and_a_mended_address_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reachability, "RECHECK_S", 0.0)
    nowhere = f"127.0.0.1:{free_port()}"
    async with (
        Advertising(nowhere) as wrong,
        Advertising() as right,
        stack(encoders=0, encoder_addresses=(wrong.address, right.address)) as s,
    ):
        for color in ("red", "green", "blue"):
            assert (await s.chat(user("What?", data_url(color)))).status_code == 200
        assert (len(wrong.calls), len(right.calls)) == (0, 3)
        told = workers((await s.client.get("/health")).json())
        assert "where nothing answers" in told[wrong.address]["fault"]
        wrong.advertise = ""
        pool = s.gateway.pipeline.encoders.pool
        await until(lambda: len(pool.serving()) == 2)
        assert (await s.client.get("/health")).json()["status"] == "ok"


async def test_with_a_shared_store_a_wrong_address_is_used_and_told_to_nobody() -> None:
    shared = embedding_pb2.StoreState(kind="redis", reachable=True)
    nowhere = f"127.0.0.1:{free_port()}"
    async with (
        Advertising(nowhere) as encoder,
        stack(encoders=0, encoder_addresses=(encoder.address,), ready=False) as s,
    ):
        encoder.store = s.llm.store = shared
        await until(lambda: not s.gateway.pipeline.pairing.missing())
        assert (await s.chat(user("What?", data_url()))).status_code == 200
        (ref,) = s.llm.refs
        assert ref.location.redis and not ref.location.fetch_address
        told = (await s.client.get("/health")).json()
        assert told["status"] == "degraded"
        shown = workers(told)[encoder.address]
        assert shown["state"] == "serving" and nowhere in shown["fault"]
        encoder.store = embedding_pb2.StoreState(kind="redis", reachable=False)
        pool = s.gateway.pipeline.encoders.pool
        await until(lambda: not pool.serving())  # From here on it would have to be fetched.


def keyed(key_id: str) -> embedding_pb2.StoreState:
    return embedding_pb2.StoreState(kind="redis", reachable=True, key_id=key_id)


async def test_an_encoder_whose_embeddings_llm_workers_refuse_gets_no_pictures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        Advertising() as encoder,
        stack(
            encoders=0, encoder_addresses=(encoder.address,), ready=False, worker_wait_s=0.2
        ) as s,
    ):
        encoder.store, s.llm.store = keyed("one"), keyed("other")
        pool = s.gateway.pipeline.encoders.pool
        await until(lambda: pool.workers[0].fault is not None)
        told = (await s.client.get("/health")).json()
        assert told["status"] == "degraded"
        assert f"--store-key-file of LLM {s.llm.address}" in workers(told)[encoder.address]["fault"]
        assert (await s.client.get("/ready", params={"pictures": "true"})).status_code == 503
        assert (await s.chat(user("What?", data_url()))).status_code == 503
        assert encoder.calls == []  # No picture is encoded in vain.
        encoder.store = keyed("other")
        await until(lambda: not s.gateway.pipeline.pairing.missing())
        assert (await s.chat(user("What?", data_url()))).status_code == 200
        assert (await s.client.get("/health")).json()["status"] == "ok"
    assert any("--store-key-file" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("ours", "theirs", "usable", "words"),
    [
        ("one", "", True, "find none of its embeddings in Redis"),  # It takes what it fetches.
        ("", "one", False, "refuse its embeddings"),
        ("one", "one", True, ""),
    ],
)
async def test_who_has_no_store_key_checks_nothing_and_who_has_one_refuses_unsigned(
    ours: str, theirs: str, usable: bool, words: str
) -> None:
    async with (
        Advertising() as encoder,
        stack(encoders=0, encoder_addresses=(encoder.address,), ready=False) as s,
    ):
        encoder.store, s.llm.store = keyed(ours), keyed(theirs)
        (worker,) = s.gateway.pipeline.encoders.pool.workers
        await until(lambda: worker.fault is not None if words else bool(worker.description.store))
        assert words in (worker.fault.text if worker.fault else "")
        await until(lambda: bool(s.gateway.pipeline.encoders.pool.serving()) is usable)
