"""Engines without a model that do what prompts say, in a thread or a process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from llm_service.engine.client import EngineClient, ProcessEngineClient, ThreadEngineClient
from llm_service.engine.engine import Emit, Engine
from llm_service.engine.stream import EventStream
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import Event, GenerateRequest, TokensEvent
from llm_service.policy.step_plan import StepPlan, WorkResult
from opticnerve.errors import (
    ConfigError,
    DeviceLost,
)
from opticnerve.generation.values import Sampling
from opticnerve.media.plan import Grid, Modality, Span
from tests.fake_runner import FakeRows, FakeRunner
from tests.system import wait_for

CONFIG = EngineConfig(
    num_blocks=32,
    block_size=16,
    max_model_len=512,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    check_integrity=True,
)
LOST, BROKEN, KILLED, PAUSED = 41, 42, 43, 44  # First tokens of prompts that do as they say.
PAUSE_DIRECTORY = "TEST_PAUSE_DIRECTORY"  # There a step that waits says so, and is told to go on.
PICTURE = Span(2, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4))


class ScriptedRunner(FakeRunner):
    """Loses its device, breaks, kills its process or waits when a prompt says so."""

    def execute(self, plan: StepPlan) -> list[WorkResult]:
        orders = {work.seq.token_ids[0] for work in plan.works if not work.start}
        if LOST in orders:
            raise DeviceLost("the device is gone")
        if BROKEN in orders:
            raise RuntimeError("broken")
        if KILLED in orders:
            os.kill(os.getpid(), signal.SIGKILL)
        if PAUSED in orders:
            here = Path(os.environ[PAUSE_DIRECTORY])
            (here / "paused").touch()
            wait_for("the order to go on", lambda: (here / "go").exists())
        return super().execute(plan)


class LateRows(FakeRows):
    """Rows are there once they were asked about twice."""

    def ready(self, key: str) -> bool:
        known = key in self.present
        self.present.add(key)
        return known


def build(config: EngineConfig, emit: Emit) -> Engine:
    rows = LateRows()
    return Engine(config, ScriptedRunner(config, rows), rows, emit)


def refuse(config: EngineConfig, emit: Emit) -> Engine:
    raise ConfigError("no such device", param="device")


def explode(config: EngineConfig, emit: Emit) -> Engine:
    raise ZeroDivisionError


class BuggyEngine(Engine):
    def check_integrity(self) -> None:
        raise RuntimeError("a page is lost")


def buggy(config: EngineConfig, emit: Emit) -> Engine:
    return BuggyEngine(config, ScriptedRunner(config, FakeRows()), FakeRows(), emit)


class Unreadable:
    """Pickles, and does not come back."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("not a number",)


def garble(config: EngineConfig, emit: Emit) -> Engine:
    emit([Unreadable()])  # type: ignore[list-item]
    return build(config, emit)


Open = Callable[..., Any]


def opener(place: str) -> Open:
    """Opens clients of engines in a "thread" or a "process" of their own."""
    kind = ThreadEngineClient if place == "thread" else ProcessEngineClient

    @asynccontextmanager
    async def opened(factory: str = "build", config: Any = CONFIG) -> AsyncIterator[EngineClient]:
        client: EngineClient = kind(f"tests.scripted_engines:{factory}", config)
        try:
            await client.start()
            yield client
        finally:
            await client.close()

    return opened


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(200):
            await test()

    asyncio.run(limited())


def request(name: str, length: int = 20, **fields: Any) -> GenerateRequest:
    first = fields.pop("first", 1)
    sampling = Sampling(**{"max_tokens": 10, **fields.pop("sampling", {})})
    return GenerateRequest(name, (first, *[3] * (length - 1)), sampling=sampling, **fields)


async def collect(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    return [
        token
        for event in events
        if isinstance(event, TokensEvent) and event.delta.choice == choice
        for token in event.delta.token_ids
    ]
