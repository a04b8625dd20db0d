"""A stack whose owner dies: nothing of it is left."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import processes
from tests.system import alive, wait_for

OWNER = """
import time
import opticnerve
with opticnerve.serve() as stack:
    print(stack.process.pid, stack.url, flush=True)
    time.sleep(600)
"""


def store_of(pid):
    """The directory that `up` gave its children."""
    (line, *_) = [line for line in processes(pid).values() if "--store" in line]
    url = line.partition("--store ")[2].split()[0]
    return Path(url.removeprefix("shm://").partition("?")[0])


def closed(url):
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stack_ends_with_the_program_that_serves_it(number):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        pid, url = owner.stdout.readline().split()
        family = [int(pid), *processes(int(pid))]
        store = store_of(int(pid))
        assert store.is_dir() and len(family) == 4
        owner.send_signal(number)
    wait_for("the end of the stack", lambda: not any(alive(each) for each in family))
    assert not store.exists()
    assert closed(url)
