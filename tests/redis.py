"""A real redis-server for tests: a process of its own, on a free port, nothing kept on disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

import redis

from tests.system import free_port

START_S = 60.0
PATIENT = "socket_timeout=30&socket_connect_timeout=30"  # In a URL: a busy server is not down.
PORTS_TRIED = 5


class RedisServer:
    """``with RedisServer() as server: open_store(server.url)``; may be stopped and started again.

    ``arguments`` are redis-server's own, such as ``--requirepass secret``.
    """

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self._arguments = arguments
        self._directory = tempfile.mkdtemp(prefix="redis-test-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """0 while it is stopped."""
        return self._process.pid if self._process else 0

    def __enter__(self) -> RedisServer:
        for tries_left in reversed(range(PORTS_TRIED)):
            try:
                self.start()
                break
            except redis.ConnectionError:
                if not tries_left:
                    raise
                self.port = free_port()  # Somebody was faster.
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Returns when the server answers."""
        program = find_redis_server()
        if program is None:
            raise FileNotFoundError("redis-server is not installed")
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        options += ["--appendonly", "no", "--dir", self._directory, *self._arguments]
        log = open(Path(self._directory) / "log", "ab")
        with log:
            self._process = subprocess.Popen([program, *options], stdout=log, stderr=log)
        try:
            self._wait_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while True:
            with redis.Redis(port=self.port) as client:
                try:
                    client.ping()
                except redis.AuthenticationError:
                    pass  # It wants a password: it is there.
                except redis.ConnectionError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
                    continue
            if process.poll() is not None:  # Another one answers at this port.
                raise redis.ConnectionError("redis-server has ended")
            return

    def hang(self) -> None:
        """Stops the process without ending it: connections stay open, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kills the server; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def commands(client: redis.Redis) -> Counter[str]:
    """How often a server has run each command that stores send."""
    stats = client.info("commandstats")
    names = ("get", "getrange", "expire", "exists", "set", "del")
    return Counter({name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in names})


def find_redis_server() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")
