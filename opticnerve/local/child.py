"""One service as a child process: starts it, relays its output, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from enum import IntEnum

from opticnerve.process import LAST_WORDS_S
from opticnerve.telemetry import logs

log = logging.getLogger(__name__)

HURRY_S = LAST_WORDS_S + 2.0  # From a second signal until SIGKILL.
LISTENING = re.compile(r"^listening (\S+)$")
READY = "ready"  # The line that a gateway prints once its workers serve.


class Role(IntEnum):
    """A child's role. The highest role is stopped first."""

    ENCODER = 0
    LLM = 1
    GATEWAY = 2


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
        self._process: asyncio.subprocess.Process | None = None
        self._listening = asyncio.Event()
        self._ready = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        self._listening.clear()
        self._ready.clear()
        self._hangup_due = False
        self._process = await asyncio.create_subprocess_exec(
            *self.command,
            "--port",
            str(self.port),
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            pass_fds=self.files,
            limit=2**20,
        )
        assert self._process.stdout and self._process.stderr
        self._readers = [
            asyncio.create_task(self._read(stream))
            for stream in (self._process.stdout, self._process.stderr)
        ]

    async def listening(self) -> str:
        """Waits for the address that the child listens at."""
        await self._listening.wait()
        return self.address

    async def ready(self) -> None:
        """Waits until the child, which must be a gateway, prints READY."""
        await self._ready.wait()

    async def wait(self) -> int:
        """Waits for the process to end; returns its exit status, negative for a signal."""
        assert self._process
        status = await self._process.wait()
        self.kill()  # Ends its own children, which would keep its pipes open.
        await asyncio.gather(*self._readers)
        return status

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
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def hang_up(self) -> None:
        """Sends SIGHUP, which makes the child reload its files. A child that is starting gets it
        once it listens, since it may have read its files before it handles the signal."""
        if self._listening.is_set():
            self._signal(signal.SIGHUP)
        else:
            self._hangup_due = True

    def kill(self) -> None:
        """Sends SIGKILL to the child and every process of its session."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while line := await self._next_line(stream):
            text = line.decode("utf-8", "replace").rstrip()
            if match := LISTENING.match(text):
                self.address = match[1]
                self._listening.set()
                if self._hangup_due:
                    self.hang_up()
            elif text == READY:
                self._ready.set()
            elif text:
                self.last_words = text
                with contextlib.suppress(OSError):  # The terminal may have been closed.
                    print(logs.relayed(self.name, text), file=sys.stderr, flush=True)

    async def _next_line(self, stream: asyncio.StreamReader) -> bytes:
        """The next line; b"" at the end. A line longer than the limit is cut."""
        try:
            return await stream.readline()
        except ValueError:
            return b"(a very long line)\n"
