"""One service as a child process: starts it, relays its output, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import cast

from opticnerve.process import LAST_WORDS_S
from opticnerve.telemetry import logs

log = logging.getLogger(__name__)

HURRY_S = LAST_WORDS_S + 2.0  # From a second signal until SIGKILL.
LINE_BYTES = 2**20  # A longer line is cut.
LISTENING = re.compile(r"^listening (\S+)$")
READY = "ready"  # The line that a gateway prints once its workers serve.


class Role(IntEnum):
    """A child's role. The highest role is stopped first."""

    ENCODER = 0
    LLM = 1
    GATEWAY = 2


class _ServiceProcess(asyncio.SubprocessProtocol):
    """One process from its start to its end, and what it prints, by line.

    It leads a process group, which may outlive it. The group is killed as soon as the process is
    known to have ended, and never later, since the system gives the id of a process that was
    reaped, and of its group, to others.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.over = asyncio.Event()  # It has ended, and everything that it printed was read.
        self._on_line = on_line
        self._rest = {1: b"", 2: b""}  # Of stdout and stderr, behind the last whole line.
        self._group = 0  # 0: there is none to be killed.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        self.pid = self._group = self._transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._rest[fd] + data).split(b"\n")
        for line in lines:
            self._take(line)
        self._rest[fd] = b"(a very long line)" if len(rest) > LINE_BYTES else rest

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._take(self._rest[fd])

    def process_exited(self) -> None:
        self.kill()  # Also, processes that it started would keep its pipes open.
        self._group = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport.close()
        self.over.set()

    @property
    def status(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._transport.get_returncode()

    def send_signal(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                self._transport.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and to its group, until its end is known."""
        if self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)

    def _take(self, line: bytes) -> None:
        self._on_line(line.decode("utf-8", "replace").rstrip())


class Child:
    """A service's process. ``command`` is without ``--port``, which is added from ``port``; 0: a
    free one.

    The child leads a session of its own, so that Ctrl-C reaches the supervisor alone and the
    services stop in order.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        command: Sequence[str],
        environment: dict[str, str],
        port: int = 0,
        files: Sequence[int] = (),
    ) -> None:
        """``files``: descriptors that it inherits."""
        self.name = name
        self.role = role
        self.command = list(command)
        self.environment = environment
        self.port = port
        self.files = files
        self.address = ""  # From the line ``listening ADDRESS`` on its stdout.
        self.last_words = ""  # The last line it printed, quoted when the keeper gives up.
        self._hangup_due = False
        self._run: _ServiceProcess | None = None
        self._listening = asyncio.Event()
        self._ready = asyncio.Event()

    @property
    def running(self) -> bool:
        return self._run is not None and self._run.status is None

    @property
    def pid(self) -> int:
        return self._run.pid if self._run else 0

    async def start(self) -> None:
        self._listening.clear()
        self._ready.clear()
        self._hangup_due = False
        _, self._run = await asyncio.get_running_loop().subprocess_exec(
            lambda: _ServiceProcess(self._take),
            *self.command,
            "--port",
            str(self.port),
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=self.files,
        )

    async def listening(self) -> str:
        """Waits for the address that the child listens at."""
        await self._listening.wait()
        return self.address

    async def ready(self) -> None:
        """Waits until the child, which must be a gateway, prints READY."""
        await self._ready.wait()

    async def wait(self) -> int:
        """Waits for the process to end; returns its exit status, negative for a signal."""
        assert self._run
        await self._run.over.wait()
        assert self._run.status is not None
        return self._run.status

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Sends SIGTERM, which lets running work finish, and SIGINT, which aborts it, once
        ``hurry`` is set. Sends SIGKILL after ``grace_s``, or ``HURRY_S`` after SIGINT."""
        if not self.running:
            return
        self._signal(signal.SIGTERM)
        ended = asyncio.create_task(self.wait())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({ended, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if hurry.is_set() and not ended.done():
            self._signal(signal.SIGINT)
            grace_s = HURRY_S
            await asyncio.wait({ended}, timeout=grace_s)
        hurried.cancel()
        if not ended.done():
            log.warning("%s did not stop within %g s; killing it", self.name, grace_s)
            self.kill()
        await ended

    def _signal(self, number: int) -> None:
        if self._run is not None:
            self._run.send_signal(number)

    def hang_up(self) -> None:
        """Sends SIGHUP, which makes the child reload its files. A child that is starting gets it
        once it listens, since it may have read its files before it handles the signal."""
        if self._listening.is_set():
            self._signal(signal.SIGHUP)
        else:
            self._hangup_due = True

    def kill(self) -> None:
        """Sends SIGKILL to a child that runs, and to every process of its group."""
        if self._run is not None:
            self._run.kill()

    def _take(self, line: str) -> None:
        """A line that the child printed."""
        if match := LISTENING.match(line):
            self.address = match[1]
            self._listening.set()
            if self._hangup_due:
                self.hang_up()
        elif line == READY:
            self._ready.set()
        elif line:
            self.last_words = line
            with contextlib.suppress(OSError):  # The terminal may have been closed.
                print(logs.relayed(self.name, line), file=sys.stderr, flush=True)
