"""The fast half of the tests: those that are marked neither ``slow`` nor ``process``.

`make test-fast` runs them. They need no other process, and one that starts a process fails, also
in a run of all tests.
"""

from __future__ import annotations

import multiprocessing.util
import sys
from collections.abc import Generator
from typing import Any

import pytest

NOT_FAST = ("slow", "process")
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


class ProcessStarted(AssertionError):
    """A test of the fast half started a process."""


class ProcessGuard:
    """A pytest plugin that lets no test of the fast half start a process.

    The call that would start one raises ProcessStarted, and so does the end of the test, in case
    the test has caught the first.
    """

    NAME = "process-guard"

    def __init__(self) -> None:
        self._test = ""  # The id of the test that runs, if it is one of the fast half.
        self.refused: list[str] = []  # Its calls that would have started a process.
        sys.addaudithook(lambda event, _: self._refuse(event) if event in STARTS else None)
        self._spawn = multiprocessing.util.spawnv_passfds  # Python raises no audit event for it.
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
