"""The example of three services in one process, under a debugger."""

import subprocess
import sys
from pathlib import Path

from encoder_service.backends.torch_backend import TorchBackend
from gateway.pipeline import Pipeline
from llm_service.policy.scheduler import Scheduler

ROOT = Path(__file__).parents[2]


def place(function):
    """file:line of a function's first statement."""
    code = function.__code__
    line = min(line for *_, line in code.co_lines() if line and line > code.co_firstlineno)
    return f"{code.co_filename}:{line}"


def test_pdb_stops_in_all_three_services_and_the_question_is_answered():
    places = [place(each) for each in (TorchBackend.encode, Scheduler.schedule, Pipeline.run)]
    commands = [*(f"tbreak {where}" for where in places), *["continue"] * (len(places) + 1), "quit"]
    ended = subprocess.run(
        [sys.executable, "-m", "pdb", "examples/one_process.py"],
        input="\n".join(commands) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    for where in places:
        assert f"Deleted breakpoint {places.index(where) + 1} at {where}" in ended.stdout
    assert "red star" in ended.stdout, ended.stdout + ended.stderr
