"""Two revisions of a checkpoint in one registry: their workers are never mixed, and one is rolled
out beside the other under load without a request that fails."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.workers.pairing import revision_of
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.config import CheckpointConfig
from opticnerve.config.shared import RegistryConfig
from tests.checkpoints import DEMO
from tests.fakes import FakeEncoder, FakeLLM, until
from tests.gateways import data_url, stack, user
from tests.redis import PATIENT, RedisServer
from tests.registry import Member, member

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("one_loop"),
    pytest.mark.redis,
    pytest.mark.process,
    pytest.mark.slow,
]


@pytest.fixture
def url() -> Iterator[str]:
    with RedisServer() as running:
        yield f"{running.url}?{PATIENT}"


@pytest.fixture(scope="module")
def next_revision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with one weight changed."""
    path = Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("next") / "demo"))
    entry = next(iter(Checkpoint.open(str(path)).tensor_index().values()))
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(bytes([255 - entry.file.read_bytes()[entry.start]]))
    return path


@dataclass
class Workers:
    """The workers of one revision, and their entries."""

    encoder: FakeEncoder
    llm: FakeLLM
    members: tuple[Member, Member]

    @property
    def addresses(self) -> set[str]:
        return {self.encoder.address, self.llm.address}

    async def drain(self) -> None:
        """What a worker does at SIGTERM: it says so, and takes nothing new."""
        for each in self.members:
            each.state = "draining"
        for fake in (self.encoder, self.llm):
            await fake.set_serving(False)
        await until(lambda: not (self.encoder.running or self.llm.running))


@contextlib.asynccontextmanager
async def workers(url: str, revision: str) -> AsyncIterator[Workers]:
    async with (
        FakeEncoder(f"encoder-{revision[:6]}", revision) as encoder,
        FakeLLM(pair_id=revision) as llm,
        member(url, encoder) as eye,
        member(url, llm) as mouth,
    ):
        yield Workers(encoder, llm, (eye, mouth))


def gateway(url: str, model: Path | None = None) -> Any:
    return stack(
        encoders=0,
        llms=0,
        ready=False,
        model=CheckpointConfig(model=model and str(model)),
        store=RegistryConfig(registry=url),
        drain_timeout_s=20.0,
    )


def known(s: Any) -> set[str]:
    pipeline = s.gateway.pipeline
    return {each.address for each in (*pipeline.encoders.pool.workers, *pipeline.llms.workers)}


@contextlib.asynccontextmanager
async def load(route: list[Any]) -> AsyncIterator[list[tuple[int, str]]]:
    """Requests with a picture, to the gateway in ``route``, while the context lasts; yields their
    statuses and revisions."""
    answers: list[tuple[int, str]] = []
    ending = asyncio.Event()

    async def chat() -> None:
        while not ending.is_set():
            answer = await route[0].chat(user("What?", data_url()))
            answers.append((answer.status_code, answer.json().get("system_fingerprint")))

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(chat())
        yield answers
        ending.set()


async def test_a_revision_is_rolled_out_beside_another_without_a_failed_request(
    url: str, next_revision: Path
) -> None:
    old, new = (Checkpoint.open(path).pair_id for path in (None, str(next_revision)))
    async with contextlib.AsyncExitStack() as stays, contextlib.AsyncExitStack() as leaves:
        a = await leaves.enter_async_context(workers(url, old))
        before = await leaves.enter_async_context(gateway(url))
        await until(lambda: before.gateway.pipeline.pairing.has_been_ready)
        route = [before]
        async with load(route) as answers:
            await until(lambda: len(answers) > 3)
            b = await stays.enter_async_context(workers(url, new))
            after = await stays.enter_async_context(gateway(url, next_revision))
            await until(lambda: after.gateway.pipeline.pairing.has_been_ready)
            assert (await after.client.get("/ready")).status_code == 200
            for s in (before, after):
                await until(lambda s=s: known(s) == a.addresses | b.addresses)
            assert not (b.llm.starts or b.encoder.calls)
            route[0] = after
            await until(lambda: revision_of(new) in {revision for _, revision in answers})
            before.server.running.stop()
            await until(lambda: not before.gateway.admission.requests.held)
            await a.drain()
            await leaves.aclose()
            await until(lambda: known(after) == b.addresses)
            many = len(answers)
            await until(lambda: len(answers) > many + 3)
        assert {status for status, _ in answers} == {200}
        served = [revision for _, revision in answers]
        assert set(served) == {revision_of(old), revision_of(new)}
        assert len(a.llm.starts) == served.count(revision_of(old))
        assert len(b.llm.starts) == served.count(revision_of(new))


async def test_workers_of_another_revision_are_known_and_not_used(
    url: str, next_revision: Path
) -> None:
    old, new = (Checkpoint.open(path).pair_id for path in (None, str(next_revision)))
    async with (
        gateway(url) as s,
        FakeEncoder(pair_id=old) as encoder,
        member(url, encoder),
        FakeLLM(pair_id=new) as strange,
        member(url, strange),
    ):
        address = strange.address
        await until(s.gateway.pipeline.llms.serving)
        await until(s.gateway.pipeline.encoders.pool.serving)
        told = (await s.client.get("/health")).json()
        assert told["status"] == "unavailable"
        assert told["missing"] == [f"no LLM is serving ({address} is serving another revision)"]
        assert told["llms"]["workers"][0]["revision"] == revision_of(new)
        async with FakeLLM(pair_id=old) as llm, member(url, llm):
            await until(lambda: s.gateway.pipeline.pairing.has_been_ready)
            assert (await s.chat(user("What?", data_url()))).status_code == 200
            assert not strange.starts
