"""Workers that a gateway finds in a registry, with a real Redis: they join, leave, and outlive
Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from opticnerve.config.shared import RegistryConfig
from tests.fakes import FakeEncoder, FakeLLM, until
from tests.gateways import PAIR_ID, data_url, stack, user
from tests.redis import PATIENT, RedisServer
from tests.registry import member

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("one_loop"),
    pytest.mark.redis,
    pytest.mark.process,
]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def url(server: RedisServer, request: pytest.FixtureRequest) -> str:
    """A namespace of the test's own."""
    return f"{server.url}?namespace={request.node.name[:60].strip('[]')}&{PATIENT}"


@contextlib.asynccontextmanager
async def gateway(url: str, **settings: Any) -> AsyncIterator[Any]:
    """A gateway that knows no worker but those of the registry."""
    found = {"store": RegistryConfig(registry=url), **settings}
    async with stack(encoders=0, llms=0, ready=False, **found) as s:
        yield s


def states(pool: Any) -> dict[str, str]:
    return {worker.address: worker.state.value for worker in pool.workers}


async def test_workers_join_and_leave_a_gateway_that_knows_none(url: str) -> None:
    async with gateway(url) as s, FakeEncoder(pair_id=PAIR_ID) as encoder, FakeLLM() as llm:
        llm.pair_id = PAIR_ID
        encoders, llms = s.gateway.pipeline.encoders.pool, s.gateway.pipeline.llms
        async with member(url, llm), member(url, encoder):
            await until(lambda: s.gateway.pipeline.pairing.has_been_ready)
            assert (await s.chat(user("What?", data_url()))).status_code == 200
            assert states(llms) == {llm.address: "serving"}
            assert states(encoders) == {encoder.address: "serving"}
        await encoder.die()
        await llm.die()
        await until(lambda: not (encoders.workers or llms.workers))
