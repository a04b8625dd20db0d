"""The tests are two halves: those that are marked in ``NOT_FAST``, and the fast half.

`make test-fast` runs the fast half, for every change. It needs nothing but this process, and a
test of it that starts another one fails, however it is run.
"""

from __future__ import annotations

import multiprocessing.util
import sys
from collections.abc import Generator
from typing import Any

import pytest

NOT_FAST = ("slow", "process", "redis", "gpu")
FAST = " and ".join(f"not {mark}" for mark in NOT_FAST)  # As `make test-fast` gives it to -m.
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


class ProcessStarted(AssertionError):
    """A test of the fast half started a process."""


class ProcessGuard:
    """A pytest plugin that lets no test of the fast half start a process.

    The call that would start one raises ProcessStarted. Where the test hides that, its teardown
    raises it once more.
    """

    NAME = "process-guard"

    def __init__(self) -> None:
        self._test = ""  # The test of the fast half that runs now.
        self.refused: list[str] = []  # The calls of this test that would have started a process.
        sys.addaudithook(lambda event, _: self._refuse(event) if event in STARTS else None)
        self._spawn = multiprocessing.util.spawnv_passfds  # The one start that is not audited.
        multiprocessing.util.spawnv_passfds = self._guarded_spawn

    def _guarded_spawn(self, *args: Any) -> Any:
        self._refuse("multiprocessing")
        return self._spawn(*args)

    def _refuse(self, call: str) -> None:
        if self._test:
            self.refused.append(call)
            raise self._error()

    def _error(self) -> ProcessStarted:
        return ProcessStarted(
            f"{self._test} starts a process ({', '.join(self.refused)}): mark it "
            "@pytest.mark.process, so that `make test` runs it and `make test-fast` does not"
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        fast = not any(item.get_closest_marker(name) for name in NOT_FAST)
        self._test = item.nodeid if fast else ""
        self.refused.clear()
        try:
            return (yield)
        finally:
            self._test = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield
        if self.refused:
            raise self._error()
