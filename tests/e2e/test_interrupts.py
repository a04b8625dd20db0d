"""Ctrl-C as a terminal sends it, to every process of the foreground group, at every stage."""

import contextlib
import fcntl
import os
import pty
import queue
import re
import signal
import subprocess
import sys
import termios
import threading
import time

import httpx2
import pytest

from opticnerve.process import ECHO_S
from tests.e2e.conftest import user
from tests.e2e.processes import processes
from tests.e2e.test_ends import children_of
from tests.gateways import events
from tests.system import alive, free_port, wait_for

WAIT_S = 200.0
CTRL_C = b"\x03"
LONG = {"stream": True, "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


class Terminal:
    """A command in a terminal of its own, whose foreground process group it is."""

    def __init__(self, *command):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.text = ""
        self._lines = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        rest = ""
        with contextlib.suppress(OSError):  # The last process with this terminal has ended.
            while data := os.read(self._ours, 2**16):
                self.text += data.decode("utf-8", "replace")
                *lines, rest = (rest + data.decode("utf-8", "replace")).split("\n")
                for line in lines:
                    self._lines.put(line)
        self._lines.put(None)

    def line(self, text):
        """The next line that has ``text``."""
        while (line := self._lines.get(timeout=WAIT_S)) is not None:
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came:\n{self.text}")

    def press(self, key=CTRL_C):
        """Not so soon after the last time that it would count as its echo."""
        time.sleep(ECHO_S * 1.5)
        os.write(self._ours, key)

    def interrupt(self):
        """SIGINT to the first process alone."""
        time.sleep(ECHO_S * 1.5)
        self.process.send_signal(signal.SIGINT)

    def end(self):
        """The exit status. The terminal is free: no process has it open any more."""
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert not self._reader.is_alive()
        return status


@contextlib.contextmanager
def terminal(*command):
    shown = Terminal(*command)
    try:
        yield shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            shown.process.kill()
        shown.process.wait()
        os.close(shown._ours)


@contextlib.contextmanager
def stream(url):
    """A long answer under way: the events that come, to the end."""
    body = {"model": "model", "messages": [user("Tell me a story.")], **LONG}
    with (
        httpx2.Client(timeout=WAIT_S, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
    ):
        pieces = answer.iter_text()
        assert next(pieces).startswith("data: ")
        yield pieces


def check_stream_was_cut(pieces):
    *_, error, done = events(re.sub("^.*?(?=data: )", "", "".join(pieces), flags=re.DOTALL))
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert "stopping" in error["error"]["message"] and done == "[DONE]"


@pytest.mark.parametrize("way", ["terminal", "parent"])
def test_a_second_ctrl_c_ends_streams_with_an_error_and_leaves_nothing(way):
    port = str(free_port())
    flags = ("--port", port, "--dtype", "float32", "--drain-timeout-s", "300")
    with terminal("opticnerve", "up", *flags) as shown:
        press = shown.press if way == "terminal" else shown.interrupt
        url = shown.line("OpticNerve is ready at").split()[-1]
        up = shown.process.pid
        (line,) = [line for line in processes(up).values() if "encoder_service" in line]
        tier = re.search(r"--store shm://(\S+)", line)[1]
        with stream(url) as pieces:
            press()
            told = shown.line("stopping: ")
            assert "up to 300 s" in told and "Ctrl-C again" in told
            assert "1 request runs" in shown.line("gateway.service")
            next(pieces)  # It goes on.
            press()
            check_stream_was_cut(pieces)
        assert shown.end() == 0
        assert not children_of(up) and not os.path.exists(tier)
        assert "Traceback" not in shown.text, shown.text


@contextlib.contextmanager
def workers(directory):
    """The addresses of an encoder and an LLM worker that stand alone."""
    with contextlib.ExitStack() as stack:
        found = []
        for module in ("encoder_service", "llm_service"):
            flags = ("--dtype", "float32", "--store", f"shm://{directory}")
            shown = stack.enter_context(terminal(module, *flags, "--drain-timeout-s", "300"))
            found.append((shown, shown.line("listening").split()[1]))
        for shown, _ in found:
            shown.line("ready at")
        yield found


def test_each_service_alone_says_so_and_ends_at_the_second(tmp_path):
    """The LLM worker is cut first: its stream ends at the gateway, which waits for another."""
    tier = tmp_path / "tier"
    with workers(tier) as ((encoder, seen), (llm, spoken)):
        flags = ("--encoder-addresses", seen, "--llm-addresses", spoken, "--port", "0")
        with terminal("gateway", *flags, "--drain-timeout-s", "300") as gateway:
            url = gateway.line("listening").split()[1]
            wait_for("readiness", lambda: httpx2.get(f"{url}/ready").status_code == 200)
            with stream(url) as pieces:
                for shown in (llm, gateway):
                    shown.press()
                    told = shown.line("stopping: ")
                    assert "1 request runs, for at most 300 s; a second signal" in told
                    next(pieces)
                llm.press()
                assert llm.end() == 0
                gateway.press()
                check_stream_was_cut(pieces)
            assert gateway.end() == 0
        encoder.press()
        assert "no request runs" in encoder.line("stopping: ")
        assert encoder.end() == 0
        for shown in (encoder, llm, gateway):
            assert "Traceback" not in shown.text, shown.text
        assert not list((tier / "holders").iterdir())


@pytest.mark.parametrize(
    "command",
    [("encoder_service",), ("llm_service",), ("llm_service", "--engine", "process")],
    ids=["encoder", "llm", "llm-process"],
)
def test_a_worker_ends_while_it_loads(command, tmp_path, random_checkpoint):
    tier = tmp_path / "tier"
    with terminal(*command, "--store", f"shm://{tier}") as shown:
        shown.line("listening")
        wait_for("the store", lambda: list(tier.glob("holders/*/alive")))
        os.write(shown._ours, CTRL_C)
        assert shown.end() == 0
        assert "Traceback" not in shown.text, shown.text
        assert not list((tier / "holders").iterdir())


@pytest.mark.parametrize("command", [("up", "--port", "0"), ("demo",), ("ask", "Hello")])
def test_a_stack_ends_while_it_starts(command):
    with terminal("opticnerve", *command) as shown:
        up = shown.process.pid
        if command[0] != "up":
            (up,) = wait_for("the stack", lambda: processes(shown.process.pid))
        found = wait_for("the services", lambda: (c := children_of(up)) and len(c) == 2 and c)
        shown.press()
        assert shown.end() == (0 if command[0] == "up" else 130)
        assert not alive(up) and not any(map(alive, found))
        assert "Traceback" not in shown.text, shown.text
