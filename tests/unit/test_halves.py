"""The fast half of the tests starts no process."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.halves import ProcessGuard, ProcessStarted

ROOT = Path(__file__).parents[2]
NOTHING = [sys.executable, "-c", ""]

MARKED_AND_NOT = """
import contextlib, subprocess, pytest
from tests.halves import ProcessStarted

def start():
    subprocess.run(["true"])

def test_it_starts_one():
    start()

def test_it_starts_one_and_hides_that():
    with contextlib.suppress(ProcessStarted):
        start()

def test_it_starts_none():
    pass

@pytest.mark.process
def test_it_may():
    start()
"""


def spawn():
    multiprocessing.get_context("spawn").Process(target=print).start()


def fork():
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(NOTHING),
        lambda: os.posix_spawn(NOTHING[0], NOTHING, {}),
        lambda: os.system("true"),
        spawn,
        fork,
    ],
    ids=["subprocess", "posix_spawn", "system", "spawn", "fork"],
)
def test_no_process_starts_here(start, request):
    guard = request.config.pluginmanager.get_plugin(ProcessGuard.NAME)
    with pytest.raises(ProcessStarted, match=r"test_no_process_starts_here.*mark\.process"):
        start()
    guard.refused.clear()


@pytest.mark.process
def test_who_is_not_marked_and_starts_one_fails(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(MARKED_AND_NOT)
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_configure\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S*::(\w+)", ended.stdout, re.M))
    assert failed == {"test_it_starts_one", "test_it_starts_one_and_hides_that"}, ended.stdout
