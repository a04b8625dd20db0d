"""Fixtures that more than one test file uses."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.halves import ProcessGuard

# A machine that is busy with other work is not a slow test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ProcessGuard(), ProcessGuard.NAME)


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command's main that runs in a test sets the whole process's logging up."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    for where in (sys, threading):
        monkeypatch.setattr(where, "excepthook", where.excepthook)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.captureWarnings(False)


@pytest.fixture
def faults() -> Callable[..., dict[tuple[str, ...], int]]:
    """``faults()``: the counters that the test has changed; see ``tests.fault_counters``."""
    from tests.fault_counters import watch

    return watch()


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``random_checkpoint(family, **options)``: ``tests.checkpoints.make_checkpoint``, made once
    a session for equal arguments. Read only: a test that changes files makes its own."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        from tests.checkpoints import make_checkpoint

        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = make_checkpoint(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked ``anyio`` run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """One event loop for all tests that ask for it: what gRPC still has to say about a channel
    after its test must not meet a closed loop."""
    yield
