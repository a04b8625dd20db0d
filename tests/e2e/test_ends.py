"""What is left of a stack after each of its ends: no process, no port, no file."""

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import opticnerve
from tests.e2e.processes import ask, picture, pids, processes
from tests.system import alive, free_port, wait_for


def made_for(stack):
    """The directories of the stack's own store and secrets, as its children were told."""
    line = next(line for line in processes(stack.process.pid).values() if "encoder_service" in line)
    secrets = [Path(found) for found in re.findall(r"--(?:store-key|rpc-token)-file (\S+)", line)]
    assert len(secrets) == 2
    assert all(stat.S_IMODE(secret.stat().st_mode) == 0o600 for secret in secrets)
    return Path(re.search(r"--store shm://(\S+)", line)[1]), *{each.parent for each in secrets}


def children_of(up):
    """Processes that live and were told that this one is their parent, whoever is it now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            told = f"\0--parent-pid\0{up}\0".encode() in path.read_bytes()
            if told and alive(pid := int(path.parent.name)):
                found.append(pid)
    return found


@contextlib.contextmanager
def nothing_is_left(**flags):
    """A stack whose end leaves no process, no port and no file."""
    port = free_port()
    with opticnerve.serve(port=port, **flags) as stack:
        up, directories = stack.process.pid, made_for(stack)
        assert len(children_of(up)) == 3
        assert all(stat.S_IMODE(each.stat().st_mode) == 0o700 for each in directories)
        yield stack
    assert not children_of(up)
    assert not any(each.exists() for each in directories)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_stop_nothing_is_left(number):
    with nothing_is_left(dtype="float32") as stack:
        ask(stack, picture(600))
        stack.process.send_signal(number)
        assert stack.process.wait(100) == 0


@pytest.mark.parametrize("module", ["encoder_service", "llm_service"])
def test_after_giving_up_on_a_child_nothing_is_left(module):
    with nothing_is_left(dtype="float32", max_restarts=1) as stack:
        ask(stack, picture(600))

        def given_up():
            for pid in pids(stack, module):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return stack.process.poll() is not None

        wait_for("giving up", given_up)
        assert stack.process.returncode == 2


def killed_stack():
    """Kills a stack's supervisor and waits for its children's end: the directories they had."""
    with opticnerve.serve(dtype="float32") as stack:
        ask(stack, picture(700))
        up, directories = stack.process.pid, made_for(stack)
        assert len(children_of(up)) == 3
        stack.process.kill()
        stack.process.wait()
        wait_for("the children's end", lambda: not children_of(up))
    return directories


def test_after_kill_9_children_end_and_the_next_start_sweeps():
    for _ in range(5):
        directories = killed_stack()
        if all(each.is_dir() for each in directories):
            break  # Else the start of some other stack on this machine has swept them already.
    else:
        pytest.fail("killed stacks take their directories along; the sweep would prove nothing")
    with opticnerve.serve(dtype="float32"):
        assert not any(each.exists() for each in directories)


def test_up_gives_up_with_a_clear_message_on_a_bad_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    done = subprocess.run(
        [sys.executable, "-m", "opticnerve", "up", str(tmp_path), "--port", "0"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "bert" in done.stderr and "qwen2_vl" in done.stderr
    assert "Traceback" not in done.stderr
